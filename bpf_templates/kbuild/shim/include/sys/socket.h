// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// UAPI if.h (reached from icmp.h) asks libc for this one structure.
#ifndef _BPFDP_SYS_SOCKET_H
#define _BPFDP_SYS_SOCKET_H

#include <uapi/linux/socket.h>

struct sockaddr {
    __kernel_sa_family_t sa_family;
    char sa_data[14];
};

#endif

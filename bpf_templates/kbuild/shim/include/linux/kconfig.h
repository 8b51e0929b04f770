// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// Included by BCC before everything else; BCC also takes its presence as the proof that this is a
// kernel tree. The kernel's own file defines CONFIG_* tests. Ours gives the few kernel-side names
// that BCC's helpers.h uses and UAPI headers do not have.
#ifndef _BPFDP_KCONFIG_H
#define _BPFDP_KCONFIG_H

#define CONFIG_BPF_SYSCALL 1
#define IS_ENABLED(option) 0
#define __user
#define __force
#define __bitwise
#define __maybe_unused __attribute__((unused))
#ifndef __always_inline
#define __always_inline inline __attribute__((always_inline))
#endif
#ifndef noinline
#define noinline __attribute__((noinline))
#endif

#include <uapi/linux/types.h>

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s8 s8;
typedef __s16 s16;
typedef __s32 s32;
typedef __s64 s64;
typedef __u8 uint8_t;
typedef __u16 uint16_t;
typedef __u32 uint32_t;
typedef __u64 uint64_t;
typedef __s8 int8_t;
typedef __s16 int16_t;
typedef __s32 int32_t;
typedef __s64 int64_t;
typedef __kernel_size_t size_t;
typedef unsigned long uintptr_t;
typedef _Bool bool;
enum { false = 0, true = 1 };

#ifndef NULL
#define NULL ((void *)0)
#endif

#endif

// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// BCC includes its own copy of the kernel's UAPI bpf.h first, under another guard; a second one
// would redefine every name in it.

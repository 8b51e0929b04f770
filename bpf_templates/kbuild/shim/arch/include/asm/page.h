// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// Named by BCC's own headers; nothing in it is needed by programs that use UAPI alone.

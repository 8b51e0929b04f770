# SPDX-License-Identifier: Apache-2.0
"""BPF itself: the system call, rendering and compiling programs, probing the kernel."""

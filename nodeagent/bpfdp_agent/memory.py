# SPDX-License-Identifier: Apache-2.0
"""Keeping the process small: what the C library and the garbage collector are told.

The first sync decodes every object of the cluster and reads whole maps. What it threw away would
stay in the heap for good, and what it kept would be gone through again and again.
"""

from __future__ import annotations

import ctypes
import gc

_libc = ctypes.CDLL(None)
_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # malloc.h's M_...
_LARGE = 256 << 10


def prepare() -> None:
    """At the start: large buffers go back when freed, few arenas, rarer collections."""
    if hasattr(_libc, "mallopt"):  # glibc
        _libc.mallopt(_MMAP_THRESHOLD, _LARGE)
        _libc.mallopt(_ARENA_MAX, 2)
    gc.set_threshold(20_000, 10, 10)


def settle() -> None:
    """After the first sync: give back what is free, and take what is left for long-lived."""
    gc.collect()
    gc.freeze()
    if hasattr(_libc, "malloc_trim"):  # glibc
        _libc.malloc_trim(0)

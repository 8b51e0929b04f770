# SPDX-License-Identifier: Apache-2.0
"""Hand-made BPF instructions: enough for probes and for the fixed programs of tests.

Registers are 0..10 (10 is the frame pointer). Each function returns the bytes of one instruction
(`load_map`: of two); a program is their concatenation.
"""

from __future__ import annotations

import enum
import struct

FRAME = 10


class Helper(enum.IntEnum):
    """Numbers of the kernel's helpers (`enum bpf_func_id`), those probed for."""

    TAIL_CALL = 12
    REDIRECT = 23
    SKB_SET_TUNNEL_KEY = 21
    GET_SOCKET_COOKIE = 46
    FIB_LOOKUP = 69
    GET_NETNS_COOKIE = 122
    REDIRECT_NEIGH = 152
    REDIRECT_PEER = 155
    KTIME_GET_COARSE_NS = 160
    SET_RETVAL = 187


def instruction(
    code: int, dst: int = 0, src: int = 0, offset: int = 0, immediate: int = 0
) -> bytes:
    """`struct bpf_insn`."""
    return struct.pack("<BBhi", code, src << 4 | dst, offset, immediate)


def set_register(register: int, value: int) -> bytes:
    """register = value (32-bit signed immediate)."""
    return instruction(0xB7, register, immediate=value)


def copy_register(to: int, source: int) -> bytes:
    """to = source."""
    return instruction(0xBF, to, source)


def add(register: int, value: int) -> bytes:
    """register += value."""
    return instruction(0x07, register, immediate=value)


def store_u64(base: int, offset: int, value: int) -> bytes:
    """*(u64 *)(base + offset) = value."""
    return instruction(0x7A, base, offset=offset, immediate=value)


def load_map(register: int, descriptor: int) -> bytes:
    """register = the map behind a descriptor."""
    return instruction(0x18, register, 1, immediate=descriptor) + instruction(0)


def call(helper: Helper) -> bytes:
    """Call a kernel helper."""
    return instruction(0x85, immediate=helper)


def leave() -> bytes:
    """Return register 0."""
    return instruction(0x95)


def returning(value: int) -> bytes:
    """A whole program that returns a constant."""
    return set_register(0, value) + leave()


def zeroed_frame(size: int) -> bytes:
    """Zero `size` bytes (a multiple of 8) below the frame pointer and point register 2 at them."""
    stores = b"".join(store_u64(FRAME, -offset, 0) for offset in range(8, size + 1, 8))
    return stores + copy_register(2, FRAME) + add(2, -size)

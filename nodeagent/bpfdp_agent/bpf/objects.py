# SPDX-License-Identifier: Apache-2.0
"""What goes into the compiler and what comes out; pure data, shared by parent, child and cache."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

_LD_IMM64 = 0x18
_PSEUDO_MAP_FD = 1
_SOURCE_REGISTER = 0xF0


class Source(msgspec.Struct, frozen=True):
    """A program text with a name to report by (no path, no spaces)."""

    name: str
    text: str


class Function(msgspec.Struct, frozen=True):
    """One program: its instructions (8 bytes each) and which map each `ld_imm64` refers to."""

    name: str
    instructions: bytes
    relocations: tuple[tuple[int, str], ...] = ()
    """(instruction index, map name in C)."""

    @property
    def map_names(self) -> frozenset[str]:
        """Names of the maps the program uses."""
        return frozenset(name for _, name in self.relocations)

    def with_maps(self, descriptors: Mapping[str, int]) -> bytes:
        """Instructions with the maps' descriptors put in. KeyError: a map is missing."""
        code = bytearray(self.instructions)
        for index, name in self.relocations:
            struct.pack_into("<i", code, index * 8 + 4, descriptors[name])
        return bytes(code)


class Object(msgspec.Struct, frozen=True):
    """A compiled source: its functions by name, and clang's warnings."""

    name: str
    functions: dict[str, Function]
    warnings: str = ""


class Request(msgspec.Struct, frozen=True):
    """One text for the compiler process."""

    name: str
    text: str
    cflags: tuple[str, ...] = ()


class Outcome(msgspec.Struct, frozen=True):
    """Its answer: functions when `ok`; `output` is what clang printed either way."""

    name: str
    ok: bool
    functions: tuple[Function, ...] = ()
    output: str = ""


def relocations_of(
    instructions: bytes, map_of_descriptor: Mapping[int, str]
) -> tuple[tuple[int, str], ...]:
    """Where the instructions hold map descriptors, as (index, map name)."""
    found = []
    for index in range(len(instructions) // 8):
        code, registers = instructions[index * 8], instructions[index * 8 + 1]
        if code == _LD_IMM64 and (registers & _SOURCE_REGISTER) >> 4 == _PSEUDO_MAP_FD:
            (descriptor,) = struct.unpack_from("<i", instructions, index * 8 + 4)
            found.append((index, map_of_descriptor[descriptor]))
    return tuple(found)

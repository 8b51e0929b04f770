# SPDX-License-Identifier: Apache-2.0
"""One policy program as numbers: what the template prints and what its CIDR maps hold.

Every peer of the rules has one bit (0..). A mask is a tuple of (word, bits) with the words that
are not zero; in the maps a mask is `words` u64 in a row. Nothing here changes when pods come, go
or are relabelled, so neither does the program's text.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

WORD = 64

Mask = tuple[tuple[int, int], ...]


class Peers(msgspec.Struct, frozen=True):
    """Who is allowed: anything at all, or whoever has one of the mask's bits."""

    anything: bool
    mask: Mask = ()

    @property
    def tests(self) -> int:
        """Comparisons the program makes for it."""
        return max(len(self.mask), 1)


class RangeTest(msgspec.Struct, frozen=True):
    """Peers allowed on destination ports lo..hi."""

    lo: int
    hi: int
    peers: Peers


class ProtocolTest(msgspec.Struct, frozen=True):
    """The disjoint, sorted port ranges of one IP protocol."""

    protocol: int
    ranges: tuple[RangeTest, ...]


class NameTest(msgspec.Struct, frozen=True):
    """Peers allowed on the port that the destination's identity gives name number `index`."""

    protocol: int
    index: int
    peers: Peers


class Prefix(msgspec.Struct, frozen=True):
    """One entry of the CIDR map: what holds for addresses whose longest prefix this is."""

    address: bytes
    length: int
    mask: Mask


class ProgramSpec(msgspec.Struct, frozen=True):
    """A policy program. Two specs with the same `key` are the same program with the same maps."""

    direction: str
    words: int
    by_identity: bool  # some peer is selected by labels
    every_port: Peers | None
    protocols: tuple[ProtocolTest, ...]
    names: tuple[NameTest, ...]
    name_count: int
    prefixes4: tuple[Prefix, ...]
    prefixes6: tuple[Prefix, ...]
    terms: tuple[str, ...]  # canonical text of every peer, by bit, then of every port name
    policies: tuple[str, ...] = ()  # whom to name in errors; no part of the key
    key: str = ""  # set by `sealed`

    def sealed(self) -> ProgramSpec:
        """With its key: 16 hex digits that name the program and what its bits mean."""
        plain = msgspec.structs.replace(self, policies=(), key="")
        digest = hashlib.sha256(msgspec.json.encode(plain)).hexdigest()
        return msgspec.structs.replace(self, key=digest[:16])

    def prefixes(self, family: int) -> tuple[Prefix, ...]:
        """Entries of the CIDR map of a family."""
        return self.prefixes4 if family == 4 else self.prefixes6

    @property
    def tests(self) -> int:
        """Comparisons in its text: what compile time and verification grow with."""
        peers = [self.every_port] if self.every_port else []
        peers += [r.peers for p in self.protocols for r in p.ranges] + [n.peers for n in self.names]
        return sum(p.tests for p in peers)

    @property
    def identity_value_size(self) -> int:
        """Bytes of a value in the identity map: the mask, then a u16 port for every name."""
        return self.words * 8 + (self.name_count + 3) // 4 * 8

    def identity_value(self, mask: Mask, ports: Iterable[int]) -> bytes:
        """Value of the identity map; a port of 0 is a name the identity does not have."""
        names = struct.pack(f"={self.name_count}H", *ports)
        return (self.cidr_value(mask) + names).ljust(self.identity_value_size, b"\0")

    def cidr_value(self, mask: Mask) -> bytes:
        """Value of a CIDR map."""
        words = [0] * self.words
        for index, bits in mask:
            words[index] = bits
        return struct.pack(f"={self.words}Q", *words)

    def cidr_entries(self, family: int) -> dict[bytes, bytes]:
        """The whole CIDR map of a family."""
        return {
            struct.pack("=I", prefix.length) + prefix.address: self.cidr_value(prefix.mask)
            for prefix in self.prefixes(family)
        }


def mask_of(bits: Iterable[int]) -> Mask:
    """The mask with these bits set."""
    words: dict[int, int] = {}
    for bit in bits:
        words[bit // WORD] = words.get(bit // WORD, 0) | 1 << bit % WORD
    return tuple(sorted(words.items()))

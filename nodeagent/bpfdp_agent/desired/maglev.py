# SPDX-License-Identifier: Apache-2.0
"""Maglev's lookup table: every node computes the same one, and a backend that goes moves little.

Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016, 3.4.
The table is made from the backends' addresses and ports alone; what it holds are this node's
slots, so nodes whose lists have another order still choose alike.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from bpfdp_agent.layouts import MAGLEV_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence

LARGEST = MAGLEV_SIZE
"""Backends that a table can hold; longer lists are chosen from by hash alone."""


def lookup_table(backends: Sequence[tuple[bytes, int]]) -> bytes:
    """One byte, the slot, for each of the table's places; backends by slot, at least one.

    Shares differ by one place at most, so by 1 % of the traffic with 40 backends.
    """
    by_name = sorted(range(len(backends)), key=lambda slot: backends[slot])
    walks = [_permutation(*backends[slot]) for slot in by_name]
    table = [-1] * MAGLEV_SIZE
    free = MAGLEV_SIZE
    while True:
        for number, (place, skip) in enumerate(walks):
            while table[place] >= 0:
                place = (place + skip) % MAGLEV_SIZE  # noqa: PLW2901 - walked on in place
            table[place] = by_name[number]
            free -= 1
            if not free:
                return bytes(table)
            walks[number] = ((place + skip) % MAGLEV_SIZE, skip)


def _permutation(address: bytes, port: int) -> tuple[int, int]:
    """Where a backend's walk over the table begins, and its step: odd, so it meets every place."""
    digest = hashlib.blake2s(address + port.to_bytes(2, "big"), digest_size=8).digest()
    start, step = int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")
    return start % MAGLEV_SIZE, (step | 1) % MAGLEV_SIZE

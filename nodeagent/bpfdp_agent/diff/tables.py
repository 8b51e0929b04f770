# SPDX-License-Identifier: Apache-2.0
"""From actual to desired: puts and deletes per map, in an order that never shows half a service."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


class MapWrites(msgspec.Struct, frozen=True):
    """Writes to one map of one family (0 for maps that are not per family), in any order."""

    map: str
    family: int
    puts: Mapping[bytes, bytes] = {}
    deletes: tuple[bytes, ...] = ()

    def __len__(self) -> int:
        return len(self.puts) + len(self.deletes)


class Writes(msgspec.Struct, frozen=True):
    """Steps to be done in their order; a later step must not begin when an earlier one failed."""

    steps: tuple[MapWrites, ...] = ()

    def __len__(self) -> int:
        return sum(len(step) for step in self.steps)

    def __iter__(self) -> Iterator[MapWrites]:
        return iter(self.steps)

    def __add__(self, other: Writes) -> Writes:
        return Writes(self.steps + other.steps)


class Delta(msgspec.Struct):
    """What a map must gain and lose. `fresh`: keys it gains that it did not have before."""

    puts: dict[bytes, bytes] = msgspec.field(default_factory=dict)
    deletes: set[bytes] = msgspec.field(default_factory=set)
    fresh: set[bytes] = msgspec.field(default_factory=set)


def difference(actual: Mapping[bytes, bytes], desired: Mapping[bytes, bytes]) -> Delta:
    """What turns the actual content of a map into the desired."""
    return Delta(
        puts={k: v for k, v in desired.items() if actual.get(k) != v},
        deletes={k for k in actual if k not in desired},
    )


def replace(
    name: str, family: int, actual: Mapping[bytes, bytes], desired: Mapping[bytes, bytes]
) -> Writes:
    """Writes for a map that stands alone: puts before deletes, nothing when nothing differs."""
    delta = difference(actual, desired)
    return Writes(_steps(family, ((name, "puts"), (name, "deletes")), {name: delta}))


SERVICE_PHASES = (
    ("frontends", "deletes"),
    ("backends", "puts"),
    ("slots", "puts"),
    ("maglev", "puts"),
    ("members", "puts"),
    ("source_ranges", "puts"),
    ("frontends", "puts"),
    ("maglev", "deletes"),
    ("slots", "deletes"),
    ("members", "deletes"),
    ("source_ranges", "deletes"),
    ("backends", "deletes"),
)
"""A frontend is written after everything it leads to and deleted before it.

A reader that took a frontend just before a put may find its slot gone already: the programs then
take slot 0, which goes last (bpf_templates/include/service.h).
"""

SERVICE_MAPS = ("frontends", "slots", "maglev", "backends", "members", "source_ranges")


def service_writes(family: int, deltas: Mapping[str, Delta]) -> Writes:
    """The service maps' deltas in the order of SERVICE_PHASES."""
    return Writes(_steps(family, SERVICE_PHASES, deltas))


def _steps(
    family: int, phases: Iterable[tuple[str, str]], deltas: Mapping[str, Delta]
) -> tuple[MapWrites, ...]:
    steps = []
    for name, side in phases:
        delta = deltas.get(name) or Delta()
        if side == "puts" and delta.puts:
            steps.append(MapWrites(name, family, puts=delta.puts))
        if side == "deletes" and delta.deletes:
            steps.append(MapWrites(name, family, deletes=tuple(sorted(delta.deletes))))
    return tuple(steps)

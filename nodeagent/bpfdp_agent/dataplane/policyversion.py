# SPDX-License-Identifier: Apache-2.0
"""One version of a policy program in the kernel: its maps and its programs, pinned in a folder.

Folder `<slot>_<digest>_<growth>_v<layout version>` holds program4, program6 and, where the program
has them, policy_peers, policy_cidrs4, policy_cidrs6. It appears whole or not at all. A version
whose identity map ran full is built again with the next growth; the highest one counts.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bpfdp_agent.bpf.errors import BpfError
from bpfdp_agent.dataplane import programs
from bpfdp_agent.dataplane.maps import OpenMap, create_map, open_map
from bpfdp_agent.dataplane.pins import listing
from bpfdp_agent.layouts import (
    CIDR_KEY,
    FAMILIES,
    LAYOUT_VERSION,
    NO_PREALLOC,
    U32,
    Map,
    MapType,
    struct_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from bpfdp_agent.bpf.objects import Object
    from bpfdp_agent.dataplane.maps import MapStore
    from bpfdp_agent.desired.programspec import ProgramSpec

FUNCTION = "policy_program"
PEERS, CIDRS = "policy_peers", "policy_cidrs"
SMALLEST_PEER_MAP = 1024

_BUILDING = "building"
_FOLDER = re.compile(r"(\d+)_([0-9a-f]{16})_(\d+)_v(\d+)")


@dataclass(frozen=True, slots=True)
class Version:
    """Where a version is: the slot of both prog arrays, and the folder of its pins."""

    slot: int
    digest: str
    growth: int
    folder: Path


def read_folder(folder: Path) -> Version | None:
    """The version a folder's name tells of; None for other names and other layouts."""
    name = _FOLDER.fullmatch(folder.name)
    if name is None or int(name[4]) != LAYOUT_VERSION:
        return None
    return Version(int(name[1]), name[2], int(name[3]), folder)


def build(
    spec: ProgramSpec,
    objects: Sequence[Object],
    values: Mapping[int, bytes],
    where: Version,
    shared: MapStore,
) -> None:
    """Create and fill the maps, load and pin the programs. Nothing runs them yet.

    `objects`: of family 4 and 6. `where.folder` appears when all is done. Raises BpfError.
    """
    building = where.folder.with_name(_BUILDING)
    remove(building)
    building.mkdir(parents=True)
    own: list[OpenMap] = []
    try:
        if spec.by_identity:
            own.append(_full_peers(spec, values, building))
        for family, compiled in zip(FAMILIES, objects, strict=True):
            if spec.prefixes(family):
                own.append(_full_cidrs(spec, family, building))
            maps = shared.descriptors(family) | {
                m.layout.name: m.descriptor for m in own if m.family == family or m.name == PEERS
            }
            programs.load(
                compiled.functions[FUNCTION],
                maps,
                name=f"pol_{'in' if spec.direction == 'ingress' else 'out'}{family}_{where.digest}",
                pin=building / _program_pin(family),
            ).close()
        building.rename(where.folder)
    except BaseException:
        remove(building)
        raise
    finally:
        for each in own:
            each.close()


def switch_in(version: Version, shared: MapStore) -> None:
    """Put the pinned programs into the version's slot. Raises BpfError when one is missing."""
    for family in FAMILIES:
        found = programs.open_pinned(version.folder / _program_pin(family))
        if found is None:
            raise BpfError(f"{version.folder} has no program for IPv{family}")
        try:
            programs.set_slot(shared["policy", family].descriptor, version.slot, found.descriptor)
        finally:
            found.close()


def read_peers(spec: ProgramSpec, folder: Path) -> dict[int, bytes]:
    """Content of the identity map. Raises BpfError when it is missing."""
    peers = _open_peers(spec, folder)
    try:
        return {struct.unpack("=I", key)[0]: value for key, value in peers.read().items()}
    finally:
        peers.close()


def write_peers(
    spec: ProgramSpec, folder: Path, puts: Mapping[int, bytes], deletes: Iterable[int]
) -> None:
    """Put, then delete identities. Raises MapFull."""
    peers = _open_peers(spec, folder)
    try:
        peers.write(_packed(puts), [struct.pack("=I", number) for number in deletes])
    finally:
        peers.close()


def remove(folder: Path) -> None:
    """Unpin everything in a folder, and the folder. Programs in no slot are freed by that."""
    for pin in listing(folder):
        pin.unlink(missing_ok=True)
    if folder.is_dir():
        folder.rmdir()


def _program_pin(family: int) -> str:
    return f"program{family}"


def _packed(values: Mapping[int, bytes]) -> dict[bytes, bytes]:
    return {struct.pack("=I", number): value for number, value in values.items()}


def _peer_layout(spec: ProgramSpec) -> Map:
    value = struct_of("policy_peer", value=f"bytes{spec.identity_value_size}")
    return Map(PEERS, MapType.HASH, U32, value, SMALLEST_PEER_MAP, NO_PREALLOC, per_family=False)


def _open_peers(spec: ProgramSpec, folder: Path) -> OpenMap:
    found = open_map(_peer_layout(spec), FAMILIES[0], folder / PEERS)
    if found is None:
        raise BpfError(f"{folder} has no map {PEERS}")
    return found


def _full_peers(spec: ProgramSpec, values: Mapping[int, bytes], folder: Path) -> OpenMap:
    """The identity map, filled, with room for as many again."""
    room = max(SMALLEST_PEER_MAP, 2 * len(values))
    peers = create_map(_peer_layout(spec), FAMILIES[0], max_entries=room, pin=folder / PEERS)
    peers.write(_packed(values))
    return peers


def _full_cidrs(spec: ProgramSpec, family: int, folder: Path) -> OpenMap:
    entries = spec.cidr_entries(family)
    value = struct_of("policy_cidr", mask=f"bytes{spec.words * 8}")
    layout = Map(CIDRS, MapType.LPM_TRIE, CIDR_KEY, value, len(entries), NO_PREALLOC)
    cidrs = create_map(layout, family, pin=folder / f"{CIDRS}{family}")
    cidrs.write(entries)
    return cidrs

# SPDX-License-Identifier: Apache-2.0
"""What the kernel holds, as rows for people: the pinned maps decoded, and what is attached.

Reads only, without the API server and without an agent; NothingHere says when there is nothing.
"""

from __future__ import annotations

import ipaddress
import time
from typing import TYPE_CHECKING, Any

from bpfdp_agent import layouts
from bpfdp_agent.bpf import syscall
from bpfdp_agent.bpf.errors import BpfError
from bpfdp_agent.dataplane.attach import Attacher, interface_name
from bpfdp_agent.dataplane.maps import OpenMap, open_map
from bpfdp_agent.dataplane.pins import Pins, listing
from bpfdp_agent.dataplane.policyversion import read_folder
from bpfdp_agent.layouts import FAMILIES, FrontendFlag, ListKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Row = tuple[object, ...]
PROTOCOLS = {1: "ICMP", 6: "TCP", 17: "UDP", 58: "ICMPv6", 132: "SCTP"}
POLICY_NAMES = {layouts.POLICY_SLOT_ALLOW: "-", layouts.POLICY_SLOT_DENY: "deny"}
_LAYOUTS = {each.name: each for each in layouts.MAPS}


class NothingHere(BpfError):
    """The dataplane has no maps on this node."""


class Readout:
    """Opens the pinned maps as they are asked for."""

    def __init__(self, pins: Pins | None = None) -> None:
        self._pins = pins or Pins()

    def _open(self, name: str, family: int) -> OpenMap:
        layout = _LAYOUTS[name]
        found = open_map(layout, family, self._pins.maps / layout.pin_name(family))
        if found is None:
            raise NothingHere(
                f"there is no map {name} under {self._pins.maps}: the dataplane is not attached on"
                " this node (run this on the node, or in its agent's pod)"
            )
        return found

    def _read(self, name: str, family: int) -> dict[bytes, bytes]:
        found = self._open(name, family)
        try:
            return found.read()
        finally:
            found.close()

    def _items(self, name: str, family: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        layout = _LAYOUTS[name]
        for key, value in self._read(name, family).items():
            yield layout.key.unpack(family, key), layout.value.unpack(family, value)

    # -- services -------------------------------------------------------------------------

    def services(self) -> list[Row]:
        """Frontend, what clients of each kind get, backends (local ones with *)."""
        return [row for family in FAMILIES for row in self._services(family)]

    def _services(self, family: int) -> Iterable[Row]:
        backends = {key["index"]: value for key, value in self._items("backends", family)}
        lists: dict[int, dict[int, int]] = {}
        for key, value in self._items("slots", family):
            lists.setdefault(key["list"], {})[key["slot"]] = value["value"]
        rows = []
        for key, value in self._items("frontends", family):
            if (key["port"], key["proto"]) == layouts.FRONTEND_MARKER:
                continue
            list_id = value["service"] * 2 + ListKind.CLUSTER
            chosen = lists.get(list_id, {}) or lists.get(list_id + 1, {})
            names = [_backend(backends.get(chosen[slot])) for slot in sorted(chosen)]
            kind = "NodePort" if not any(key["addr"]) else _kind(value["flags"])
            rows.append(
                (
                    _place(key["addr"], key["port"]) if any(key["addr"]) else f"*:{key['port']}",
                    PROTOCOLS.get(key["proto"], key["proto"]),
                    kind,
                    value["cluster_count"],
                    value["local_count"],
                    value["affinity_seconds"] or "-",
                    " ".join(names),
                )
            )
        return sorted(rows, key=lambda row: (str(row[2]), str(row[0])))

    # -- flows, pods, policies ------------------------------------------------------------

    def connections(self, limit: int) -> list[Row]:
        """Flows: as the packet comes, as it leaves, what happens to it, traffic, age in seconds."""
        rows = []
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        for family in FAMILIES:
            for key, value in self._items("ct", family):
                rows.append(_connection(key, value, now))
        return sorted(rows, key=lambda row: float(str(row[-1])))[:limit]

    def endpoints(self) -> list[Row]:
        """This node's pods: address, interface, who judges each direction."""
        rows = []
        for family in FAMILIES:
            for key, value in self._items("endpoints", family):
                rows.append(
                    (
                        _address(key["addr"]),
                        interface_name(value["ifindex"]),
                        POLICY_NAMES.get(value["ingress_slot"], value["ingress_slot"]),
                        POLICY_NAMES.get(value["egress_slot"], value["egress_slot"]),
                    )
                )
        return sorted(rows, key=lambda row: str(row[0]))

    def policies(self) -> list[Row]:
        """Policy programs: slot, version, the pods' addresses it judges in each direction."""
        used: dict[tuple[int, str], list[str]] = {}
        for family in FAMILIES:
            for key, value in self._items("endpoints", family):
                for side in ("ingress", "egress"):
                    slot = value[f"{side}_slot"]
                    used.setdefault((slot, side), []).append(_address(key["addr"]))
        versions = [v for f in listing(self._pins.policy) if (v := read_folder(f)) is not None]
        return [
            (
                version.slot,
                POLICY_NAMES.get(version.slot, version.digest),
                " ".join(sorted(used.get((version.slot, "ingress"), []))) or "-",
                " ".join(sorted(used.get((version.slot, "egress"), []))) or "-",
            )
            for version in sorted(versions, key=lambda v: v.slot)
        ]

    def counters(self) -> list[Row]:
        """Packets by what became of them, per family; those that are not zero."""
        rows: list[Row] = []
        for counter in layouts.Counter:
            counts = [self._count(counter, family) for family in FAMILIES]
            if any(counts):
                rows.append((counter.name.lower(), *counts))
        return rows

    def _count(self, counter: layouts.Counter, family: int) -> int:
        values = self._read("counters", family)
        raw = values.get(layouts.INDEX.pack(family, index=counter), b"")
        size = layouts.COUNTER.size(family)
        return sum(
            layouts.COUNTER.unpack(family, raw[at : at + size])["packets"]
            for at in range(0, len(raw), size)
        )

    # -- the whole ------------------------------------------------------------------------

    async def attached(self) -> list[Row]:
        """Hooks with a program: place, hook, family, how, program id."""
        attacher = Attacher("TCX", self._pins)
        rows: list[Row] = [
            (interface_name(a.ifindex), str(a.hook), a.family, a.kind, a.program_id)
            for a in await attacher.attached()
        ]
        rows += [
            ("cgroup", hook, "-", "link", program)
            for hook, program in sorted(attacher.cgroup_attached().items())
        ]
        return rows

    def maps(self) -> list[Row]:
        """Maps: entries in use and room."""
        rows: list[Row] = []
        for layout in layouts.MAPS:
            if layout.type in (layouts.MapType.ARRAY, layouts.MapType.PERCPU_ARRAY):
                continue
            for family in FAMILIES if layout.per_family else FAMILIES[:1]:
                opened = self._open(layout.name, family)
                try:
                    used = syscall.map_count(opened.descriptor, opened.info)
                    rows.append((opened.name, used, opened.info.max_entries))
                finally:
                    opened.close()
        return rows


def _connection(key: dict[str, Any], value: dict[str, Any], now: int) -> Row:
    translated = bool(value["flags"] & layouts.CtFlag.NAT)
    came = f"{_place(key['src'], key['sport'])} > {_place(key['dst'], key['dport'])}"
    leaves = (
        f"{_place(value['new_src'], value['new_sport'])}"
        f" > {_place(value['new_dst'], value['new_dport'])}"
    )
    return (
        PROTOCOLS.get(key["proto"], key["proto"]),
        came,
        leaves if translated else "-",
        layouts.Action(value["action"]).name.lower(),
        value["packets"],
        value["bytes"],
        round((now - value["last_seen"]) / 1e9, 1),
    )


def _kind(flags: int) -> str:
    if flags & FrontendFlag.CLUSTER_IP:
        return "ClusterIP"
    return "External" if flags & FrontendFlag.EXTERNAL else "?"


def _backend(value: dict[str, Any] | None) -> str:
    if value is None:
        return "?"
    local = "*" if value["flags"] & layouts.BackendFlag.LOCAL else ""
    return f"{_place(value['addr'], value['port'])}{local}"


def _address(raw: bytes) -> str:
    return str(ipaddress.ip_address(raw))


def _place(raw: bytes, port: int) -> str:
    text = _address(raw)
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"

# SPDX-License-Identifier: Apache-2.0
"""The contract (tests/contract) against the maps' content: all clients, without a kernel."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from bpfdp_agent.diff.tables import SERVICE_MAPS, Writes
from bpfdp_agent.model.addresses import cidr, packed
from contract.lookup import Lookup
from contract.planned import Planned
from contract.vectors import (
    NODE_PORT,
    OTHER_PORT,
    PORT,
    Flow,
    Transition,
    Vector,
    transitions,
    vectors,
)

PROTOCOLS = {"TCP": 6, "UDP": 17}
NODE_NAMES = {"A": "node", "B": "node-b"}
CAST = {
    4: {
        "cluster-ip": "10.96.0.10",
        "unallocated": "10.96.0.99",
        "load-balancer": "198.51.100.7",
        "external-ip": "198.51.100.8",
        "outside": "192.0.2.9",
        "pod": "10.1.1.2",
        "node": "10.0.0.1",
        "node-b": "10.0.0.2",
        "y": "10.1.1.3",
        "z": "10.1.2.2",
    },
    6: {
        "cluster-ip": "fd96::10",
        "unallocated": "fd96::99",
        "load-balancer": "2001:db8:7::7",
        "external-ip": "2001:db8:7::8",
        "outside": "2001:db8::9",
        "pod": "fd01:1::2",
        "node": "fd00::1",
        "node-b": "fd00::2",
        "y": "fd01:1::3",
        "z": "fd01:2::2",
    },
}
SERVICE_RANGE = {4: "10.96.0.0/16", 6: "fd96::/112"}
TARGETS = {
    "other-port": ("cluster-ip", OTHER_PORT),
    "node-port": ("node", NODE_PORT),
    "load-balancer-other-port": ("load-balancer", OTHER_PORT),
}


class Desk:
    """Node A's control plane in one family, and what its maps hold."""

    def __init__(self, family: int) -> None:
        self.family, self.cast = family, CAST[family]
        host = f"/{32 if family == 4 else 128}"
        clients = {who: self.cast[who] + host for who in ("pod", "outside")}
        self._control = Planned(
            family,
            self.cast | clients,
            {name: self.cast[which] for name, which in NODE_NAMES.items()},
            {which: self.cast[which] for which in "yz"},
        )
        self._tables: dict[str, dict[bytes, bytes]] = {name: {} for name in SERVICE_MAPS}

    def apply(self, vector: Vector, protocol: str) -> None:
        self._write(self._control.apply(vector, protocol))

    def _write(self, writes: Writes) -> None:
        for step in writes:
            self._tables[step.map].update(step.puts)
            for key in step.deletes:
                del self._tables[step.map][key]

    def check(self, flows: Iterable[Flow], protocol: str) -> None:
        service_range = cidr(SERVICE_RANGE[self.family])
        assert service_range
        lookup = Lookup(self.family, self._tables, {self._bytes("node")}, service_range)
        for flow in flows:
            which, port = TARGETS.get(flow.to, (flow.to, PORT))
            found = lookup.answer(
                self._bytes(flow.from_),
                self._bytes(which),
                port,
                PROTOCOLS[protocol],
                internal=flow.from_ != "outside",
            )
            if not isinstance(found, str):
                found = frozenset(each for each in "yz" if self._bytes(each) in found)
            assert found == flow.expected, f"{flow.from_} → {flow.to}"

    def _bytes(self, which: str) -> bytes:
        address = packed(self.cast[which])
        assert address
        return address


@pytest.mark.parametrize("family", CAST)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("vector", vectors(), ids=lambda v: v.name)
def test_a_service(vector: Vector, protocol: str, family: int) -> None:
    desk = Desk(family)
    desk.apply(vector, protocol)
    desk.check(vector.flows, protocol)


@pytest.mark.parametrize("family", CAST)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("transition", transitions(), ids=lambda t: t.name)
def test_a_service_that_changes_its_type(
    transition: Transition, protocol: str, family: int
) -> None:
    desk = Desk(family)
    for vector in (transition.before, transition.after):
        desk.apply(vector, protocol)
        desk.check(vector.flows, protocol)


def test_kube_proxys_matrix_is_whole() -> None:
    flows = [flow for vector in vectors() for flow in vector.flows if flow.kube_proxy]
    assert len(flows) == 27
    assert all(len(flow.kube_proxy) == 4 for flow in flows)
    assert len(transitions()) == 12

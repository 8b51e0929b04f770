# SPDX-License-Identifier: Apache-2.0
"""The contract (tests/contract) for pods and outside clients, by the tc programs."""

from __future__ import annotations

import pytest
from bpf.frames import Frame, raw
from bpf.nodes import Addresses, Node, node_bytes
from bpfdp_agent.bpf import syscall
from contract.planned import Planned
from contract.vectors import (
    NODE_PORT,
    OTHER_PORT,
    PORT,
    TARGET_PORT,
    Flow,
    Transition,
    Vector,
    transitions,
    vectors,
)

TRIES = 24
UNALLOCATED = {4: "10.96.0.99", 6: "fd96::99"}
PROTOCOLS = {"TCP": 6, "UDP": 17}


def planned(node: Node, cast: Addresses) -> Planned:
    """The control plane of node A, whose service range holds the cast's service."""
    bits = 8 * len(raw(cast.service)) - 8
    node.put("service_ranges", {"prefixlen": bits, "addr": raw(cast.service)}, value=1)
    return planned_for(cast)


def planned_for(cast: Addresses) -> Planned:
    host = f"/{8 * len(raw(cast.service))}"
    addresses = {
        "cluster-ip": cast.service,
        "load-balancer": cast.external,
        "external-ip": external_ip(cast),
        "outside": cast.client + host,
        "pod": cast.pod_x + host,
    }
    nodes = {"A": cast.node_a, "B": cast.node_b}
    return Planned(cast.family, addresses, nodes, {"y": cast.pod_y, "z": cast.pod_z})


def external_ip(cast: Addresses) -> str:
    return {4: "198.51.100.8", 6: "2001:db8:7::8"}[cast.family]


def target(flow: Flow, cast: Addresses) -> tuple[str, int]:
    return {
        "cluster-ip": (cast.service, PORT),
        "other-port": (cast.service, OTHER_PORT),
        "unallocated": (UNALLOCATED[cast.family], PORT),
        "node-port": (cast.node_a, NODE_PORT),
        "load-balancer": (cast.external, PORT),
        "load-balancer-other-port": (cast.external, OTHER_PORT),
        "external-ip": (external_ip(cast), PORT),
    }[flow.to]


def write(node: Node, control: Planned, vector: Vector, protocol: str) -> None:
    for step in control.apply(vector, protocol):
        syscall.map_update_all(node.maps[step.map].descriptor, step.puts)
        syscall.map_delete_all(node.maps[step.map].descriptor, step.deletes)


def outcome(node: Node, cast: Addresses, flow: Flow, packet: Frame) -> str:
    """Which backend, or what else became of the flow's first packet."""
    refused = node.counters().get("REJECTED", 0)
    out = node.from_pod(packet, "podx") if flow.from_ == "pod" else node.from_net(packet)
    if node.counters().get("REJECTED", 0) > refused:
        return "reject"
    if out.verdict == "DROP":
        return "drop"
    if out.action == "TUNNEL":
        assert out.entry is not None
        assert out.entry["nexthop"] == node_bytes(cast.node_b)
        assert out.frame.src == packet.src
        return "z"
    if out.frame.dst == packet.dst:
        assert out.verdict == "STACK"
        return "untouched"
    assert out.frame.src == packet.src, "the backend sees the client"
    assert out.frame.dport == TARGET_PORT
    return {cast.pod_y: "y", cast.pod_z: "z"}[out.frame.dst]


def check(node: Node, cast: Addresses, flows: tuple[Flow, ...], protocol: str) -> None:
    for flow in flows:
        if flow.from_ == "node":
            continue  # test_contract_sockets.py
        address, port = target(flow, cast)
        source = cast.pod_x if flow.from_ == "pod" else cast.client
        seen = {
            outcome(
                node,
                cast,
                flow,
                Frame(source, address, PROTOCOLS[protocol], sport=40000 + i, dport=port),
            )
            for i in range(TRIES)
        }
        expected = {flow.expected} if isinstance(flow.expected, str) else flow.expected
        assert seen == expected, f"{flow.from_} → {flow.to}"
        node.forget_flows()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("vector", vectors(), ids=lambda v: v.name)
def test_a_service(a: Node, cast: Addresses, vector: Vector, protocol: str) -> None:
    write(a, planned(a, cast), vector, protocol)
    check(a, cast, vector.flows, protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("transition", transitions(), ids=lambda t: t.name)
def test_a_service_that_changes_its_type(
    a: Node, cast: Addresses, transition: Transition, protocol: str
) -> None:
    control = planned(a, cast)
    for vector in (transition.before, transition.after):
        write(a, control, vector, protocol)
        check(a, cast, vector.flows, protocol)

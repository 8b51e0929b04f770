# SPDX-License-Identifier: Apache-2.0
"""Maglev: nodes whose slots have another order choose the same backend for a flow."""

from __future__ import annotations

from collections import Counter

import pytest
from bpf.frames import SYN, Frame, raw
from bpf.nodes import Addresses, Node
from bpfdp_agent.desired.maglev import lookup_table
from bpfdp_agent.layouts import MAGLEV_SIZE, SettingsFlag

PORTS = (8080, 8081, 8082)


def serve(
    node: Node, name: str, cast: Addresses, ports: tuple[int, ...], affinity: int = 0
) -> None:
    """Backends on one pod, by port, and their table."""
    node.configure(name, flags=SettingsFlag.MAGLEV)
    node.service(
        [(cast.service, 80)], [(cast.pod_z, p, cast.node_b) for p in ports], affinity=affinity
    )
    table = lookup_table([(raw(cast.pod_z), port) for port in ports])
    node.put("maglev", {"list": 14}, slots=table)


def choices(node: Node, cast: Addresses) -> list[int]:
    frames = [Frame(cast.pod_x, cast.service, sport=s, flags=SYN) for s in range(40000, 40060)]
    return [node.from_pod(frame, "podx").frame.dport for frame in frames]


def test_the_order_of_the_slots_does_not_matter(a: Node, cast: Addresses) -> None:
    serve(a, "A", cast, PORTS)
    first = choices(a, cast)
    a.forget_flows()
    serve(a, "A", cast, PORTS[::-1])
    assert choices(a, cast) == first
    assert len(Counter(first)) == len(PORTS)


def test_a_backend_that_goes_moves_the_others_flows_seldom(a: Node, cast: Addresses) -> None:
    serve(a, "A", cast, PORTS)
    before = choices(a, cast)
    a.forget_flows()
    serve(a, "A", cast, PORTS[:2])
    after = choices(a, cast)
    moved = sum(x != y for x, y in zip(before, after, strict=True) if x != PORTS[2])
    assert moved < len(before) * 0.4
    assert PORTS[2] not in after


def test_with_affinity_the_client_alone_decides(a: Node, cast: Addresses) -> None:
    serve(a, "A", cast, PORTS, affinity=60)
    assert len(set(choices(a, cast))) == 1


@pytest.mark.parametrize("size", [1, MAGLEV_SIZE + 1])
def test_without_a_table_the_hash_alone_decides(a: Node, cast: Addresses, size: int) -> None:
    a.configure("A", flags=SettingsFlag.MAGLEV)
    a.service([(cast.service, 80)], [(cast.pod_z, 1000 + i, cast.node_b) for i in range(size)])
    first = choices(a, cast)
    a.forget_flows()
    assert choices(a, cast) == first

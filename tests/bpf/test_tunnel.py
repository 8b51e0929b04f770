# SPDX-License-Identifier: Apache-2.0
"""Outside clients of another node's backend: the mode changes, SYNs and fragments arrive again."""

from __future__ import annotations

import pytest
from bpf.frames import ACK, Frame
from bpf.nodes import Addresses, Node
from bpfdp_agent.layouts import SettingsFlag

NODEPORT = 30080
MODES = {"tunnel": (0, "TUNNEL"), "dsr": (int(SettingsFlag.DSR), "NEIGH")}


@pytest.fixture
def first(a: Node, b: Node, cast: Addresses) -> Frame:
    a.service([(None, NODEPORT)], [(cast.pod_z, 8080, cast.node_b)])
    b.service([(None, NODEPORT)], [(cast.pod_z, 8080, None)])
    return Frame(cast.client, cast.node_a, dport=NODEPORT)


def into_b(a: Node, b: Node, cast: Addresses, packet: Frame) -> Frame:
    """The packet as B hands it to its pod."""
    out = a.from_net(packet)
    assert (out.verdict, out.action) == ("REDIRECT", "TUNNEL")
    into = b.from_tunnel(out.frame, cast.node_a)
    assert into.verdict == "REDIRECT"
    return into.frame


@pytest.mark.parametrize("change", [("tunnel", "dsr"), ("dsr", "tunnel")], ids="-".join)
def test_an_open_connection_keeps_its_way_back(
    a: Node, b: Node, cast: Addresses, first: Frame, change: tuple[str, str]
) -> None:
    before, after = change
    b.configure("B", flags=MODES[before][0])
    answer = into_b(a, b, cast, first).reply()
    assert b.from_pod(answer, "podx").action == MODES[before][1]

    b.configure("B", flags=MODES[after][0])
    into = into_b(a, b, cast, first.but(flags=ACK))
    assert (into.dst, into.dport) == (cast.pod_z, 8080)
    reply = b.from_pod(answer.but(flags=ACK), "podx")
    assert reply.action == MODES[before][1]
    assert (reply.frame.src, reply.frame.sport) == (cast.node_a, NODEPORT)

    other = into_b(a, b, cast, first.but(sport=40001)).reply()
    assert b.from_pod(other, "podx").action == MODES[after][1]


@pytest.mark.parametrize("flags", [each[0] for each in MODES.values()], ids=list(MODES))
def test_a_repeated_syn_keeps_its_backend_on_both_nodes(
    a: Node, b: Node, cast: Addresses, flags: int
) -> None:
    ports = range(8000, 8016)
    a.service([(None, NODEPORT)], [(cast.pod_z, port, cast.node_b) for port in ports])
    b.configure("B", flags=flags)
    b.service([(None, NODEPORT)], [(cast.pod_z, port, None) for port in ports])
    syn = Frame(cast.client, cast.node_a, dport=NODEPORT)
    assert len({into_b(a, b, cast, syn).dport for _ in range(20)}) == 1

# SPDX-License-Identifier: Apache-2.0
"""SCTP through services: addresses change, ports and checksum never do."""

from __future__ import annotations

from bpf.frames import SCTP, Frame
from bpf.nodes import Addresses, Node
from bpfdp_agent.layouts import FrontendFlag

PORT = 30132


def test_cluster_ip_and_back(a: Node, cast: Addresses) -> None:
    a.service([(cast.service, 80)], [(cast.pod_y, 80, None)], proto=SCTP)
    first = Frame(cast.pod_x, cast.service, SCTP)
    out = a.from_pod(first, "podx")
    assert (out.verdict, out.action) == ("REDIRECT", "PEER")
    assert out.frame == first.but(dst=cast.pod_y, ttl=63)
    assert out.frame.valid
    back = a.from_pod(out.frame.reply(), "pody").frame
    assert (back.src, back.sport, back.dst, back.dport) == (cast.service, 80, cast.pod_x, 40000)
    assert back.valid


def test_node_port_through_the_tunnel_and_back(a: Node, b: Node, cast: Addresses) -> None:
    for node, where in ((a, cast.node_b), (b, None)):
        node.service(
            [(None, PORT)],
            [(cast.pod_z, PORT, where)],
            proto=SCTP,
            flags=FrontendFlag.EXTERNAL,
        )
    out = a.from_net(Frame(cast.client, cast.node_a, SCTP, dport=PORT))
    assert (out.action, out.frame.valid) == ("TUNNEL", True)
    into = b.from_tunnel(out.frame, cast.node_a)
    assert (into.frame.src, into.frame.dst, into.frame.valid) == (cast.client, cast.pod_z, True)
    reply = b.from_pod(into.frame.reply(), "podx")
    assert (reply.frame.src, reply.frame.sport) == (cast.node_a, PORT)
    assert reply.frame.valid


def test_hairpin_keeps_the_source_port(a: Node, cast: Addresses) -> None:
    a.service([(cast.service, 80)], [(cast.pod_x, 80, None)], proto=SCTP)
    out = a.from_pod(Frame(cast.pod_x, cast.service, SCTP), "podx")
    assert (out.frame.src, out.frame.sport, out.frame.valid) == (cast.node_a, 40000, True)


def test_a_flow_that_would_need_another_source_port_is_dropped(a: Node, cast: Addresses) -> None:
    a.service([(cast.service, 80), (cast.external, 80)], [(cast.pod_y, 80, None)], proto=SCTP)
    assert a.from_pod(Frame(cast.pod_x, cast.service, SCTP), "podx").verdict == "REDIRECT"
    assert a.from_pod(Frame(cast.pod_x, cast.external, SCTP), "podx").verdict == "DROP"
    other = Frame(cast.pod_x, cast.external, SCTP, sport=40001)
    assert a.from_pod(other, "podx").verdict == "REDIRECT"


def test_no_endpoints_is_answered(a: Node, cast: Addresses) -> None:
    a.service([(cast.service, 80)], [], proto=SCTP)
    answer = a.from_pod(Frame(cast.pod_x, cast.service, SCTP), "podx").frame
    assert (answer.src, answer.icmp[0]) == (cast.service, 3 if answer.family == 4 else 1)

# SPDX-License-Identifier: Apache-2.0
"""Pod to pod, on one node and across nodes, and what a pod may not send."""

from __future__ import annotations

import pytest
from bpf.frames import ACK, FIN, ICMP4, ICMP6, RST, SYN, UDP, Frame
from bpf.nodes import VERDICTS, Addresses, Node


@pytest.mark.parametrize("proto", [6, 17])
def test_pod_to_pod_on_one_node_passes_the_stack_by(a: Node, cast: Addresses, proto: int) -> None:
    first = Frame(cast.pod_x, cast.pod_y, proto)
    there = a.from_pod(first, "podx")
    assert (there.verdict, there.action) == ("REDIRECT", "PEER")
    assert there.entry["ifindex"] == a.netns.ifindex["pody"]
    assert there.frame == first.but(ttl=63)
    assert there.frame.valid

    back = a.from_pod(first.reply(), "pody")
    assert (back.verdict, back.action) == ("REDIRECT", "PEER")
    assert back.entry["ifindex"] == a.netns.ifindex["podx"]
    assert back.frame.valid
    assert a.counters() == {"NEW_FLOW": 1, "ESTABLISHED": 1}


def test_pod_to_pod_on_another_node_and_back(a: Node, b: Node, cast: Addresses) -> None:
    first = Frame(cast.pod_x, cast.pod_z)
    out = a.from_pod(first, "podx")
    assert (out.verdict, out.action) == ("REDIRECT", "NEIGH")
    assert out.entry["ifindex"] == a.netns.ifindex["data0"]
    assert out.entry["nexthop"][-1] == 2  # by way of node B
    assert out.entry["mtu"] == 1500

    into = b.from_net(out.frame)
    assert (into.verdict, into.action) == ("REDIRECT", "PEER")
    assert into.frame.ttl == 62

    reply = b.from_pod(into.frame.reply(), "podx")
    assert (reply.verdict, reply.action) == ("REDIRECT", "NEIGH")
    home = a.from_net(reply.frame)
    assert (home.verdict, home.action) == ("REDIRECT", "PEER")
    assert home.frame.valid
    assert home.entry["packets"] == 1


def test_pod_to_outside_goes_through_the_stack_both_ways(a: Node, cast: Addresses) -> None:
    first = Frame(cast.pod_x, cast.client)
    out = a.from_pod(first, "podx")
    assert (out.verdict, out.action) == ("STACK", "STACK")
    assert out.frame == first
    assert a.to_net(first).verdict == "STACK"
    assert a.from_net(first.reply()).verdict == "STACK"
    assert a.to_pod(first.reply(), "podx").verdict == "STACK"


def test_node_to_its_pod_and_back(a: Node, cast: Addresses) -> None:
    first = Frame(cast.node_a, cast.pod_x)
    assert a.to_pod(first, "podx", ingress=None).verdict == "STACK"
    assert a.from_pod(first.reply(), "podx").verdict == "STACK"
    assert a.from_pod(first.reply(), "podx").action == "STACK"


def test_another_nodes_process_to_a_pod(b: Node, cast: Addresses) -> None:
    first = Frame(cast.node_a, cast.pod_z)
    assert b.from_net(first).action == "PEER"
    assert b.from_pod(first.reply(), "podx").action == "NEIGH"


def test_ping_is_followed_by_its_id(a: Node, cast: Addresses) -> None:
    proto, request, reply = (ICMP4, 8, 0) if cast.family == 4 else (ICMP6, 128, 129)
    ping = Frame(cast.pod_x, cast.pod_y, proto, icmp=(request, 0, 0x1234_0001))
    assert a.from_pod(ping, "podx").action == "PEER"
    pong = Frame(cast.pod_y, cast.pod_x, proto, icmp=(reply, 0, 0x1234_0001))
    assert a.from_pod(pong, "pody").action == "PEER"
    assert a.counters() == {"NEW_FLOW": 1, "ESTABLISHED": 1}


def test_a_pod_sends_from_its_own_address_only(a: Node, cast: Addresses) -> None:
    assert a.from_pod(Frame(cast.pod_y, cast.pod_z), "podx").verdict == "DROP"
    assert a.from_pod(Frame(cast.client, cast.pod_y), "podx").verdict == "DROP"
    assert a.counters() == {"DROP_SPOOFED": 2}


def test_a_pod_cannot_join_anothers_flow(a: Node, cast: Addresses) -> None:
    flow = Frame(cast.pod_x, cast.pod_z)
    a.from_pod(flow, "podx")
    assert a.from_pod(flow.but(flags=ACK), "pody").verdict == "DROP"


def test_a_pods_address_from_outside_is_a_forgery(a: Node, cast: Addresses) -> None:
    assert a.from_net(Frame(cast.pod_x, cast.pod_y)).verdict == "DROP"
    a.from_pod(Frame(cast.pod_x, cast.pod_y, UDP), "podx")
    assert a.from_net(Frame(cast.pod_x, cast.pod_y, UDP)).verdict == "DROP"


def test_the_last_hop_is_left_to_the_stack(a: Node, cast: Addresses) -> None:
    first = Frame(cast.pod_x, cast.pod_z, ttl=1)
    gone = a.from_pod(first, "podx")
    assert gone.verdict == "STACK"
    assert gone.frame == first
    assert a.counters()["TTL_EXPIRED"] == 1


def test_too_big_for_the_route_is_left_to_the_stack(a: Node, cast: Addresses) -> None:
    first = Frame(cast.pod_x, cast.pod_z, UDP, payload=bytes(1600))
    assert a.from_pod(first, "podx").verdict == "STACK"
    assert a.counters()["TOO_BIG"] == 1
    assert a.from_pod(first.but(payload=b"small"), "podx").verdict == "REDIRECT"


def test_tcp_without_syn_and_without_a_flow_is_the_stacks(a: Node, cast: Addresses) -> None:
    a.service([(cast.service, 80)], [(cast.pod_y, 8080, None)])
    assert a.from_net(Frame(cast.client, cast.pod_x, flags=ACK)).verdict == "STACK"
    middle = a.from_pod(Frame(cast.pod_x, cast.service, flags=ACK), "podx")
    assert (middle.verdict, middle.action) == ("STACK", "NONE")
    assert middle.frame.dst == cast.service


def test_a_syn_on_a_closed_flow_opens_another(a: Node, cast: Addresses) -> None:
    first = Frame(cast.pod_x, cast.pod_y)
    a.from_pod(first, "podx")
    a.from_pod(first.reply(), "pody")
    assert a.from_pod(first, "podx").entry["packets"] == 2  # repeated: the same flow
    a.from_pod(first.but(flags=FIN | ACK), "podx")
    assert a.from_pod(first, "podx").entry["packets"] == 4  # half closed is not closed
    a.from_pod(first.reply(flags=FIN | ACK), "pody")
    again = a.from_pod(first, "podx")
    assert again.entry["packets"] == 1
    assert again.entry["tcp"] == SYN
    a.from_pod(first.reply(flags=RST), "pody")
    assert a.from_pod(first, "podx").entry["packets"] == 1
    assert a.counters()["NEW_FLOW"] == 3


def test_other_frames_pass(a: Node) -> None:
    arp = b"\xff" * 6 + b"\2\0\0\0\0\2" + b"\x08\x06" + bytes(40)
    for hook in ("from_pod", "to_pod", "from_net", "to_net"):
        assert VERDICTS[a.run(hook, arp, "podx").retval] == "STACK"
    assert a.counters() == {}

# SPDX-License-Identifier: Apache-2.0
"""Nodes with two networks, and a pod network that is the CNI's VXLAN."""

from __future__ import annotations

import pytest
from bpf.frames import ACK, SYN, TCP, UDP, Frame
from bpf.nodes import Addresses, Node, raw
from bpfdp_agent.layouts import IdentityFlag

SECOND_ADDRESS = {4: "10.0.1.1", 6: "fd00:1::1"}
SECOND_CLIENT = {4: "198.18.0.9", 6: "2001:db8:2::9"}
SECOND_GATEWAY = {4: "10.0.1.254", 6: "fd00:1::fe"}
FAR_POD = {4: "10.1.3.2", 6: "fd01:3::2"}
FAR_GATEWAY = {4: "10.1.3.0", 6: "fd01:3::"}
OVERLAY_PORT, TUNNEL_PORT = 8472, 4789


def next_hop(entry: dict[str, object], family: int) -> bytes:
    """Where a flow's packets go, in the family's own length."""
    hop = entry["nexthop"]
    assert isinstance(hop, bytes)
    return hop[-4:] if family == 4 else hop


@pytest.mark.parametrize("proto", [TCP, UDP])
def test_a_nodeport_on_the_second_network_answers_there(
    a: Node, cast: Addresses, proto: int
) -> None:
    own, client = SECOND_ADDRESS[a.family], SECOND_CLIENT[a.family]
    a.put("own_addresses", {"addr": raw(own)}, value=1)
    a.service([(None, 30080)], [(cast.pod_y, 8080, None)], proto=proto)
    asked = Frame(client, own, proto, sport=4000, dport=30080, flags=SYN)
    assert a.send("from_net", asked, "data1").frame.dst == cast.pod_y
    answer = Frame(cast.pod_y, client, proto, sport=8080, dport=4000, flags=SYN | ACK)
    for _ in range(2):
        out = a.from_pod(answer, "pody")
        if not out.entry["ifindex"]:  # its next hop is asked for by the second packet
            a.age(answer)
    assert (out.verdict, out.frame.src, out.frame.sport) == ("REDIRECT", own, 30080)
    assert out.entry["ifindex"] == a.netns.ifindex["data1"]
    assert next_hop(out.entry, a.family) == raw(SECOND_GATEWAY[a.family])


@pytest.mark.parametrize("answers", ["node_a", "second"])
def test_a_udp_server_of_the_node_answers_from_the_routes_address(
    a: Node, cast: Addresses, answers: str
) -> None:
    own, client = SECOND_ADDRESS[a.family], SECOND_CLIENT[a.family]
    a.put("own_addresses", {"addr": raw(own)}, value=1)
    a.service([(None, 30080)], [(cast.node_a, 8080, None)], proto=UDP)
    asked = Frame(client, own, UDP, sport=4000, dport=30080)
    assert a.send("from_net", asked, "data1").frame.dst == cast.node_a
    source = cast.node_a if answers == "node_a" else own
    for _ in range(2):
        out = a.send("to_net", Frame(source, client, UDP, sport=8080, dport=4000), "data1")
        assert (out.frame.src, out.frame.sport, out.frame.dport) == (own, 30080, 4000)
        assert out.frame.valid


def test_pods_of_another_node_are_reached_through_the_overlay(a: Node, cast: Addresses) -> None:
    far = FAR_POD[a.family]
    a.put("identities", {"addr": raw(far)}, id=20, flags=int(IdentityFlag.POD))
    a.service([(cast.service, 80)], [(far, 8080, cast.node_b)])
    for dst in (far, cast.service):
        out = a.from_pod(Frame(cast.pod_x, dst, sport=4000, dport=80, flags=SYN), "podx")
        assert (out.verdict, out.action, out.frame.dst) == ("REDIRECT", "NEIGH", far)
        assert out.entry["ifindex"] == a.netns.ifindex["overlay0"]
        assert next_hop(out.entry, a.family) == raw(FAR_GATEWAY[a.family])
        assert out.entry["mtu"] == 1450


def test_what_arrives_through_the_overlay_goes_into_the_pod(a: Node, cast: Addresses) -> None:
    far = FAR_POD[a.family]
    packet = Frame(far, cast.pod_x, sport=4000, dport=8080, flags=SYN)
    out = a.send("from_net", packet, "overlay0")
    assert (out.verdict, out.action) == ("REDIRECT", "PEER")
    forged = packet.but(src=cast.pod_y)
    assert a.send("from_net", forged, "overlay0").verdict == "DROP"


def test_a_device_that_is_no_data_interface_is_left_to_the_stack(a: Node, cast: Addresses) -> None:
    far = FAR_POD[a.family]
    a.put("identities", {"addr": raw(far)}, id=20, flags=int(IdentityFlag.POD))
    a.delete("interfaces", index=a.netns.ifindex["overlay0"])
    packet = Frame(cast.pod_x, far, sport=4000, dport=80, flags=SYN)
    assert a.from_pod(packet, "podx").verdict == "STACK"


@pytest.mark.parametrize("port", [OVERLAY_PORT, TUNNEL_PORT])
def test_tunnelled_packets_on_the_underlay_are_not_touched(
    a: Node, cast: Addresses, port: int
) -> None:
    a.service([(cast.node_a, port)], [(cast.pod_y, 5353, None)], proto=UDP)
    packet = Frame(cast.node_b, cast.node_a, UDP, sport=50000, dport=port)
    out = a.from_net(packet)
    assert (out.verdict, out.entry, bytes(out.frame)) == ("STACK", None, bytes(packet))


def test_a_tunnelled_client_arrives_where_its_route_leads(a: Node, cast: Addresses) -> None:
    """A process of the node behind a NodePort: a strict reverse path filter looks at that."""
    a.service([(None, 30080)], [(cast.node_a, 8080, None)])
    for client, device in ((cast.client, "data0"), (SECOND_CLIENT[a.family], "data1")):
        packet = Frame(client, cast.node_b, sport=4000, dport=30080, flags=SYN)
        out = a.from_tunnel(packet, cast.node_b)
        assert (out.verdict, out.action) == ("REDIRECT", "HOST_IN")
        assert out.entry["ifindex"] == a.netns.ifindex[device]


def test_the_first_nodes_second_address_is_served_through_the_tunnel(
    b: Node, cast: Addresses
) -> None:
    """The API server tells of one network's addresses; the reply goes back through the tunnel."""
    b.service([(None, 30080)], [(cast.pod_z, 8080, None)])
    asked = SECOND_ADDRESS[b.family]
    packet = Frame(SECOND_CLIENT[b.family], asked, sport=4000, dport=30080)
    out = b.from_tunnel(packet, cast.node_a)
    assert (out.verdict, out.frame.dst) == ("REDIRECT", cast.pod_z)
    back = b.from_pod(out.frame.reply(), "podx")
    assert (back.verdict, back.action, back.frame.src) == ("REDIRECT", "TUNNEL", asked)

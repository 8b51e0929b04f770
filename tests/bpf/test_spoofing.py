# SPDX-License-Identifier: Apache-2.0
"""Known flows are no way around: their packets come from where the flow came from, or not at all."""

from __future__ import annotations

from bpf.frames import ACK, UDP, Frame
from bpf.nodes import Addresses, Node
from bpfdp_agent.layouts import POLICY_SLOT_DENY

NODEPORT = 30080


def test_a_pod_cannot_send_into_a_flow_from_outside(a: Node, cast: Addresses) -> None:
    flow = Frame(cast.pod_z, cast.pod_y, dport=80)
    assert a.from_net(flow).action == "PEER"
    forged = flow.but(flags=ACK)
    assert a.from_pod(forged, "podx").verdict == "DROP"
    assert a.from_net(forged).verdict == "REDIRECT"
    assert a.counters()["DROP_SPOOFED"] == 1


def test_a_pod_cannot_answer_for_another(a: Node, cast: Addresses) -> None:
    asked = Frame(cast.client, cast.pod_y, UDP, dport=53)
    assert a.to_pod(asked, "pody").verdict == "STACK"
    a.pod(cast.pod_x, "podx", egress=POLICY_SLOT_DENY)
    assert a.from_pod(asked.reply(), "podx").verdict == "DROP"
    assert a.from_pod(asked.reply(), "pody").verdict == "STACK"


def test_the_tunnel_is_no_way_into_known_flows(a: Node, cast: Addresses) -> None:
    flow = Frame(cast.pod_z, cast.pod_y, dport=80)
    assert a.from_net(flow).action == "PEER"
    assert a.from_tunnel(flow.but(flags=ACK), cast.gateway).verdict == "DROP"
    assert a.from_tunnel(flow.but(flags=ACK), cast.node_b).verdict == "DROP"


def test_known_flows_of_the_tunnel_need_a_node_too(a: Node, cast: Addresses) -> None:
    a.service([(None, NODEPORT)], [(cast.pod_y, 8080, None)])
    flow = Frame(cast.client, cast.node_b, dport=NODEPORT)
    assert a.from_tunnel(flow, cast.node_b).action == "PEER"
    assert a.from_tunnel(flow.but(flags=ACK), cast.node_b).verdict == "REDIRECT"
    assert a.from_tunnel(flow.but(flags=ACK), cast.gateway).verdict == "DROP"


def test_a_pod_cannot_speak_to_the_tunnel_of_a_node(a: Node, cast: Addresses) -> None:
    assert a.from_pod(Frame(cast.pod_x, cast.node_b, UDP, dport=4789), "podx").verdict == "DROP"
    assert a.from_pod(Frame(cast.pod_x, cast.node_b, UDP, dport=4790), "podx").verdict == "STACK"
    assert a.from_pod(Frame(cast.pod_x, cast.client, UDP, dport=4789), "podx").verdict == "STACK"


def test_a_local_pods_address_does_not_arrive_from_outside(a: Node, cast: Addresses) -> None:
    flow = Frame(cast.pod_x, cast.pod_y, dport=80)
    assert a.from_pod(flow, "podx").action == "PEER"
    assert a.from_net(flow.but(flags=ACK)).verdict == "DROP"


def test_an_isolated_pod_sends_nothing_untranslated_to_a_service(a: Node, cast: Addresses) -> None:
    a.service([(cast.service, 80)], [(cast.pod_z, 8080, cast.node_b)])
    older = Frame(cast.pod_x, cast.service, dport=80, flags=ACK)
    assert a.from_pod(older, "podx").verdict == "STACK"
    a.pod(cast.pod_x, "podx", egress=POLICY_SLOT_DENY)
    assert a.from_pod(older, "podx").verdict == "DROP"


def test_a_flow_follows_its_pod_to_another_veth(a: Node, cast: Addresses) -> None:
    flow = Frame(cast.client, cast.pod_y, UDP, dport=53)
    assert a.from_net(flow).entry["ifindex"] == a.netns.ifindex["pody"]
    a.pod(cast.pod_y, "podx", ingress=POLICY_SLOT_DENY)
    a.age(flow)
    assert a.from_net(flow).verdict == "DROP", "the new pod's own policy judges"
    a.pod(cast.pod_y, "podx")
    a.age(flow)
    assert a.from_net(flow).entry["ifindex"] == a.netns.ifindex["podx"]

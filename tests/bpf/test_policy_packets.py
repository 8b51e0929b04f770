# SPDX-License-Identifier: Apache-2.0
"""NetworkPolicies as compiled programs in the packet path: real packets, real verdicts."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Protocol

import pytest
from bpf.frames import ICMP4, ICMP6, UDP, Frame
from bpf.nodes import Addresses, Node, compile_template
from bpfdp_agent.bpf import syscall
from bpfdp_agent.dataplane import policyversion, programs
from bpfdp_agent.desired.identities import Identity
from bpfdp_agent.desired.policy import normal_rules, read_policy
from bpfdp_agent.desired.policyprogram import Membership, program_of
from bpfdp_agent.layouts import MapType
from bpfdp_agent.model.pods import NamedPort
from bpfdp_agent.model.policies import Direction
from bpfdp_agent.watch.wire import (
    IPBlock,
    LabelSelector,
    NetworkPolicy,
    NetworkPolicyEgressRule,
    NetworkPolicyIngressRule,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    NetworkPolicySpec,
    ObjectMeta,
)

SLOT = 5
X, Y, Z = 10, 11, 12  # identities of the cast (see Node.configure)


class Enforce(Protocol):
    """Puts the program of a direction into SLOT of a node."""

    def __call__(self, node: Node, spec: NetworkPolicySpec, direction: Direction) -> None: ...


@pytest.fixture
def enforce() -> Iterator[Enforce]:
    filled: list[Node] = []

    def load(node: Node, spec: NetworkPolicySpec, direction: Direction) -> None:
        policy = NetworkPolicy(metadata=ObjectMeta(name="p", namespace="shop"), spec=spec)
        program = program_of(normal_rules([read_policy(policy)], direction, []))
        membership = Membership()
        for number, app in ((X, "x"), (Y, "y"), (Z, "z")):
            ports = (NamedPort("web", 6, 8000 + number),)
            membership.set_identity(number, Identity("shop", (("app", app),), ports))
        function = compile_template("policy.c.j2", node.family, spec=program.spec)[
            policyversion.FUNCTION
        ]
        own = {}
        if policyversion.PEERS in function.map_names:
            size = program.spec.identity_value_size
            own[policyversion.PEERS] = syscall.map_create(MapType.HASH, 4, size, 16, flags=1)
            values = {struct.pack("=I", n): v for n, v in membership.values(program).items()}
            syscall.map_update_all(own[policyversion.PEERS], values)
        if policyversion.CIDRS in function.map_names:
            key_size, size = 8 if node.family == 4 else 20, program.spec.words * 8
            own[policyversion.CIDRS] = syscall.map_create(
                MapType.LPM_TRIE, key_size, size, 16, flags=1
            )
            entries = program.spec.cidr_entries(node.family)
            syscall.map_update_all(own[policyversion.CIDRS], entries)
        shared = {name: each.descriptor for name, each in node.maps.items()}
        loaded = programs.load(function, shared | own)
        programs.set_slot(node.maps["policy"].descriptor, SLOT, loaded.descriptor)
        filled.append(node)
        for descriptor in own.values():
            os.close(descriptor)
        loaded.close()

    yield load
    for node in filled:
        syscall.map_delete(node.maps["policy"].descriptor, struct.pack("=I", SLOT))


def pods(app: str) -> NetworkPolicyPeer:
    return NetworkPolicyPeer(pod_selector=LabelSelector(match_labels={"app": app}))


def block(cidr: str, *excepts: str) -> NetworkPolicyPeer:
    return NetworkPolicyPeer(ip_block=IPBlock(cidr=cidr, except_=excepts))


def host(address: str) -> str:
    return f"{address}/128" if ":" in address else f"{address}/32"


def from_peers(*peers: NetworkPolicyPeer, ports: tuple = ()) -> NetworkPolicySpec:
    return NetworkPolicySpec(ingress=(NetworkPolicyIngressRule(from_=peers, ports=ports),))


def to_peers(*peers: NetworkPolicyPeer, ports: tuple = ()) -> NetworkPolicySpec:
    return NetworkPolicySpec(egress=(NetworkPolicyEgressRule(to=peers, ports=ports),))


def port(number: int | str, end: int | None = None) -> NetworkPolicyPort:
    return NetworkPolicyPort(port=number, end_port=end)


def test_one_client_is_let_in_on_its_ports_and_another_is_not(
    a: Node, cast: Addresses, enforce: Enforce
) -> None:
    enforce(a, from_peers(pods("x"), ports=(port(80, 82),)), Direction.INGRESS)
    a.pod(cast.pod_y, "pody", ingress=SLOT)
    assert a.from_pod(Frame(cast.pod_x, cast.pod_y, dport=82), "podx").verdict == "REDIRECT"
    assert a.from_pod(Frame(cast.pod_x, cast.pod_y, dport=83), "podx").verdict == "DROP"
    assert a.from_pod(Frame(cast.pod_x, cast.pod_y, UDP, dport=80), "podx").verdict == "DROP"
    assert a.to_pod(Frame(cast.pod_z, cast.pod_y, dport=80), "pody").verdict == "DROP"


def test_egress_judges_the_backend_not_the_service(
    a: Node, cast: Addresses, enforce: Enforce
) -> None:
    a.service([(cast.service, 80)], [(cast.pod_y, 8080, None)])
    enforce(a, to_peers(block(host(cast.pod_y)), ports=(port(8080),)), Direction.EGRESS)
    a.pod(cast.pod_x, "podx", egress=SLOT)
    assert a.from_pod(Frame(cast.pod_x, cast.service), "podx").verdict == "REDIRECT"
    assert a.from_pod(Frame(cast.pod_x, cast.client, dport=8080), "podx").verdict == "DROP"

    enforce(a, to_peers(block(host(cast.service)), ports=(port(80),)), Direction.EGRESS)
    again = Frame(cast.pod_x, cast.service, sport=41000)
    assert a.from_pod(again, "podx").verdict == "DROP"


def test_an_egress_port_name_is_the_backends(a: Node, cast: Addresses, enforce: Enforce) -> None:
    a.service([(cast.service, 80)], [(cast.pod_y, 8000 + Y, None)])
    enforce(a, to_peers(ports=(port("web"),)), Direction.EGRESS)
    a.pod(cast.pod_x, "podx", egress=SLOT)
    assert a.from_pod(Frame(cast.pod_x, cast.service), "podx").verdict == "REDIRECT"
    other = Frame(cast.pod_x, cast.pod_z, dport=8000 + Y)
    assert a.from_pod(other, "podx").verdict == "DROP"


def test_a_block_judges_the_outside_client_of_a_node_port(
    a: Node, b: Node, cast: Addresses, enforce: Enforce
) -> None:
    a.service([(None, 30080)], [(cast.pod_z, 8080, cast.node_b)])
    b.service([(None, 30080)], [(cast.pod_z, 8080, None)])
    everyone = "0.0.0.0/0" if cast.family == 4 else "::/0"
    enforce(b, from_peers(block(everyone, host(cast.gateway))), Direction.INGRESS)
    b.pod(cast.pod_z, "podx", ingress=SLOT)
    first = Frame(cast.client, cast.node_a, dport=30080)
    assert b.from_tunnel(a.from_net(first).frame, cast.node_a).verdict == "REDIRECT"
    excepted = first.but(src=cast.gateway)
    assert b.from_tunnel(a.from_net(excepted).frame, cast.node_a).verdict == "DROP"


def test_a_rule_without_ports_lets_ping_through(a: Node, cast: Addresses, enforce: Enforce) -> None:
    four = cast.family == 4
    ping = Frame(
        cast.pod_x, cast.pod_y, ICMP4 if four else ICMP6, icmp=(8 if four else 128, 0, 0x10001)
    )
    a.pod(cast.pod_y, "pody", ingress=SLOT)
    enforce(a, from_peers(pods("x"), ports=(port(80),)), Direction.INGRESS)
    assert a.from_pod(ping, "podx").verdict == "DROP"
    enforce(a, from_peers(pods("x")), Direction.INGRESS)
    assert a.from_pod(ping, "podx").verdict == "REDIRECT"

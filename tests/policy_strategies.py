# SPDX-License-Identifier: Apache-2.0
"""Small random clusters, policies and connections. Few names, so that things often meet."""

from __future__ import annotations

from dataclasses import dataclass

from bpfdp_agent.watch.wire import (
    IPBlock,
    LabelSelector,
    LabelSelectorRequirement,
    NetworkPolicy,
    NetworkPolicyEgressRule,
    NetworkPolicyIngressRule,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    NetworkPolicySpec,
    ObjectMeta,
)
from hypothesis import strategies as st
from policy_reference import NUMBERS, Connection, RefPod

KEYS, VALUES, PORT_NAMES = ("a", "b"), ("x", "y", ""), ("web", "dns")
NAMESPACES = ("one", "two", "three")
PORTS = (1, 52, 53, 54, 80, 81, 443, 8080, 65535)
CIDRS = {
    4: ("0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.1.0/24", "10.1.1.1/32", "10.1.1.128/25",
        "10.1.2.0/23", "192.0.2.0/24", "192.0.2.7/32"),
    6: ("::/0", "fd00::/8", "fd00:1::/32", "fd00:1:0:1::/64", "fd00:1:0:1::1/128",
        "2001:db8::/33", "2001:db8::7/128"),
}  # fmt: skip
ADDRESSES = {
    4: ("10.1.1.1", "10.1.1.2", "10.1.1.129", "10.1.3.9", "10.9.9.9", "192.0.2.7", "192.0.2.8",
        "203.0.113.1"),
    6: ("fd00:1:0:1::1", "fd00:1:0:1::2", "fd00:1:0:2::1", "fd00:2::1", "2001:db8::7",
        "2001:db8:8000::1", "2001:db9::1"),
}  # fmt: skip

labels = st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES), max_size=2)
values = st.lists(st.sampled_from(VALUES), min_size=1, max_size=2, unique=True).map(tuple)
expressions = st.one_of(
    st.builds(
        LabelSelectorRequirement,
        key=st.sampled_from(KEYS),
        operator=st.sampled_from(["In", "NotIn"]),
        values=values,
    ),
    st.builds(
        LabelSelectorRequirement,
        key=st.sampled_from(KEYS),
        operator=st.sampled_from(["Exists", "DoesNotExist"]),
    ),
)
selectors = st.builds(
    LabelSelector,
    match_labels=st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES), max_size=1),
    match_expressions=st.lists(expressions, max_size=1).map(tuple),
)


@st.composite
def ip_blocks(draw: st.DrawFn) -> IPBlock:
    import ipaddress

    cidr = draw(st.sampled_from(CIDRS[draw(st.sampled_from([4, 6]))]))
    outer = ipaddress.ip_network(cidr)
    inside = [
        c
        for c in CIDRS[outer.version]
        if c != cidr and ipaddress.ip_network(c).subnet_of(outer)  # type: ignore[arg-type]
    ]
    excepts = draw(st.lists(st.sampled_from(inside), max_size=2, unique=True)) if inside else []
    return IPBlock(cidr=cidr, except_=tuple(excepts))


peers = st.one_of(
    st.builds(NetworkPolicyPeer, pod_selector=selectors),
    st.builds(NetworkPolicyPeer, namespace_selector=selectors),
    st.builds(NetworkPolicyPeer, pod_selector=selectors, namespace_selector=selectors),
    st.builds(NetworkPolicyPeer, ip_block=ip_blocks()),
)


@st.composite
def policy_ports(draw: st.DrawFn) -> NetworkPolicyPort:
    protocol = draw(st.sampled_from(list(NUMBERS)))
    port = draw(st.one_of(st.none(), st.sampled_from(PORTS), st.sampled_from(PORT_NAMES)))
    end = None
    if isinstance(port, int) and draw(st.booleans()):
        end = draw(st.sampled_from([p for p in PORTS if p >= port]))
    return NetworkPolicyPort(protocol=protocol, port=port, end_port=end)


def _rules(least: int) -> tuple[st.SearchStrategy, st.SearchStrategy]:
    """Ingress and egress rules with at least so many peers and ports (none mean: all)."""
    peer_lists = st.lists(peers, min_size=least, max_size=3).map(tuple)
    port_lists = st.lists(policy_ports(), min_size=least, max_size=3).map(tuple)
    return (
        st.builds(NetworkPolicyIngressRule, from_=peer_lists, ports=port_lists),
        st.builds(NetworkPolicyEgressRule, to=peer_lists, ports=port_lists),
    )


ingress_rules, egress_rules = _rules(0)
narrow_ingress_rules, narrow_egress_rules = _rules(1)


@st.composite
def policy_sets(draw: st.DrawFn) -> list[NetworkPolicy]:
    found = []
    for number in range(draw(st.integers(1, 4))):
        spec = NetworkPolicySpec(
            pod_selector=draw(st.one_of(st.just(LabelSelector()), selectors)),
            policy_types=draw(
                st.sampled_from([(), ("Ingress",), ("Egress",), ("Ingress", "Egress")])
            ),
            ingress=draw(st.lists(ingress_rules, max_size=2).map(tuple)),
            egress=draw(st.lists(egress_rules, max_size=2).map(tuple)),
        )
        namespace = draw(st.sampled_from(NAMESPACES[:2]))
        meta = ObjectMeta(name=f"p{number}", namespace=namespace)
        found.append(NetworkPolicy(metadata=meta, spec=spec))
    return found


@st.composite
def narrow_policies(draw: st.DrawFn) -> list[NetworkPolicy]:
    """Isolate every pod of namespace "one" both ways, with rules that allow some things only."""
    spec = NetworkPolicySpec(
        policy_types=("Ingress", "Egress"),
        ingress=draw(st.lists(narrow_ingress_rules, min_size=2, max_size=4).map(tuple)),
        egress=draw(st.lists(narrow_egress_rules, min_size=2, max_size=4).map(tuple)),
    )
    return [NetworkPolicy(metadata=ObjectMeta(name="narrow", namespace="one"), spec=spec)]


pod_ports = st.dictionaries(
    st.tuples(st.sampled_from(PORT_NAMES), st.sampled_from(list(NUMBERS))),
    st.sampled_from(PORTS),
    max_size=3,
)


@dataclass(frozen=True)
class World:
    """Namespaces, pods (each with an address of the family) and policies."""

    family: int
    namespaces: dict[str, dict[str, str]]
    pods: tuple[RefPod, ...]
    policies: list[NetworkPolicy]


@st.composite
def worlds(draw: st.DrawFn, family: int | None = None, *, narrow: bool = False) -> World:
    """`narrow`: the first pod is isolated both ways, by rules that allow some things only."""
    family = family or draw(st.sampled_from([4, 6]))
    addresses = draw(st.permutations(ADDRESSES[family]))[:4]
    namespaces = [draw(st.sampled_from(NAMESPACES)) for _ in addresses]
    if narrow:
        namespaces[0] = "one"
    pods = tuple(
        RefPod(namespace, draw(labels), address, draw(pod_ports))
        for namespace, address in zip(namespaces, addresses, strict=True)
    )
    labels_of = {name: draw(labels) for name in NAMESPACES}
    return World(family, labels_of, pods, draw(narrow_policies() if narrow else policy_sets()))


def connections(world: World, pod: RefPod, direction: str) -> list[Connection]:
    """Every address, protocol and interesting port that the pod could meet."""
    by_address = {p.address: p for p in world.pods}
    found = []
    for address in ADDRESSES[world.family]:
        other = by_address.get(address)
        if other is pod:
            continue
        destination = pod if direction == "ingress" else other
        for protocol in (6, 17, 132, 1, 58, 47):
            for port in PORTS if protocol in NUMBERS.values() else (0,):
                found.append(Connection(address, other, protocol, port, destination))
    return found

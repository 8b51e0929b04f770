# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ipaddress

import pytest
from bpfdp_agent.desired.identities import Identity
from bpfdp_agent.desired.policy import PolicyRefused, normal_rules, read_policy
from bpfdp_agent.desired.policyprogram import Membership, Program, program_of
from bpfdp_agent.desired.programspec import mask_of
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
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_reference import NUMBERS, RefPod, allowed, isolates
from policy_simulator import permits
from policy_strategies import World, connections, labels, worlds

WEB = LabelSelector(match_labels={"app": "web"})
PROD = LabelSelector(match_labels={"env": "prod"})


def identity(pod: RefPod) -> Identity:
    ports = tuple(NamedPort(n, NUMBERS[p], number) for (n, p), number in pod.ports.items())
    return Identity(pod.namespace, tuple(sorted(pod.labels.items())), ports)


def program(
    *rules: NetworkPolicyIngressRule | NetworkPolicyEgressRule,
    name: str = "p",
    namespace: str = "shop",
) -> Program:
    ingress = tuple(r for r in rules if isinstance(r, NetworkPolicyIngressRule))
    egress = tuple(r for r in rules if isinstance(r, NetworkPolicyEgressRule))
    policy = NetworkPolicy(
        metadata=ObjectMeta(name=name, namespace=namespace),
        spec=NetworkPolicySpec(ingress=ingress, egress=egress),
    )
    direction = Direction.EGRESS if egress else Direction.INGRESS
    return program_of(normal_rules([read_policy(policy)], direction, []))


def from_blocks(*blocks: IPBlock) -> NetworkPolicyIngressRule:
    return NetworkPolicyIngressRule(from_=tuple(NetworkPolicyPeer(ip_block=b) for b in blocks))


# -- differential -----------------------------------------------------------------------------


def check(world: World) -> None:
    """Every pod, direction and connection: the program with its maps against the reference."""
    rules = {p.key: read_policy(p) for p in world.policies}
    assert not any(r.problems for r in rules.values())
    membership = Membership()
    numbers = {pod.address: i + 1 for i, pod in enumerate(world.pods)}
    for name, found in world.namespaces.items():
        membership.set_namespace(name, found)
    for pod in world.pods:
        membership.set_identity(numbers[pod.address], identity(pod))
    for pod in world.pods[:2]:
        for direction in Direction:
            selecting = [rules[p.key] for p in world.policies if isolates(p, pod, direction)]
            if not selecting:
                continue
            built = program_of(normal_rules(selecting, direction, identity(pod).ports))
            values = membership.add_program(built)
            for connection in connections(world, pod, direction):
                number = numbers.get(connection.peer_address, 0)
                verdict = permits(
                    built.spec,
                    values.get(number),
                    connection.peer_address,
                    connection.protocol,
                    connection.port,
                )
                wanted = allowed(world.policies, world.namespaces, pod, direction, connection)
                assert verdict == wanted, (pod, direction, connection)


@settings(max_examples=150, deadline=None)
@given(worlds())
def test_programs_agree_with_the_reference(world):
    check(world)


@settings(max_examples=100, deadline=None)
@given(worlds(narrow=True))
def test_programs_of_narrow_rules_agree_with_the_reference(world):
    check(world)


@settings(max_examples=100, deadline=None)
@given(worlds(), st.lists(st.tuples(st.sampled_from(["one", "two", "three"]), labels), max_size=4))
def test_deltas_add_up_to_the_whole(world, changes):
    """Programs first, then pods and namespaces come, change and go: maps equal a fresh build."""
    rules = [read_policy(p) for p in world.policies]
    programs = [program_of(normal_rules(rules, d, [])) for d in Direction]
    membership = Membership()
    maps = {p.spec.key: membership.add_program(p) for p in programs}

    def take(deltas):
        for key, values in deltas.items():
            for number, value in values.items():
                assert maps[key].get(number) != value, "a delta that changes nothing"
                maps[key].pop(number, None)
                if value is not None:
                    maps[key][number] = value

    for number, pod in enumerate(world.pods, 1):
        take(membership.set_identity(number, identity(pod)))
    for name, found in [*world.namespaces.items(), *changes]:
        take(membership.set_namespace(name, found))
    take(membership.delete_identity(1))
    take(membership.delete_identity(1))
    take(membership.set_namespace("two", None))
    for built in programs:
        assert maps[built.spec.key] == membership.values(built)


# -- text and sharing -------------------------------------------------------------------------


def test_equal_rules_written_differently_are_one_program():
    peer = NetworkPolicyPeer(pod_selector=WEB)
    blocks = NetworkPolicyPeer(ip_block=IPBlock(cidr="10.0.0.0/8"))
    one = program(NetworkPolicyIngressRule(from_=(peer, blocks)), name="one")
    two = program(
        NetworkPolicyIngressRule(from_=(blocks,)),
        NetworkPolicyIngressRule(from_=(peer,)),
        name="two",
    )
    assert one.spec.key == two.spec.key
    assert one.spec.policies == ("shop/one",)


def test_the_same_selector_in_another_namespace_is_another_program_with_the_same_text():
    rule = NetworkPolicyIngressRule(from_=(NetworkPolicyPeer(pod_selector=WEB),))
    one, two = program(rule), program(rule, namespace="bank")
    assert one.spec.key != two.spec.key
    assert one.spec.every_port == two.spec.every_port


def test_membership_is_no_part_of_the_text():
    built = program(
        NetworkPolicyEgressRule(
            to=(NetworkPolicyPeer(pod_selector=WEB),), ports=(NetworkPolicyPort(port="web"),)
        )
    )
    membership = Membership()
    assert membership.add_program(built) == {}
    ports = (NamedPort("web", 6, 8080),)
    (delta,) = membership.set_identity(7, Identity("shop", (("app", "web"),), ports)).values()
    assert delta == {7: built.spec.identity_value(((0, 1),), [8080])}
    assert membership.set_identity(8, Identity("shop", (("app", "db"),), ())) == {}


def test_ingress_and_egress_are_different_programs():
    peers = (NetworkPolicyPeer(pod_selector=WEB),)
    one = program(NetworkPolicyIngressRule(from_=peers))
    assert one.spec.key != program(NetworkPolicyEgressRule(to=peers)).spec.key


def test_a_program_without_selectors_has_no_identity_map():
    built = program(from_blocks(IPBlock(cidr="10.0.0.0/8")))
    membership = Membership()
    assert not built.spec.by_identity
    assert membership.add_program(built) == {}
    assert membership.set_identity(1, Identity("shop", (("app", "web"),), ())) == {}


def test_a_namespace_change_concerns_programs_that_select_namespaces():
    own = program(NetworkPolicyIngressRule(from_=(NetworkPolicyPeer(pod_selector=WEB),)))
    prod = program(NetworkPolicyIngressRule(from_=(NetworkPolicyPeer(namespace_selector=PROD),)))
    membership = Membership()
    membership.set_identity(1, Identity("shop", (("app", "web"),), ()))
    membership.add_program(own)
    membership.add_program(prod)
    assert membership.set_namespace("shop", {"env": "test"}) == {}
    assert membership.set_namespace("shop", {"env": "prod"}).keys() == {prod.spec.key}
    membership.delete_program(prod.spec.key)
    assert membership.set_namespace("shop", {"env": "test"}) == {}


# -- CIDRs ------------------------------------------------------------------------------------


def test_overlapping_blocks_and_excepts_of_each_other():
    built = program(
        from_blocks(
            IPBlock(cidr="10.0.0.0/8", except_=("10.1.0.0/16",)),
            IPBlock(cidr="10.1.0.0/16", except_=("10.1.2.0/24",)),
            IPBlock(cidr="10.1.2.0/25"),
        )
    )
    masks = {str(ipaddress.ip_network((p.address, p.length))): p.mask for p in built.spec.prefixes4}
    assert masks == {
        "10.0.0.0/8": mask_of([0]),
        "10.1.0.0/16": mask_of([1]),
        "10.1.2.0/24": (),
        "10.1.2.0/25": mask_of([2]),
    }
    assert built.spec.prefixes6 == ()


def test_masks_of_many_peers_span_words():
    blocks = [IPBlock(cidr=f"10.0.{i}.0/24") for i in range(70)]
    spec = program(from_blocks(*blocks)).spec
    assert spec.words == 2
    assert spec.every_port is not None
    assert spec.every_port.mask == ((0, 2**64 - 1), (1, 2**6 - 1))
    assert len({p.mask for p in spec.prefixes4}) == 70


# -- limits -----------------------------------------------------------------------------------


def test_too_many_peers_are_refused_by_name():
    blocks = [IPBlock(cidr=f"10.{i // 250}.{i % 250}.0/24") for i in range(1025)]
    with pytest.raises(PolicyRefused, match=r"shop/p: spec.ingress: needs 1025 different peers"):
        program(from_blocks(*blocks))


def test_too_many_tests_are_refused_by_name():
    peers = (NetworkPolicyPeer(ip_block=IPBlock(cidr="10.0.0.0/8")),)
    ports = tuple(NetworkPolicyPort(port=1 + 2 * i) for i in range(2001))
    with pytest.raises(PolicyRefused, match="needs 2001 port and peer tests, the limit is 2000"):
        program(NetworkPolicyIngressRule(from_=peers, ports=ports))

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ipaddress

import pytest
from bpfdp_agent.desired.policy import (
    ANYTHING,
    Block,
    Pods,
    PolicyRefused,
    PortRange,
    normal_rules,
    read_policy,
)
from bpfdp_agent.model.pods import NamedPort
from bpfdp_agent.model.policies import Direction
from bpfdp_agent.model.selectors import EVERYTHING
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

IN, OUT = Direction.INGRESS, Direction.EGRESS


def ingress(*rules: NetworkPolicyIngressRule, name: str = "p") -> NetworkPolicy:
    meta = ObjectMeta(name=name, namespace="shop")
    return NetworkPolicy(metadata=meta, spec=NetworkPolicySpec(ingress=rules))


def egress(*rules: NetworkPolicyEgressRule) -> NetworkPolicy:
    meta = ObjectMeta(name="p", namespace="shop")
    return NetworkPolicy(metadata=meta, spec=NetworkPolicySpec(egress=rules))


def rule(*peers: NetworkPolicyPeer, ports: tuple = ()) -> NetworkPolicyIngressRule:
    return NetworkPolicyIngressRule(from_=peers, ports=ports)


def port(number: int | str | None = None, end: int | None = None, protocol: str = "TCP"):
    return NetworkPolicyPort(protocol=protocol, port=number, end_port=end)


def block(cidr: str, *excepts: str) -> NetworkPolicyPeer:
    return NetworkPolicyPeer(ip_block=IPBlock(cidr=cidr, except_=excepts))


def pods(**match: str) -> NetworkPolicyPeer:
    return NetworkPolicyPeer(pod_selector=LabelSelector(match_labels=match))


def rules_of(*policies: NetworkPolicy, direction: Direction = IN, ports=()):
    return normal_rules([read_policy(p) for p in policies], direction, ports)


def test_no_rule_denies_everything():
    assert rules_of(ingress()).denies_all


def test_one_empty_rule_allows_everything():
    rules = rules_of(ingress(rule(), rule(block("10.0.0.0/8"), ports=(port(80),))))
    assert rules.allows_all
    assert rules.ranges == ()


def test_a_pod_selector_alone_means_its_own_namespace():
    (peer,) = rules_of(ingress(rule(pods(app="db")))).every_port
    assert isinstance(peer, Pods)
    assert peer.namespace == "shop"


def test_an_empty_namespace_selector_means_all_pods_but_not_anything():
    all_pods = NetworkPolicyPeer(namespace_selector=LabelSelector())
    assert rules_of(ingress(rule(all_pods))).every_port == {Pods("", EVERYTHING, EVERYTHING)}


def test_a_port_without_a_number_is_every_port_of_its_protocol():
    rules = rules_of(ingress(rule(ports=(port(protocol="UDP"),))))
    assert rules.ranges == (PortRange(17, 0, 65535, frozenset([ANYTHING])),)
    assert not rules.allows_all


def test_ranges_become_disjoint_and_neighbours_join():
    ten = Block(ipaddress.ip_network("10.0.0.0/8"))
    (db,) = rules_of(ingress(rule(pods(app="db")))).every_port
    rules = rules_of(
        ingress(
            rule(block("10.0.0.0/8"), ports=(port(80, 89), port(90, 99))),
            rule(pods(app="db"), ports=(port(85, 94),)),
        )
    )
    assert rules.ranges == (
        PortRange(6, 80, 84, frozenset([ten])),
        PortRange(6, 85, 94, frozenset([ten, db])),
        PortRange(6, 95, 99, frozenset([ten])),
    )


def test_what_is_allowed_on_every_port_is_not_repeated():
    rules = rules_of(
        ingress(rule(block("10.0.0.0/8")), rule(block("10.0.0.0/8"), ports=(port(80),)))
    )
    assert rules.ranges == ()


def test_union_does_not_depend_on_order_or_on_how_policies_are_cut():
    one = rule(block("10.0.0.0/8", "10.1.0.0/16", "10.2.0.0/16"), ports=(port(80),))
    other = rule(block("10.0.0.0/8", "10.2.0.0/16", "10.1.0.0/16"), ports=(port(81),))
    assert rules_of(ingress(one, other)) == rules_of(
        ingress(other, name="a"), ingress(one, name="b")
    )


def test_ingress_names_are_the_selected_pods_own():
    named = ingress(rule(ports=(port("web"),)))
    rules = rules_of(named, ports=[NamedPort("web", 6, 8080), NamedPort("web", 17, 53)])
    assert [(r.protocol, r.lo, r.hi) for r in rules.ranges] == [(6, 8080, 8080)]
    assert rules_of(named, ports=[NamedPort("web", 17, 53)]).denies_all


def test_egress_names_stay_names_and_never_apply_to_cidrs():
    named = egress(
        NetworkPolicyEgressRule(to=(pods(app="db"), block("10.0.0.0/8")), ports=(port("sql"),)),
        NetworkPolicyEgressRule(to=(block("10.0.0.0/8"),), ports=(port("web"),)),
    )
    (found,) = rules_of(named, direction=OUT).named
    assert (found.protocol, found.name, len(found.peers)) == (6, "sql", 1)


def test_host_bits_are_masked_as_the_api_server_does():
    (peer,) = rules_of(ingress(rule(block("10.1.2.3/8")))).every_port
    assert peer == Block(ipaddress.ip_network("10.0.0.0/8"))


BAD_LABEL = LabelSelector(match_expressions=(LabelSelectorRequirement(key="v", operator="Gt"),))


@pytest.mark.parametrize(
    ("written", "field", "says"),
    [
        (rule(block("010.0.0.0/8")), "spec.ingress[0].from[0].ipBlock.cidr", "leading zeros"),
        (rule(block("10.0.0.0")), "spec.ingress[0].from[0].ipBlock.cidr", "write a CIDR like"),
        (rule(block("::ffff:10.0.0.0/104")), "spec.ingress[0].from[0].ipBlock.cidr", "as an IPv4"),
        (
            rule(block("10.0.0.0/8", "10.1.0.0/16", "11.0.0.0/16")),
            "spec.ingress[0].from[0].ipBlock.except[1]",
            "must lie inside 10.0.0.0/8",
        ),
        (rule(block("10.0.0.0/8", "::/0")), "spec.ingress[0].from[0].ipBlock.except[0]", "inside"),
        (
            rule(block("10.0.0.0/8", "10.0.0.0/8")),
            "spec.ingress[0].from[0].ipBlock.except[0]",
            "in",
        ),
        (rule(NetworkPolicyPeer()), "spec.ingress[0].from[0]", "names no peer"),
        (
            rule(NetworkPolicyPeer(ip_block=IPBlock(cidr="::/0"), pod_selector=LabelSelector())),
            "spec.ingress[0].from[0]",
            "make them two peers",
        ),
        (
            rule(NetworkPolicyPeer(pod_selector=BAD_LABEL)),
            "spec.ingress[0].from[0].podSelector.matchExpressions[0].operator",
            "'Gt' is unknown",
        ),
        (
            rule(NetworkPolicyPeer(namespace_selector=BAD_LABEL)),
            "spec.ingress[0].from[0].namespaceSelector.matchExpressions[0].operator",
            "'Gt' is unknown",
        ),
        (
            rule(ports=(port(80, protocol="TPC"),)),
            "spec.ingress[0].ports[0].protocol",
            "use one of",
        ),
        (rule(ports=(port(0),)), "spec.ingress[0].ports[0].port", "not within 1..65535"),
        (rule(ports=(port(80, 79),)), "spec.ingress[0].ports[0].endPort", "not within 80..65535"),
        (rule(ports=(port("web", 90),)), "spec.ingress[0].ports[0].endPort", "numeric port"),
        (rule(ports=(port(None, 90),)), "spec.ingress[0].ports[0].endPort", "numeric port"),
    ],
)
def test_what_cannot_be_honoured_is_named_with_its_remedy(written, field, says):
    bad, good = read_policy(ingress(written, name="bad")), read_policy(ingress(name="good"))
    assert [(str(p.policy), p.field) for p in bad.problems] == [("shop/bad", field)]
    with pytest.raises(PolicyRefused, match=says):
        normal_rules([good, bad], IN, [])
    assert normal_rules([good], IN, []).denies_all


def test_every_problem_of_a_policy_is_reported():
    bad = read_policy(ingress(rule(block("x")), rule(), rule(ports=(port(0),))))
    assert [p.field for p in bad.problems] == [
        "spec.ingress[0].from[0].ipBlock.cidr",
        "spec.ingress[2].ports[0].port",
    ]

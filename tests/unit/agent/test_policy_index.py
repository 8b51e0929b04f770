# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from bpfdp_agent.model.policies import Direction, PolicyIndex, read_subject
from bpfdp_agent.watch.wire import (
    LabelSelector,
    LabelSelectorRequirement,
    NetworkPolicy,
    NetworkPolicyEgressRule,
    NetworkPolicySpec,
    ObjectKey,
    ObjectMeta,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_reference import RefPod, isolates
from policy_strategies import NAMESPACES, labels, policy_sets

IN, OUT = Direction.INGRESS, Direction.EGRESS
WEB = ObjectKey("shop", "web")


def policy(name: str = "p", namespace: str = "shop", **spec: object) -> NetworkPolicy:
    meta = ObjectMeta(name=name, namespace=namespace)
    return NetworkPolicy(metadata=meta, spec=NetworkPolicySpec(**spec))


@pytest.mark.parametrize(
    ("types", "egress", "directions"),
    [
        ((), False, {IN}),
        ((), True, {IN, OUT}),
        (("Ingress",), True, {IN}),
        (("Egress",), False, {OUT}),
        (("Ingress", "Egress"), False, {IN, OUT}),
    ],
)
def test_policy_types_and_their_default(types, egress, directions):
    rules = (NetworkPolicyEgressRule(),) if egress else ()
    assert read_subject(policy(policy_types=types, egress=rules)).directions == directions


def test_isolation_is_per_direction_and_namespace():
    index = PolicyIndex()
    index.set_pod(WEB, {"app": "web"})
    index.set_policy(policy("in", policy_types=("Ingress",)))
    index.set_policy(policy("elsewhere", namespace="other"))
    assert index.selecting(WEB, IN) == {ObjectKey("shop", "in")}
    assert index.selecting(WEB, OUT) == frozenset()


def test_changes_touch_the_pods_selected_before_or_now_and_no_others():
    index = PolicyIndex()
    db, cache = ObjectKey("shop", "db"), ObjectKey("shop", "cache")
    for pod in (WEB, db, cache):
        index.set_pod(pod, {"app": pod.name})
    on_web = LabelSelector(match_labels={"app": "web"})
    on_db = LabelSelector(match_labels={"app": "db"})
    assert index.set_policy(policy(pod_selector=on_web)) == {WEB}
    assert index.set_policy(policy(pod_selector=on_db)) == {WEB, db}
    assert index.selecting(WEB, IN) == frozenset()
    assert index.delete_policy(ObjectKey("shop", "p")) == {db}
    assert index.delete_policy(ObjectKey("shop", "p")) == set()


def test_relabelling_says_whether_the_selection_changed():
    index = PolicyIndex()
    index.set_policy(policy(pod_selector=LabelSelector(match_labels={"app": "web"})))
    assert index.set_pod(WEB, {"app": "web"})
    assert not index.set_pod(WEB, {"app": "web", "version": "2"})
    assert index.set_pod(WEB, {"app": "db"})
    assert index.selecting(WEB, IN) == frozenset()
    index.delete_pod(WEB)
    index.delete_pod(WEB)
    assert index.set_policy(policy()) == set()


def test_an_unreadable_selector_fails_closed_and_is_named():
    bad = LabelSelectorRequirement(key="v", operator="Gt", values=("3",))
    subject = read_subject(policy(pod_selector=LabelSelector(match_expressions=(bad,))))
    assert subject.selector.matches({"v": "1"})
    (problem,) = subject.problems
    assert str(problem).startswith(
        "NetworkPolicy shop/p: spec.podSelector.matchExpressions[0].operator: 'Gt' is unknown"
    )


def test_an_unknown_policy_type_isolates_both_ways_and_is_named():
    subject = read_subject(policy(policy_types=("Forward",)))
    assert subject.directions == {IN, OUT}
    assert subject.problems[0].field == "spec.policyTypes"


@settings(max_examples=80, deadline=None)
@given(policy_sets(), policy_sets(), st.lists(st.tuples(st.sampled_from(NAMESPACES), labels)))
def test_index_agrees_with_asking_every_policy(first, second, pods):
    """Whatever the order of arrival, replacement and deletion."""
    index = PolicyIndex()
    keys = [ObjectKey(namespace, f"pod{i}") for i, (namespace, _) in enumerate(pods)]
    for found in first:
        index.set_policy(found)
    for key, (_, found) in zip(keys, pods, strict=True):
        index.set_pod(key, found)
    for found in second:
        index.set_policy(found)
    live = {p.key: p for p in first} | {p.key: p for p in second}
    gone = next(iter(live))
    index.delete_policy(gone)
    del live[gone]
    assert set(index.policies()) == live.keys()
    for key, (namespace, found) in zip(keys, pods, strict=True):
        for direction in Direction:
            pod = RefPod(namespace, found, "")
            wanted = {k for k, p in live.items() if isolates(p, pod, direction)}
            assert index.selecting(key, direction) == wanted

# SPDX-License-Identifier: Apache-2.0
"""Which network policies select a pod, in which direction.

A pod is isolated in a direction when at least one policy of its namespace selects it and lists the
direction. The index answers that from both ends, so that a change touches only the pods it must.
"""

from __future__ import annotations

import enum
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bpfdp_agent.model.selectors import InvalidSelector, Selector, read_selector, read_superset

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from bpfdp_agent.watch.wire import NetworkPolicy, ObjectKey


class Direction(enum.StrEnum):
    """Of the traffic, seen from the selected pod."""

    INGRESS = "ingress"
    EGRESS = "egress"


@dataclass(frozen=True, slots=True)
class Problem:
    """A piece of a policy that cannot be honoured: what, where, and what to write instead."""

    policy: ObjectKey
    field: str
    problem: str

    def __str__(self) -> str:
        return f"NetworkPolicy {self.policy}: {self.field}: {self.problem}"


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom a policy isolates. With problems it is the superset that fails closed."""

    namespace: str
    selector: Selector
    directions: frozenset[Direction]
    problems: tuple[Problem, ...] = ()


def read_subject(policy: NetworkPolicy) -> Subject:
    """The pods of its namespace and the directions a policy isolates."""
    key, problems = policy.key, []
    try:
        selector = read_selector(policy.spec.pod_selector)
    except InvalidSelector as error:
        selector = read_superset(policy.spec.pod_selector)
        problems.append(Problem(key, f"spec.podSelector.{error.field}", error.problem))
    directions = _default_directions(policy)
    if policy.spec.policy_types:
        known = {d.value.capitalize(): d for d in Direction}
        unknown = [t for t in policy.spec.policy_types if t not in known]
        directions = frozenset(known[t] for t in policy.spec.policy_types if t in known)
        if unknown:
            directions = frozenset(Direction)
            problem = f"{unknown[0]!r} is unknown; list Ingress, Egress or both"
            problems.append(Problem(key, "spec.policyTypes", problem))
    return Subject(policy.metadata.namespace, selector, directions, tuple(problems))


def _default_directions(policy: NetworkPolicy) -> frozenset[Direction]:
    """What absent policyTypes mean: Ingress, and Egress where there are egress rules."""
    return frozenset(Direction if policy.spec.egress else [Direction.INGRESS])


class PolicyIndex:
    """Policies and pods (of this node, not host-network, not finished), each finding the other."""

    def __init__(self) -> None:
        self._subjects: dict[ObjectKey, Subject] = {}
        self._policies_of: defaultdict[str, set[ObjectKey]] = defaultdict(set)
        self._labels: dict[ObjectKey, Mapping[str, str]] = {}
        self._pods_of: defaultdict[str, set[ObjectKey]] = defaultdict(set)
        self._selecting: dict[ObjectKey, frozenset[ObjectKey]] = {}
        self._selected: defaultdict[ObjectKey, set[ObjectKey]] = defaultdict(set)

    def set_policy(self, policy: NetworkPolicy) -> set[ObjectKey]:
        """Add or replace a policy; returns the pods to look at again: selected before or now."""
        key, subject = policy.key, read_subject(policy)
        before = self.delete_policy(key)
        self._subjects[key] = subject
        self._policies_of[subject.namespace].add(key)
        now = {
            pod
            for pod in self._pods_of.get(subject.namespace, ())
            if subject.selector.matches(self._labels[pod])
        }
        for pod in now:
            self._selecting[pod] |= {key}
        self._selected[key] = now
        return before | now

    def delete_policy(self, key: ObjectKey) -> set[ObjectKey]:
        """Forget a policy; returns the pods it selected."""
        subject = self._subjects.pop(key, None)
        if subject is None:
            return set()
        _discard(self._policies_of, subject.namespace, key)
        pods = self._selected.pop(key, set())
        for pod in pods:
            self._selecting[pod] -= {key}
        return pods

    def set_pod(self, pod: ObjectKey, labels: Mapping[str, str]) -> bool:
        """Add a pod or its new labels; returns whether other policies select it now."""
        before = self._selecting.get(pod, frozenset())
        now = frozenset(
            key
            for key in self._policies_of.get(pod.namespace, ())
            if self._subjects[key].selector.matches(labels)
        )
        for key in before - now:
            self._selected[key].discard(pod)
        for key in now - before:
            self._selected[key].add(pod)
        self._labels[pod] = labels
        self._pods_of[pod.namespace].add(pod)
        self._selecting[pod] = now
        return before != now

    def delete_pod(self, pod: ObjectKey) -> None:
        """Forget a pod."""
        self._labels.pop(pod, None)
        _discard(self._pods_of, pod.namespace, pod)
        for key in self._selecting.pop(pod, frozenset()):
            self._selected[key].discard(pod)

    def selecting(self, pod: ObjectKey, direction: Direction) -> frozenset[ObjectKey]:
        """The policies that isolate a pod in a direction; none: it is not isolated."""
        return frozenset(
            key
            for key in self._selecting.get(pod, ())
            if direction in self._subjects[key].directions
        )

    def policies(self) -> Iterable[ObjectKey]:
        """Keys of all policies."""
        return self._subjects.keys()


def _discard(index: defaultdict[str, set[ObjectKey]], key: str, member: ObjectKey) -> None:
    members = index.get(key)
    if members is not None:
        members.discard(member)
        if not members:
            del index[key]

# SPDX-License-Identifier: Apache-2.0
"""Which nodes are where: agents' pods, Nodes and BpfNodes put side by side (pure)."""

from __future__ import annotations

import math
from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

from bpfdp_operator import kubeproxy
from bpfdp_operator.reasons import Reason
from bpfdp_operator.world import condition_of, is_true

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bpfdp_operator.world import BpfNode, BpfNodeStatus, Node, Pod, World


STARTING_SECONDS = 60.0
"""An agent on a node not yet served may take this long to become Ready."""
REPLACING_SECONDS = 10.0
"""One that a rollout replaces, or that restarts, finds its programs in place."""


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """One node that runs, or should run, an agent."""

    name: str
    node_ready: bool
    agent_ready: bool
    reported: bool = False
    current: bool = False
    supported: bool | None = None
    unsupported_because: str = ""
    attached: bool = False
    detached: bool = False
    synced: bool = False
    cleared: bool = False
    keeps_kube_proxy: bool = False
    down_seconds: float = 0.0
    error_reason: Reason | None = None
    error_message: str = ""

    @property
    def starting(self) -> bool:
        """Whether the agent is not Ready, and for so short a while that nobody need look."""
        patience = REPLACING_SECONDS if self.attached else STARTING_SECONDS
        return not self.agent_ready and self.down_seconds < patience

    @property
    def serving(self) -> bool:
        """Whether packets go through our programs there, by what the API server says."""
        return self.attached and self.synced

    @property
    def settled(self) -> bool:
        """Whether it serves under the present configuration and its agent lives."""
        return self.serving and self.current and self.agent_ready and self.node_ready


class Survey(msgspec.Struct, frozen=True):
    """All nodes of the rollout, and whether the DaemonSet has placed a pod on each."""

    nodes: tuple[NodeView, ...]
    placed: bool
    updated: int

    @property
    def unsupported(self) -> tuple[NodeView, ...]:
        """Nodes whose kernel lacks a required feature."""
        return tuple(n for n in self.nodes if n.supported is False)

    @property
    def served(self) -> tuple[NodeView, ...]:
        """Nodes that are to be served: all but the unsupported."""
        return tuple(n for n in self.nodes if n.supported is not False)


def survey(world: World) -> Survey:
    """Build the view of every node that has an agent pod or a BpfNode of the rollout."""
    nodes = {n.metadata.name: n for n in world.nodes}
    reports = {b.metadata.name: b for b in world.bpf_nodes}
    pods = {p.spec.node_name for p in world.agent_pods if p.spec.node_name}
    ready = {p.spec.node_name for p in world.agent_pods if p.ready}
    down_for = {p.spec.node_name: _down_seconds(p, world.now) for p in world.agent_pods}
    members = pods | {name for name in reports if name in nodes and in_rollout(world, nodes[name])}
    generation = world.config.metadata.generation if world.config else 0
    placed = _placed(world, len(pods))
    if not placed:
        down_for |= dict.fromkeys(members - pods, 0.0)
    views = tuple(
        _view(
            nodes.get(name),
            reports.get(name),
            name=name,
            agent_ready=name in ready,
            down_seconds=down_for.get(name, math.inf),
            generation=generation,
        )
        for name in sorted(members)
    )
    updated = world.agent.status.updated_number_scheduled if world.agent else 0
    return Survey(views, placed, updated)


def _placed(world: World, pods: int) -> bool:
    """Whether the DaemonSet's present template is on every node that it belongs on."""
    agent = world.agent
    if agent is None or not agent.observed:
        return False
    desired = agent.status.desired_number_scheduled
    return 0 < desired <= min(pods, agent.status.updated_number_scheduled)


def in_rollout(world: World, node: Node) -> bool:
    """Tell whether the agents' nodeSelector chooses that node."""
    selector = world.config.spec.node_agent.node_selector if world.config else {}
    return all(node.metadata.labels.get(key) == value for key, value in selector.items())


def _down_seconds(pod: Pod, now: float) -> float:
    """How long the pod has not been Ready; 0 for one just made and for one being replaced."""
    readiness = condition_of(pod.status.conditions, "Ready")
    if pod.metadata.deletion_timestamp is not None or readiness is None:
        return 0.0
    if readiness.status == "True" or readiness.last_transition_time is None:
        return 0.0
    return now - datetime.fromisoformat(readiness.last_transition_time).timestamp()


def _view(
    node: Node | None,
    report: BpfNode | None,
    *,
    name: str,
    agent_ready: bool,
    down_seconds: float,
    generation: int,
) -> NodeView:
    node_ready = node is None or node.ready
    if report is None:
        return NodeView(
            name=name, node_ready=node_ready, agent_ready=agent_ready, down_seconds=down_seconds
        )
    status = report.status
    conditions = status.conditions
    features = condition_of(conditions, "FeaturesSupported")
    attached = condition_of(conditions, "Attached")
    error = _error(status)
    return NodeView(
        name=name,
        node_ready=node_ready,
        agent_ready=agent_ready,
        reported=True,
        current=status.observed_config_generation >= generation,
        supported=_verdict(features.status) if features else None,
        unsupported_because=features.message if features else "",
        attached=attached is not None and attached.status == "True",
        detached=attached is not None
        and attached.status == "False"
        and attached.reason == Reason.DETACHED,
        synced=is_true(conditions, "ServicesSynced") and is_true(conditions, "PoliciesSynced"),
        cleared=is_true(conditions, "KubeProxyRulesCleared"),
        keeps_kube_proxy=node is not None and kubeproxy.keeps(node),
        down_seconds=down_seconds,
        error_reason=error[0] if error else None,
        error_message=error[1] if error else "",
    )


def _verdict(status: str) -> bool | None:
    return {"True": True, "False": False}.get(status)


def _error(status: BpfNodeStatus) -> tuple[Reason, str] | None:
    """What is wrong on the node now: its lastError, else a condition that says so."""
    error = status.last_error
    if error is not None and error.reason:
        return _reason(error.reason), _error_text(error.object, error.message)
    for condition in status.conditions:
        if condition.status == "False" and condition.reason in _ERRORS:
            return Reason(condition.reason), condition.message
    return None


_ERRORS = frozenset(
    {
        Reason.PROGRAM_REJECTED,
        Reason.TEMPLATE_ERROR,
        Reason.MAP_FULL,
        Reason.INVALID_CONFIGURATION,
        Reason.INVALID_OBJECT,
    }
)


def _reason(text: str) -> Reason:
    """A reason that this version does not know is still shown, as the most general one."""
    try:
        return Reason(text)
    except ValueError:
        return Reason.INVALID_OBJECT


def _error_text(subject: str, message: str) -> str:
    return f"{subject}: {message}" if subject and subject not in message else message


def name_list(names: Iterable[str]) -> str:
    """Join at most three names, then say how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more


def count_nodes(number: int) -> str:
    """Spell `1 node`, `2 nodes`."""
    return f"{number} node" if number == 1 else f"{number} nodes"

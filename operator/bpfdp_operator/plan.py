# SPDX-License-Identifier: Apache-2.0
"""What to do next, given the world (pure).

The plan looks at levels only: whatever step was interrupted, the next pass sees where things stand
and goes on from there. Its order is that of the gates: endpoint, agents, preflight, attached and
synced everywhere, kube-proxy removed; and backwards: kube-proxy back and Ready, then detach.

The status (with the word to the agents) is always written before the actions of the same pass are
carried out. So agents never read `Disabled` while kube-proxy's key is being taken away.
"""

from __future__ import annotations

from typing import Any

import msgspec

from bpfdp_operator import endpoint as endpoints
from bpfdp_operator import kubeproxy, render
from bpfdp_operator.reasons import Reason
from bpfdp_operator.survey import NodeView, Survey, count_nodes, in_rollout, name_list, survey
from bpfdp_operator.world import (
    FINALIZER,
    KEPT_ANNOTATION,
    AgentsMode,
    Config,
    KubeProxyState,
    World,
)

DETACH_SECONDS = 120.0
"""How long a living agent may take to detach."""
DETACH_DEAD_SECONDS = 30.0
"""How long to wait when only agents that are down have not detached."""
FIRST_RETRY_SECONDS = 30.0
LAST_RETRY_SECONDS = 900.0


class AddFinalizer(msgspec.Struct, frozen=True):
    """Hold the config until its traces are gone."""


class RemoveFinalizer(msgspec.Struct, frozen=True):
    """Let the config go."""


class ApplyAgent(msgspec.Struct, frozen=True):
    """Server-side-apply the agents' DaemonSet."""

    manifest: dict[str, Any]
    announced: str = ""


class DeleteAgent(msgspec.Struct, frozen=True):
    """Delete the agents' DaemonSet."""

    left_behind: tuple[str, ...] = ()


class RemoveKubeProxy(msgspec.Struct, frozen=True):
    """Set the nodeSelector key."""


class RestoreKubeProxy(msgspec.Struct, frozen=True):
    """Take the nodeSelector key away."""


class KeepKubeProxy(msgspec.Struct, frozen=True):
    """Label a node so that kube-proxy stays there."""

    node: str


class ReleaseKubeProxy(msgspec.Struct, frozen=True):
    """Take the operator's own label off a node."""

    node: str


class DeleteBpfNode(msgspec.Struct, frozen=True):
    """Delete the report of a node that has no agent any more."""

    node: str


Action = (
    AddFinalizer
    | RemoveFinalizer
    | ApplyAgent
    | DeleteAgent
    | RemoveKubeProxy
    | RestoreKubeProxy
    | KeepKubeProxy
    | ReleaseKubeProxy
    | DeleteBpfNode
)


class Step(msgspec.Struct, frozen=True):
    """Where the sequence stands: `moving` while something is expected to change by itself."""

    moving: bool
    reason: Reason
    message: str


class Problem(msgspec.Struct, frozen=True):
    """Something a user should look at."""

    reason: Reason
    message: str


class Turn(msgspec.Struct, frozen=True):
    """What becomes of kube-proxy in this pass."""

    state: KubeProxyState
    step: Step
    problems: tuple[Problem, ...] = ()
    actions: tuple[Action, ...] = ()


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The decision of one pass."""

    survey: Survey
    kube_proxy: kubeproxy.KubeProxy
    kube_proxy_state: KubeProxyState
    agents_mode: AgentsMode
    endpoint: endpoints.ApiEndpoint | None
    step: Step
    problems: tuple[Problem, ...] = ()
    actions: tuple[Action, ...] = ()


def plan(world: World, config: Config) -> Plan:
    """Decide what to do. `config` is `world.config`, known to be there."""
    seen = survey(world)
    proxy = kubeproxy.observe(world)
    if config.spec.paused and not config.deleting:
        return _paused(world, config, seen, proxy)
    if config.wanted:
        return _enable(world, config, seen, proxy)
    return _disable(world, config, seen, proxy)


def _paused(world: World, config: Config, seen: Survey, proxy: kubeproxy.KubeProxy) -> Plan:
    """Freeze: the word to the agents stays what it was."""
    return Plan(
        survey=seen,
        kube_proxy=proxy,
        kube_proxy_state=_state_said(config) or _state_seen(proxy),
        agents_mode=_mode_said(config),
        endpoint=endpoints.find(world),
        step=Step(False, Reason.PAUSED, "Paused; set spec.paused to false to go on."),
    )


def _state_said(config: Config) -> KubeProxyState | None:
    text = config.status.kube_proxy.state
    return KubeProxyState(text) if text in set(KubeProxyState) else None


def _mode_said(config: Config) -> AgentsMode:
    detach = config.status.agents.mode == AgentsMode.DETACH
    return AgentsMode.DETACH if detach else AgentsMode.ATTACH


def _state_seen(proxy: kubeproxy.KubeProxy) -> KubeProxyState:
    if not proxy.present:
        return KubeProxyState.NOT_FOUND
    return KubeProxyState.DISABLED if proxy.gone else KubeProxyState.RUNNING


# Taking over


def _enable(world: World, config: Config, seen: Survey, proxy: kubeproxy.KubeProxy) -> Plan:
    found = endpoints.find(world)
    actions: list[Action] = []
    if FINALIZER not in config.metadata.finalizers:
        actions.append(AddFinalizer())
    if found is not None:
        actions += _rollout(world, config, found)
    gate = _gate(world, config, seen, found)
    actions += _labels(world, config, seen, proxy)
    if config.spec.kube_proxy_management == "Enabled":
        # Nodes that are to keep kube-proxy get their label in one pass, it goes in a later one.
        labelled = not any(isinstance(action, KeepKubeProxy) for action in actions)
        turn = _take_kube_proxy(
            world, config, proxy, gate or _programmed(seen), ready=gate is None and labelled
        )
    else:
        turn = _leave_kube_proxy(proxy, gate)
    return Plan(
        survey=seen,
        kube_proxy=proxy,
        kube_proxy_state=turn.state,
        agents_mode=AgentsMode.ATTACH,
        endpoint=found,
        step=turn.step,
        problems=turn.problems,
        actions=(*actions, *turn.actions),
    )


def _rollout(world: World, config: Config, found: endpoints.ApiEndpoint) -> list[Action]:
    manifest = render.agent_daemonset(config.spec, found, world.deployment)
    wanted = manifest["metadata"]["annotations"][render.HASH_ANNOTATION]
    present = world.agent.metadata.annotations if world.agent is not None else {}
    if present.get(render.HASH_ANNOTATION) != wanted:
        verb = "Rolling out" if world.agent is None else "Updating"
        return [ApplyAgent(manifest, f"{verb} the agents; API server at {found.text}.")]
    return [ApplyAgent(manifest)] if world.resync else []


def _gate(
    world: World, config: Config, seen: Survey, found: endpoints.ApiEndpoint | None
) -> Step | None:
    """Return the first gate that is not passed, or None when every node is programmed."""
    if _mode_said(config) == AgentsMode.DETACH:
        return Step(True, Reason.ROLLING_OUT, "Telling the agents to attach.")
    if found is None and world.agent is None:
        text = "Waiting for the API server's endpoint; no agent is rolled out before it is known."
        return Step(False, Reason.API_ENDPOINT_UNKNOWN, text)
    if not seen.placed or not seen.nodes:
        return Step(True, Reason.ROLLING_OUT, "Rolling out the agents.")
    silent = [n.name for n in seen.nodes if not n.reported or n.supported is None]
    if silent:
        text = f"Waiting for the preflight report of {name_list(silent)}."
        return Step(True, Reason.ROLLING_OUT, text)
    blocked = seen.unsupported and config.spec.unsupported_nodes == "Block"
    if blocked or not seen.served:
        text = f"Stopped at preflight of {name_list(n.name for n in seen.unsupported)}."
        return Step(False, Reason.KERNEL_UNSUPPORTED, text)
    unsettled = [n for n in seen.served if not n.settled]
    return _unsettled_step(unsettled, len(seen.served)) if unsettled else None


def _unsettled_step(unsettled: list[NodeView], total: int) -> Step:
    done = total - len(unsettled)
    names = name_list(n.name for n in unsettled)
    text = f"{done} of {total} nodes programmed; waiting for {names}."
    alive = any((n.agent_ready or n.starting) and n.node_ready for n in unsettled)
    return Step(alive, Reason.ROLLING_OUT if alive else Reason.AGENT_NOT_READY, text)


def _programmed(seen: Survey) -> Step:
    text = f"{count_nodes(len(seen.served))} programmed."
    return Step(False, Reason.ALL_NODES_PROGRAMMED, text)


def _take_kube_proxy(
    world: World, config: Config, proxy: kubeproxy.KubeProxy, step: Step, *, ready: bool
) -> Turn:
    """Decide about kube-proxy while it is to be removed; `ready` says that every gate is passed."""
    if not proxy.present or proxy.gone:
        return Turn(_state_seen(proxy), step)
    if proxy.removed:
        text = "Waiting for kube-proxy's pods to end."
        if proxy.serving:
            text = f"Waiting for kube-proxy to leave {name_list(proxy.serving)}."
        return Turn(KubeProxyState.REMOVING, Step(True, Reason.KUBE_PROXY_RUNNING, text))
    refusal = _refusal(proxy)
    if refusal is not None:
        owned = refusal.reason == Reason.KUBE_PROXY_MANAGED_EXTERNALLY
        state = KubeProxyState.EXTERNALLY_MANAGED if owned else KubeProxyState.RUNNING
        return Turn(state, step, (refusal,))
    if world.selector_patches > 0 or _state_said(config) in _ONCE_REMOVED:
        return _conflict(world, step, ready=ready)
    if not ready:
        return Turn(KubeProxyState.RUNNING, step)
    step = Step(True, Reason.KUBE_PROXY_RUNNING, "All nodes are programmed; removing kube-proxy.")
    return Turn(KubeProxyState.REMOVING, step, (), (RemoveKubeProxy(),))


_ONCE_REMOVED = (KubeProxyState.DISABLED, KubeProxyState.CONFLICT)


def _conflict(world: World, step: Step, *, ready: bool) -> Turn:
    """kube-proxy came back: say so, and try again ever more rarely rather than fight."""
    text = (
        "kube-proxy runs again: something else changed its nodeSelector. Find what applies the "
        "DaemonSet kube-system/kube-proxy and change it there."
    )
    again = ready and world.selector_patch_age >= _retry_after(world.selector_patches)
    problem = Problem(Reason.KUBE_PROXY_CONFLICT, text)
    return Turn(KubeProxyState.CONFLICT, step, (problem,), (RemoveKubeProxy(),) if again else ())


def _retry_after(patches: int) -> float:
    return min(LAST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2.0 ** min(patches, 10))


def _refusal(proxy: kubeproxy.KubeProxy) -> Problem | None:
    if proxy.owner:
        text = (
            f"kube-proxy's DaemonSet is managed by something else ({proxy.owner}); it is left "
            f"alone. Change it there, or run: {kubeproxy.command('true')}"
        )
        return Problem(Reason.KUBE_PROXY_MANAGED_EXTERNALLY, text)
    if proxy.mode == "ipvs":
        text = (
            "kube-proxy runs in IPVS mode, whose rules cannot be taken over. Set mode to iptables "
            "or nftables in ConfigMap kube-system/kube-proxy and restart its pods."
        )
        return Problem(Reason.KUBE_PROXY_IPVS, text)
    return None


def _leave_kube_proxy(proxy: kubeproxy.KubeProxy, gate: Step | None) -> Turn:
    """Decide about kube-proxy while the dataplane runs and kube-proxy is not ours to remove."""
    if proxy.present and proxy.removed and not proxy.owner:
        step = Step(True, Reason.KUBE_PROXY_RUNNING, "Bringing kube-proxy back.")
        return Turn(KubeProxyState.RESTORING, step, (), (RestoreKubeProxy(),))
    text = "Programmed; spec.kubeProxyManagement leaves kube-proxy to you."
    return Turn(_state_seen(proxy), gate or Step(False, Reason.ALL_NODES_PROGRAMMED, text))


def _labels(world: World, config: Config, seen: Survey, proxy: kubeproxy.KubeProxy) -> list[Action]:
    """Keep kube-proxy on nodes that the dataplane does not serve; release those it serves."""
    if not proxy.present or config.spec.kube_proxy_management != "Enabled":
        return _released(world) if not proxy.removed else []
    views = {n.name: n for n in seen.nodes}
    keeping = proxy.removed or config.spec.unsupported_nodes == "Skip"
    actions: list[Action] = []
    for node in world.nodes:
        view = views.get(node.metadata.name)
        unserved = view.supported is False if view else seen.placed or not in_rollout(world, node)
        if unserved and not kubeproxy.keeps(node) and keeping:
            actions.append(KeepKubeProxy(node.metadata.name))
        elif view is not None and view.settled and KEPT_ANNOTATION in node.metadata.annotations:
            actions.append(ReleaseKubeProxy(node.metadata.name))
    return actions


def _released(world: World) -> list[Action]:
    return [
        ReleaseKubeProxy(node.metadata.name)
        for node in world.nodes
        if KEPT_ANNOTATION in node.metadata.annotations
    ]


# Going back


def _disable(world: World, config: Config, seen: Survey, proxy: kubeproxy.KubeProxy) -> Plan:
    reason = Reason.DELETING if config.deleting else Reason.DISABLED
    turn = _kube_proxy_first(proxy, world, reason)
    mode = _mode_said(config)
    if turn is None:
        mode = AgentsMode.DETACH
        turn = _tear_down(world, config, seen, reason)
    return Plan(
        survey=seen,
        kube_proxy=proxy,
        kube_proxy_state=turn.state,
        agents_mode=mode,
        endpoint=endpoints.find(world),
        step=turn.step,
        problems=turn.problems,
        actions=turn.actions,
    )


def _kube_proxy_first(proxy: kubeproxy.KubeProxy, world: World, reason: Reason) -> Turn | None:
    """Return how kube-proxy comes back before anything detaches; None once nothing is missing."""
    if proxy.removed and proxy.owner and world.agent is not None:
        text = (
            f"kube-proxy must come back first, and is managed by something else ({proxy.owner}). "
            f"Change it there, or run: {kubeproxy.command(None)}"
        )
        problem = Problem(Reason.KUBE_PROXY_MANAGED_EXTERNALLY, text)
        return Turn(KubeProxyState.EXTERNALLY_MANAGED, Step(False, reason, text), (problem,))
    if proxy.removed and not proxy.owner:
        step = Step(True, reason, "Bringing kube-proxy back.")
        return Turn(KubeProxyState.RESTORING, step, (), (RestoreKubeProxy(),))
    if proxy.present and not proxy.ready and world.agent is not None:
        where = f" on {name_list(proxy.waiting)}" if proxy.waiting else ""
        step = Step(True, reason, f"Waiting for kube-proxy to be Ready{where}.")
        return Turn(KubeProxyState.RESTORING, step)
    return None


def _tear_down(world: World, config: Config, seen: Survey, reason: Reason) -> Turn:
    """Detach, then remove the agents, their reports and the labels, then let the config go."""
    state = KubeProxyState.NOT_FOUND if world.kube_proxy is None else KubeProxyState.RUNNING
    if world.agent is not None:
        return _detach(state, world, config, seen, reason)
    if world.agent_pods:
        return Turn(state, Step(True, reason, "Waiting for the agents' pods to end."))
    actions: list[Action] = [DeleteBpfNode(n.metadata.name) for n in world.bpf_nodes]
    actions += _released(world)
    if FINALIZER in config.metadata.finalizers and not actions:
        actions.append(RemoveFinalizer())
    serving = "; kube-proxy serves" if world.kube_proxy is not None else ""
    step = Step(bool(actions), reason, f"The dataplane is off{serving}.")
    return Turn(state, step, (), tuple(actions))


def _detach(
    state: KubeProxyState, world: World, config: Config, seen: Survey, reason: Reason
) -> Turn:
    """Wait for the agents to detach, for the dead ones not long, then remove them."""
    left = [n for n in seen.nodes if not n.detached and n.supported is not False]
    told = _mode_said(config) == AgentsMode.DETACH
    if told and not left:
        step = Step(True, reason, "All nodes are detached; removing the agents.")
        return Turn(state, step, (), (DeleteAgent(),))
    names = name_list(n.name for n in left)
    alive = any(n.agent_ready and n.node_ready for n in left)
    patience = DETACH_SECONDS if alive else DETACH_DEAD_SECONDS
    if told and (world.detaching_for or 0.0) >= patience:
        text = f"Gave up waiting for {names} to detach; run `bpfdp cleanup` there."
        return Turn(
            state, Step(True, reason, text), (), (DeleteAgent(tuple(n.name for n in left)),)
        )
    return Turn(state, Step(True, reason, f"Detaching; waiting for {names or 'the agents'}."))

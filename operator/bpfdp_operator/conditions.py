# SPDX-License-Identifier: Apache-2.0
"""The config's status: what a user reads, aggregated from the world and the plan (pure).

Available, Progressing and Degraded are independent of each other:

- Available: every node that must be served forwards by our programs, and kube-proxy is where the
  spec wants it. An agent that is down does not end it: forwarding goes on without the agent.
- Progressing: something is under way and will change by itself.
- Degraded: somebody should look; the message names the object and the remedy.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from bpfdp_operator import world as w
from bpfdp_operator.plan import Problem
from bpfdp_operator.reasons import Reason
from bpfdp_operator.survey import count_nodes, name_list
from bpfdp_operator.world import KubeProxyState

if TYPE_CHECKING:
    from bpfdp_operator.plan import Plan
    from bpfdp_operator.survey import NodeView, Survey
    from bpfdp_operator.world import Condition, Config, ConfigStatus, World

MESSAGE_LENGTH = 1024
CONDITION_LENGTH = 4096
_REPLACED = (KubeProxyState.DISABLED, KubeProxyState.NOT_FOUND)


class Verdict(msgspec.Struct, frozen=True):
    """A condition before it gets its times."""

    status: str
    reason: Reason
    message: str


def status_of(world: World, config: Config, plan: Plan) -> ConfigStatus:
    """Return the whole status; times of unchanged conditions are kept."""
    problems = problems_of(world, config, plan)
    verdicts = {
        "Available": _available(config, plan),
        "Progressing": _progressing(plan),
        "Degraded": _degraded(problems),
        "PreflightPassed": _preflight(plan),
        "KubeProxyReplaced": _replaced(config, plan),
        "APIServerReachable": _api_server(plan),
    }
    views = plan.survey.nodes
    served = plan.survey.served
    ready = sum(1 for n in served if n.settled)
    reports = [b.status for b in world.bpf_nodes]
    endpoint = plan.endpoint
    return w.ConfigStatus(
        observed_generation=config.metadata.generation,
        conditions=tuple(_condition(world, config, kind, v) for kind, v in verdicts.items()),
        message=_clip(_headline(verdicts), MESSAGE_LENGTH),
        version=world.deployment.version,
        nodes=w.NodesStatus(
            desired=len(views),
            ready=ready,
            updated=plan.survey.updated,
            unsupported=len(plan.survey.unsupported),
            summary=f"{ready}/{len(views)}",
        ),
        kube_proxy=w.KubeProxyStatus(state=plan.kube_proxy_state, mode=plan.kube_proxy.mode),
        api_server=w.ApiServerStatus(
            endpoint=endpoint.text if endpoint else "", source=endpoint.source if endpoint else ""
        ),
        services=max((r.services for r in reports), default=0),
        backends=max((r.backends for r in reports), default=0),
        policies=max((r.policies for r in reports), default=0),
        agents=w.AgentsStatus(mode=plan.agents_mode),
    )


def problems_of(world: World, config: Config, plan: Plan) -> list[Problem]:
    """List what is wrong, the gravest first."""
    found: list[Problem] = []
    if world.refusal:
        text = f"The API server refuses what this spec leads to; change it: {world.refusal}"
        found.append(Problem(Reason.INVALID_CONFIGURATION, text))
    nodes = plan.survey.nodes
    if plan.endpoint is None and config.wanted:
        text = (
            "The API server's endpoint is not known: default/kubernetes has no usable "
            "EndpointSlice. Set spec.apiServer to mode Explicit with host and port."
        )
        found.append(Problem(Reason.API_ENDPOINT_UNKNOWN, text))
    unsupported = plan.survey.unsupported
    if unsupported and config.wanted and config.spec.unsupported_nodes == "Block":
        found.append(Problem(Reason.KERNEL_UNSUPPORTED, unsupported_text(unsupported)))
    found += _node_errors(nodes)
    if config.wanted:
        found += _nodes_down(plan.survey, world.deployment.namespace)
    return found + list(plan.problems)


def unsupported_text(nodes: tuple[NodeView, ...]) -> str:
    """Name the nodes, what the first one lacks, and the two ways out."""
    first = nodes[0].unsupported_because or "a required kernel feature is missing"
    return (
        f"{name_list(n.name for n in nodes)}: {first.rstrip('.')}. Upgrade the kernel, or set "
        "spec.unsupportedNodes to Skip to leave kube-proxy on such nodes."
    )


def _node_errors(nodes: tuple[NodeView, ...]) -> list[Problem]:
    """One problem per reason; its message is the first node's, and says on how many more."""
    by_reason: dict[Reason, list[NodeView]] = {}
    for node in nodes:
        if node.error_reason is not None:
            by_reason.setdefault(node.error_reason, []).append(node)
    found = []
    for reason, where in sorted(by_reason.items()):
        more = f" (and on {count_nodes(len(where) - 1)} more)" if len(where) > 1 else ""
        found.append(Problem(reason, f"{where[0].name}: {where[0].error_message}{more}"))
    return found


def _nodes_down(seen: Survey, namespace: str) -> list[Problem]:
    """Nodes that are not Ready, and agents that are not, each named once."""
    found = []
    dark = [n for n in seen.nodes if not n.node_ready]
    if dark:
        text = f"{count_nodes(len(dark))} not Ready: {name_list(n.name for n in dark)}."
        found.append(Problem(Reason.NODE_NOT_READY, text))
    # An unsupported node's agent has nothing to be ready for. One that starts, for the first time
    # or in a rollout, is given a while.
    down = [n for n in seen.served if n.node_ready and not n.agent_ready if not n.starting]
    if down:
        going_on = "; forwarding goes on" if all(n.attached for n in down) else ""
        text = (
            f"Agent not ready on {name_list(n.name for n in down)}{going_on}. See why: "
            f"kubectl -n {namespace} get pods -l app.kubernetes.io/component=agent -o wide"
        )
        found.append(Problem(Reason.AGENT_NOT_READY, text))
    return found


def _available(config: Config, plan: Plan) -> Verdict:
    if not config.wanted:
        reason = Reason.DELETING if config.deleting else Reason.DISABLED
        return Verdict("False", reason, plan.step.message)
    served = plan.survey.served
    if not served and plan.survey.unsupported:
        text = unsupported_text(plan.survey.unsupported)
        return Verdict("False", Reason.KERNEL_UNSUPPORTED, text)
    missing = [n for n in served if not n.serving]
    if missing or not served or not plan.survey.nodes:
        return _unavailable(plan, missing)
    if plan.survey.unsupported and config.spec.unsupported_nodes == "Block":
        return Verdict(
            "False", Reason.KERNEL_UNSUPPORTED, unsupported_text(plan.survey.unsupported)
        )
    taking = config.spec.kube_proxy_management == "Enabled" and not config.spec.paused
    if taking and not plan.problems:
        replaced = _replaced(config, plan)
        if replaced.status != "True":
            return replaced
    return Verdict("True", Reason.ALL_NODES_PROGRAMMED, _available_text(plan))


def _unavailable(plan: Plan, missing: list[NodeView]) -> Verdict:
    """Say why not every node is served; the step knows while it moves."""
    dark = [n for n in missing if not n.node_ready]
    down = [n for n in missing if n.reported and n.node_ready and not n.agent_ready]
    names = name_list(n.name for n in dark or down or missing)
    if dark:
        return Verdict("False", Reason.NODE_NOT_READY, f"Not served: {names}; not Ready.")
    if down:
        return Verdict("False", Reason.AGENT_NOT_READY, f"Not served: {names}; agent not ready.")
    return Verdict("False", plan.step.reason, plan.step.message)


def _available_text(plan: Plan) -> str:
    count = len(plan.survey.served)
    text = f"{count_nodes(count)} programmed"
    if plan.survey.unsupported:
        text += f", {len(plan.survey.unsupported)} skipped (kube-proxy stays there)"
    endings = {
        KubeProxyState.DISABLED: "; kube-proxy removed.",
        KubeProxyState.NOT_FOUND: "; there is no kube-proxy.",
    }
    return text + endings.get(plan.kube_proxy_state, "; kube-proxy runs beside.")


def _progressing(plan: Plan) -> Verdict:
    return Verdict("True" if plan.step.moving else "False", plan.step.reason, plan.step.message)


def _degraded(problems: list[Problem]) -> Verdict:
    if not problems:
        return Verdict("False", Reason.ALL_NODES_PROGRAMMED, "Nothing is wrong.")
    more = f" (and {len(problems) - 3} more problems)" if len(problems) > 3 else ""
    text = " ".join(p.message for p in problems[:3]) + more
    return Verdict("True", problems[0].reason, text)


def _preflight(plan: Plan) -> Verdict:
    unsupported = plan.survey.unsupported
    if unsupported:
        return Verdict("False", Reason.KERNEL_UNSUPPORTED, unsupported_text(unsupported))
    silent = [n.name for n in plan.survey.nodes if n.supported is None]
    if silent or not plan.survey.nodes:
        where = f" from {name_list(silent)}" if silent else ""
        return Verdict("Unknown", Reason.ROLLING_OUT, f"Waiting for reports{where}.")
    text = f"{count_nodes(len(plan.survey.nodes))} have all required features."
    return Verdict("True", Reason.SUPPORTED, text)


def _replaced(config: Config, plan: Plan) -> Verdict:
    state = plan.kube_proxy_state
    if not config.wanted:
        reason = Reason.DELETING if config.deleting else Reason.DISABLED
        return Verdict("False", reason, "kube-proxy serves, or is coming back.")
    if state == KubeProxyState.NOT_FOUND:
        return Verdict("True", Reason.KUBE_PROXY_NOT_FOUND, "There is no kube-proxy.")
    if state == KubeProxyState.DISABLED:
        return _cleared(plan)
    if plan.problems:
        return Verdict("False", plan.problems[0].reason, plan.problems[0].message)
    managed = config.spec.kube_proxy_management == "Enabled"
    text = plan.step.message if managed else "spec.kubeProxyManagement is Disabled."
    return Verdict("False", Reason.KUBE_PROXY_RUNNING if managed else Reason.DISABLED, text)


def _cleared(plan: Plan) -> Verdict:
    served = [n for n in plan.survey.served if n.attached]
    dirty = [n.name for n in served if not n.cleared and not n.keeps_kube_proxy]
    if dirty:
        text = f"kube-proxy is gone; clearing its rules on {name_list(dirty)}."
        return Verdict("False", Reason.NOT_CLEARED, text)
    kept = [n.name for n in served if n.keeps_kube_proxy]
    where = f", except on {name_list(kept)}, by label" if kept else ""
    return Verdict("True", Reason.KUBE_PROXY_REMOVED, f"kube-proxy and its rules are gone{where}.")


def _api_server(plan: Plan) -> Verdict:
    if plan.endpoint is None:
        text = "No usable endpoint of default/kubernetes; set spec.apiServer to mode Explicit."
        return Verdict("False", Reason.API_ENDPOINT_UNKNOWN, text)
    text = f"{plan.endpoint.text} ({plan.endpoint.source})"
    return Verdict("True", Reason.API_ENDPOINT_KNOWN, text)


def _headline(verdicts: dict[str, Verdict]) -> str:
    """The one line: what is wrong, else what is under way, else what there is."""
    for kind in ("Degraded", "Progressing"):
        if verdicts[kind].status == "True":
            return verdicts[kind].message
    if verdicts["Progressing"].reason == Reason.PAUSED:
        return verdicts["Progressing"].message
    return verdicts["Available"].message


def _condition(world: World, config: Config, kind: str, verdict: Verdict) -> Condition:
    old = w.condition_of(config.status.conditions, kind)
    kept = old is not None and old.status == verdict.status and old.last_transition_time
    return w.Condition(
        type=kind,
        status=verdict.status,
        reason=verdict.reason,
        message=_clip(verdict.message, CONDITION_LENGTH),
        last_transition_time=kept or timestamp(world.now),
        observed_generation=config.metadata.generation,
    )


def timestamp(seconds: float) -> str:
    """Spell a time as the API does: RFC 3339, UTC, whole seconds."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def turned(old: ConfigStatus, new: ConfigStatus) -> list[Condition]:
    """List conditions whose status or reason changed: each is worth an Event."""
    before = {c.type: (c.status, c.reason) for c in old.conditions}
    return [
        c
        for c in new.conditions
        if before.get(c.type) != (c.status, c.reason)
        # That nothing is wrong is news only where something was.
        and (c.type in before or (c.type, c.status) != ("Degraded", "False"))
    ]

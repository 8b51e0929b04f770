# SPDX-License-Identifier: Apache-2.0
"""The plan against a model cluster: it gets where it should, from anywhere, and drops no node."""

from __future__ import annotations

import msgspec
import pytest
from bpfdp_operator import plan as p
from bpfdp_operator import world as w
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.control.fakecluster import FakeCluster, FakeNode, cluster, kube_proxy, report, settled


def taken_over(fake: FakeCluster) -> None:
    assert fake.asks_for_label
    assert all(n.attached and not n.proxy_pod for n in fake.nodes)
    assert fake.config is not None
    assert fake.config.status.kube_proxy.state == "Disabled"
    assert fake.status("Available") == "True"
    assert fake.status("KubeProxyReplaced") == "True"
    assert fake.status("Progressing") == "False"


def beside(fake: FakeCluster) -> None:
    assert not fake.asks_for_label
    assert all(n.attached and n.proxy_pod for n in fake.nodes)
    assert fake.status("Available") == "True"
    assert fake.status("KubeProxyReplaced") == "False"


def taken_down(fake: FakeCluster) -> None:
    assert not fake.asks_for_label
    assert fake.agent is None
    assert all(n.proxy_pod and not n.agent_pod and n.report is None for n in fake.nodes)
    assert all(w.KEPT_ANNOTATION not in n.annotations for n in fake.nodes)


def test_takes_over_and_is_then_quiet() -> None:
    fake = cluster()
    fake.settle()
    taken_over(fake)
    world = fake.world()
    assert world.config is not None
    assert p.plan(world, world.config).actions == ()


def test_applies_again_on_resync_only() -> None:
    fake = cluster()
    fake.settle()
    fake.resync = True
    world = fake.world()
    assert world.config is not None
    (action,) = p.plan(world, world.config).actions
    assert isinstance(action, p.ApplyAgent)
    assert not action.announced


def test_leaves_kube_proxy_when_not_asked_to_manage_it() -> None:
    fake = cluster(kube_proxy_management="Disabled")
    fake.settle()
    beside(fake)


def test_deletes_after_takeover() -> None:
    fake = cluster()
    fake.settle()
    fake.delete()
    fake.settle()
    taken_down(fake)
    assert fake.config is None
    assert not any(n.attached for n in fake.nodes)


def test_disabled_keeps_the_config() -> None:
    fake = cluster()
    fake.settle()
    fake.edit(dataplane="Disabled")
    fake.settle()
    taken_down(fake)
    assert fake.config is not None
    assert fake.config.metadata.finalizers == ()
    assert fake.config.status.kube_proxy.state == "Running"
    assert fake.reason("Available") == "Disabled"


def test_status_leaves_disabled_before_the_key_is_taken_away() -> None:
    """Agents clear kube-proxy's rules in state Disabled: it must not be said when rules come back."""
    fake = cluster()
    fake.settle()
    fake.delete()
    fake.operator_pass(crash_after=1)
    assert fake.config is not None
    assert fake.config.status.kube_proxy.state == "Restoring"
    assert fake.asks_for_label


def test_no_agent_detaches_before_kube_proxy_is_ready() -> None:
    fake = cluster()
    fake.settle()
    fake.delete()
    fake.node("node-2").proxy_pod = False
    for _ in range(5):
        fake.operator_pass()
    assert fake.config is not None
    assert fake.config.status.agents.mode == "Attach"
    assert "kube-proxy" in fake.config.status.message


def test_agents_are_not_removed_before_they_were_told_to_detach() -> None:
    """Reports may still say Detached from before the agents were last told to attach."""
    fake = cluster()
    fake.settle()
    fake.edit(dataplane="Disabled")
    fake.settle(3)
    fake.edit(dataplane="Enabled")
    fake.operator_pass()
    fake.daemonset_controller()
    for each in fake.nodes:
        each.report = report(each, 9, cleared=False, detached=True)
    fake.edit(dataplane="Disabled")
    world = fake.world()
    assert world.config is not None
    assert p.DeleteAgent() not in p.plan(world, world.config).actions


def test_nothing_is_removed_while_agents_are_still_told_to_detach() -> None:
    fake = cluster()
    fake.settle()
    fake.edit(dataplane="Disabled")
    while fake.config is not None and fake.config.status.agents.mode != "Detach":
        fake.operator_pass()
        fake.daemonset_controller()
    fake.edit(dataplane="Enabled")
    for each in fake.nodes:
        each.report = report(each, 9, cleared=False)
    world = fake.world()
    assert world.config is not None
    assert p.RemoveKubeProxy() not in p.plan(world, world.config).actions


def test_a_dead_agent_does_not_hold_deletion_for_ever() -> None:
    fake = cluster()
    fake.settle()
    fake.node("node-2").agent_alive = False
    fake.delete()
    fake.settle()
    taken_down(fake)
    assert fake.config is None
    assert fake.node("node-2").attached, "left behind: that node wants `bpfdp cleanup`"


def test_blocks_on_an_unsupported_node() -> None:
    fake = cluster(FakeNode("node-1"), FakeNode("node-2", supported=False))
    fake.settle()
    assert not fake.asks_for_label
    assert fake.reason("Degraded") == "KernelUnsupported"
    assert "node-2" in fake.found("Degraded").message
    assert "tc BPF" in fake.found("Degraded").message
    assert fake.status("Available") == "False"
    assert fake.status("PreflightPassed") == "False"


def test_skips_an_unsupported_node_and_keeps_kube_proxy_there() -> None:
    fake = cluster(
        FakeNode("node-1"), FakeNode("node-2", supported=False), unsupported_nodes="Skip"
    )
    fake.settle()
    assert fake.asks_for_label
    assert fake.node("node-1").attached
    assert not fake.node("node-1").proxy_pod
    assert fake.node("node-2").proxy_pod
    assert fake.status("Available") == "True"
    assert fake.status("KubeProxyReplaced") == "True"
    fake.delete()
    fake.settle()
    taken_down(fake)


def test_a_label_set_by_a_person_stays() -> None:
    fake = cluster()
    fake.node("node-1").labels[w.KUBE_PROXY_LABEL] = "true"
    fake.settle()
    assert fake.node("node-1").proxy_pod
    fake.delete()
    fake.settle()
    assert fake.node("node-1").labels == {w.KUBE_PROXY_LABEL: "true"}


def test_a_node_outside_of_the_rollout_keeps_kube_proxy() -> None:
    fake = cluster(node_agent=w.NodeAgentSpec(node_selector={"bpf": "yes"}))
    for name in ("node-1", "node-2"):
        fake.node(name).labels["bpf"] = "yes"
    world = fake.world()
    assert world.config is not None
    fake.set_proxy_selector({w.KUBE_PROXY_LABEL: "true"})
    world = fake.world()
    assert p.KeepKubeProxy("node-3") in p.plan(world, world.config).actions


def test_paused_changes_nothing_but_deletion_goes_on() -> None:
    fake = cluster()
    fake.settle()
    fake.edit(paused=True, dataplane="Disabled")
    fake.settle(5)
    assert fake.asks_for_label
    assert all(n.attached for n in fake.nodes)
    assert fake.reason("Progressing") == "Paused"
    assert fake.config is not None
    assert fake.config.status.kube_proxy.state == "Disabled"
    fake.delete()
    fake.settle()
    taken_down(fake)


@pytest.mark.parametrize(
    ("labels", "annotations"),
    [
        ({"app.kubernetes.io/managed-by": "Helm"}, {}),
        ({"addonmanager.kubernetes.io/mode": "Reconcile"}, {}),
        ({"kustomize.toolkit.fluxcd.io/name": "x"}, {}),
        ({}, {"argocd.argoproj.io/tracking-id": "x"}),
        ({}, {"meta.helm.sh/release-name": "x"}),
    ],
)
def test_refuses_what_others_own(labels: dict[str, str], annotations: dict[str, str]) -> None:
    fake = cluster()
    fake.proxy = settled(kube_proxy(labels=labels, annotations=annotations), 3)
    fake.settle()
    beside(fake)
    assert fake.config is not None
    assert fake.config.status.kube_proxy.state == "ExternallyManaged"
    assert fake.reason("Degraded") == "KubeProxyManagedExternally"
    assert "kubectl -n kube-system patch daemonset kube-proxy" in fake.found("Degraded").message


def test_goes_on_once_the_owner_has_removed_kube_proxy() -> None:
    fake = cluster()
    fake.proxy = settled(kube_proxy(labels={"app.kubernetes.io/managed-by": "Helm"}), 3)
    fake.settle()
    fake.set_proxy_selector({w.KUBE_PROXY_LABEL: "true"})
    fake.settle()
    taken_over(fake)
    fake.delete()
    fake.settle()
    assert fake.config is not None
    assert fake.asks_for_label
    assert all(n.attached for n in fake.nodes), "nothing detaches while the owner keeps it away"
    assert ":null" in fake.found("Degraded").message


def test_refuses_ipvs() -> None:
    fake = cluster()
    fake.proxy_config = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nmode: ipvs\n"
    fake.settle()
    beside(fake)
    assert fake.reason("Degraded") == "KubeProxyIPVS"
    assert fake.config is not None
    assert fake.config.status.kube_proxy.mode == "ipvs"


def test_without_kube_proxy() -> None:
    fake = cluster()
    fake.proxy = None
    for each in fake.nodes:
        each.proxy_pod = False
    fake.settle()
    assert fake.reason("KubeProxyReplaced") == "KubeProxyNotFound"
    assert fake.status("Available") == "True"
    fake.delete()
    fake.settle()
    assert fake.config is None


def test_kube_proxy_coming_back_is_a_conflict_and_no_fight() -> None:
    fake = cluster()
    fake.settle()
    patches = fake.memory.selector_patches
    for _ in range(40):
        fake.set_proxy_selector({"kubernetes.io/os": "linux"})
        fake.daemonset_controller()
        fake.operator_pass()
    assert fake.config is not None
    assert fake.config.status.kube_proxy.state == "Conflict"
    assert fake.reason("Degraded") == "KubeProxyConflict"
    assert fake.status("Available") == "True"
    # 400 s, and the waits grow 60, 120, 240.
    assert fake.memory.selector_patches - patches <= 3
    fake.memory.selector_patched_at = 0.0
    fake.settle()
    taken_over(fake)


def test_agent_down_is_degraded_and_forwarding_goes_on() -> None:
    fake = cluster()
    fake.settle()
    fake.node("node-2").agent_alive = False
    fake.settle(5)
    assert fake.status("Available") == "True"
    assert fake.reason("Degraded") == "AgentNotReady"
    assert "node-2" in fake.found("Degraded").message
    assert fake.config is not None
    assert fake.config.status.nodes.summary == "2/3"
    assert fake.asks_for_label
    fake.node("node-2").agent_alive = True
    fake.settle(5)
    taken_over(fake)


def test_agent_that_never_came_holds_the_takeover() -> None:
    fake = cluster(FakeNode("node-1"), FakeNode("node-2", agent_alive=False))
    fake.settle(5)
    assert not fake.asks_for_label
    assert fake.status("Available") == "False"
    assert "node-2" in fake.found("Progressing").message


def test_node_not_ready_is_named() -> None:
    fake = cluster()
    fake.settle()
    fake.node("node-3").ready = False
    fake.settle(5)
    assert fake.reason("Degraded") == "NodeNotReady"
    assert fake.status("Available") == "True"


@pytest.mark.parametrize("reason", ["ProgramRejected", "TemplateError", "MapFull", "InvalidObject"])
def test_a_nodes_error_is_shown(reason: str) -> None:
    fake = cluster()
    fake.settle()
    broken = fake.node("node-1").report
    assert broken is not None
    error = w.LastError(reason=reason, message="what happened", object="default/web")
    status = msgspec.structs.replace(broken.status, last_error=error)
    fake.node("node-1").report = msgspec.structs.replace(broken, status=status)
    fake.operator_pass()
    assert fake.reason("Degraded") == reason
    assert fake.found("Degraded").message == "node-1: default/web: what happened"
    assert fake.status("Available") == "True"


def test_no_endpoint_no_rollout() -> None:
    fake = cluster()
    fake.slices = ()
    fake.settle(5)
    assert fake.agent is None
    assert fake.reason("Degraded") == "APIEndpointUnknown"
    assert fake.status("APIServerReachable") == "False"


def test_a_refusal_of_the_api_server_is_shown() -> None:
    fake = cluster()
    fake.memory.refusal = "PATCH …: 422 resources.limits: Invalid value"
    fake.operator_pass()
    assert fake.reason("Degraded") == "InvalidConfiguration"
    assert "resources.limits" in fake.found("Degraded").message


# Any order of events, a crash at any write

MOVES = st.one_of(
    st.tuples(st.just("operator"), st.one_of(st.none(), st.integers(0, 4))),
    st.tuples(st.just("controller"), st.none()),
    st.tuples(st.just("agent"), st.integers(0, 2)),
    st.tuples(st.just("dataplane"), st.sampled_from(["Enabled", "Disabled"])),
    st.tuples(st.just("management"), st.sampled_from(["Enabled", "Disabled"])),
    st.tuples(st.just("down"), st.integers(0, 2)),
    st.tuples(st.just("up"), st.integers(0, 2)),
)
END = st.sampled_from(["Enabled", "Beside", "Disabled", "Deleted"])


def move(fake: FakeCluster, what: str, argument: object) -> None:
    match what, argument:
        case "operator", (None | int()) as crash:
            fake.operator_pass(crash)
        case "controller", _:
            fake.daemonset_controller()
        case "agent", int(index):
            fake.agent_turn(fake.nodes[index])
        case "dataplane", value:
            fake.edit(dataplane=value)
        case "management", value:
            fake.edit(kube_proxy_management=value)
        case "down", int(index):
            fake.nodes[index].agent_alive = False
        case "up", int(index):
            fake.nodes[index].agent_alive = True


@settings(max_examples=80, deadline=None)
@given(taken=st.booleans(), moves=st.lists(MOVES, max_size=40), end=END)
def test_from_any_state_to_the_wanted_one(
    taken: bool, moves: list[tuple[str, object]], end: str
) -> None:
    """After any history it ends where the spec says, and no node was ever without services."""
    fake = cluster()
    if taken:
        fake.settle(10)
    for what, argument in moves:
        move(fake, what, argument)
    for each in fake.nodes:
        each.agent_alive = True
    match end:
        case "Enabled":
            fake.edit(dataplane="Enabled", kube_proxy_management="Enabled")
            fake.settle(80)
            taken_over(fake)
        case "Beside":
            fake.edit(dataplane="Enabled", kube_proxy_management="Disabled")
            fake.settle(80)
            beside(fake)
        case "Disabled":
            fake.edit(dataplane="Disabled")
            fake.settle(80)
            taken_down(fake)
            assert fake.config is not None
        case "Deleted":
            fake.delete()
            fake.settle(80)
            taken_down(fake)
            assert fake.config is None

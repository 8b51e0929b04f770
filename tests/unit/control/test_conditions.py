# SPDX-License-Identifier: Apache-2.0
"""What the status says, and that it is written only when it says something new."""

from __future__ import annotations

import msgspec
from bpfdp_operator import world as w
from bpfdp_operator.conditions import MESSAGE_LENGTH, status_of, turned
from bpfdp_operator.plan import plan
from bpfdp_operator.survey import name_list, survey
from unit.control.fakecluster import FakeCluster, FakeNode, cluster, condition


def now_says(fake: FakeCluster) -> w.ConfigStatus:
    world = fake.world()
    assert world.config is not None
    return status_of(world, world.config, plan(world, world.config))


def test_nothing_new_nothing_written() -> None:
    fake = cluster()
    fake.settle()
    fake.now += 86400
    assert fake.config is not None
    assert now_says(fake) == fake.config.status


def test_transition_time_changes_with_the_status_only() -> None:
    fake = cluster()
    fake.settle()
    before = fake.found("Degraded").last_transition_time
    progressing = fake.found("Progressing").last_transition_time
    fake.node("node-1").agent_alive = False
    fake.operator_pass()
    changed = fake.found("Degraded").last_transition_time
    assert changed != before
    assert fake.found("Progressing").last_transition_time == progressing
    fake.node("node-2").agent_alive = False
    fake.operator_pass()
    assert "node-1, node-2" in fake.found("Degraded").message
    assert fake.found("Degraded").last_transition_time == changed


def test_turned_lists_what_deserves_an_event() -> None:
    old = w.ConfigStatus(conditions=(condition("Available", True), condition("Degraded", False)))
    new = w.ConfigStatus(
        conditions=(
            condition("Available", True, message="other words"),
            condition("Degraded", True, "MapFull"),
        )
    )
    assert [c.type for c in turned(old, new)] == ["Degraded"]
    first = w.ConfigStatus(conditions=(condition("Degraded", False),))
    assert turned(w.ConfigStatus(), first) == []


def test_the_headline_fits_its_column() -> None:
    fake = cluster()
    fake.memory.refusal = "x" * 5000
    status = now_says(fake)
    assert len(status.message) == MESSAGE_LENGTH
    assert status.message.endswith("…")


def test_numbers() -> None:
    fake = cluster(FakeNode("a"), FakeNode("b", supported=False), unsupported_nodes="Skip")
    fake.settle()
    assert fake.config is not None
    status = fake.config.status
    assert status.nodes == w.NodesStatus(
        desired=2, ready=1, updated=2, unsupported=1, summary="1/2"
    )
    assert status.services == 7
    assert status.api_server == w.ApiServerStatus(
        endpoint="192.0.2.10:6443", source="EndpointSlice"
    )
    assert status.agents.mode == "Attach"


def test_an_error_condition_counts_without_a_last_error() -> None:
    fake = cluster()
    fake.settle()
    found = fake.node("node-2").report
    assert found is not None
    rejected = condition("ProgramsLoaded", False, "ProgramRejected", "from_pod_v4: too complex")
    status = msgspec.structs.replace(found.status, conditions=(*found.status.conditions, rejected))
    fake.node("node-2").report = msgspec.structs.replace(found, status=status)
    fake.operator_pass()
    assert fake.reason("Degraded") == "ProgramRejected"
    assert fake.found("Degraded").message == "node-2: from_pod_v4: too complex"


def test_several_problems_are_one_message_and_the_gravest_reason() -> None:
    fake = cluster()
    fake.settle()
    fake.node("node-1").ready = False
    fake.node("node-2").agent_alive = False
    fake.operator_pass()
    assert fake.reason("Degraded") == "NodeNotReady"
    assert "node-1" in fake.found("Degraded").message
    assert "node-2" in fake.found("Degraded").message


def test_an_agent_that_starts_is_no_problem_yet() -> None:
    fake = cluster()
    world = fake.world()
    at = w.Condition(type="Ready", status="False", last_transition_time="2027-01-15T08:00:00Z")
    pod = w.Pod(
        metadata=w.Metadata(name="x"),
        spec=w.PodSpec(node_name="node-1"),
        status=w.PodStatus(conditions=(at,)),
    )
    start = 1_800_000_000.0  # 2027-01-15T08:00:00Z
    for age, starting in ((5.0, True), (100.0, False)):
        later = msgspec.structs.replace(world, agent_pods=(pod,), now=start + age)
        assert survey(later).nodes[0].starting is starting


def test_a_pod_that_ends_is_being_replaced() -> None:
    fake = cluster()
    fake.settle()
    first, *others = fake.world().agent_pods
    metadata = msgspec.structs.replace(first.metadata, deletion_timestamp="2027-01-15T08:00:00Z")
    ending = msgspec.structs.replace(first, metadata=metadata)
    world = msgspec.structs.replace(fake.world(), agent_pods=(ending, *others))
    assert not survey(world).nodes[0].agent_ready
    assert survey(world).nodes[0].starting


def test_one_whose_pod_is_gone_for_good_is_down() -> None:
    fake = cluster()
    fake.settle()
    world = msgspec.structs.replace(fake.world(), agent_pods=fake.world().agent_pods[1:])
    assert fake.agent is not None
    status = msgspec.structs.replace(fake.agent.status, desired_number_scheduled=2)
    agent = msgspec.structs.replace(fake.agent, status=status)
    assert not survey(msgspec.structs.replace(world, agent=agent)).nodes[0].starting
    assert survey(world).nodes[0].starting, "the DaemonSet is about to replace it"


def test_an_agent_being_replaced_is_no_problem_and_one_that_fell_is() -> None:
    fake = cluster()
    fake.settle()
    fake.node("node-1").agent_pod = False
    fake.operator_pass()
    assert fake.status("Degraded") == "False"
    assert fake.status("Progressing") == "True"
    fake.daemonset_controller()
    fake.node("node-1").agent_alive = False
    fake.operator_pass()
    assert fake.reason("Degraded") == "AgentNotReady"


def test_a_node_that_keeps_kube_proxy_by_label_holds_nothing_up() -> None:
    fake = cluster(FakeNode("a"), FakeNode("b", labels={w.KUBE_PROXY_LABEL: "true"}))
    fake.settle()
    assert fake.node("b").proxy_pod
    assert fake.status("Available") == "True"
    replaced = fake.found("KubeProxyReplaced")
    assert replaced.status == "True"
    assert replaced.message == "kube-proxy and its rules are gone, except on b, by label."
    fake.edit(kube_proxy_management="Disabled")
    fake.settle()
    assert fake.node("b").labels, "a label that a person set stays"


def test_names_are_cut_at_three() -> None:
    assert name_list(["b", "a"]) == "a, b"
    assert name_list("edcba") == "a, b, c and 2 more"

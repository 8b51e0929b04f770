# SPDX-License-Identifier: Apache-2.0
"""`kubectl get bpfdataplanes` tells the truth: all well, an agent down, a node without a feature."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cluster import dataplane
from cluster.dataplane import conditions, get, wait_for
from cluster.places import POD, Places
from cluster.probes import Request, ask_one
from cluster.testbed import Testbed

AGENTS = "app.kubernetes.io/component=agent"


def columns(bed: Testbed) -> dict[str, str]:
    """The columns a user reads."""
    head, row = bed.kubectl("get", "bpfdataplanes").splitlines()[:2]
    starts = [(name, head.index(name)) for name in head.split()]
    ends = [s for _, s in starts[1:]] + [len(row)]
    return {n: row[s:e].strip() for (n, s), e in zip(starts, ends, strict=True)}


def agent_pids(bed: Testbed, node: str) -> list[str]:
    """Process ids of a node's agent: those in the node's network namespace."""
    script = (
        "for p in $(pgrep -f '[b]pfdp agent'); do"
        ' [ "$(readlink /proc/$p/ns/net)" = "$(readlink /proc/self/ns/net)" ] && echo $p; done; true'
    )
    return bed.node_exec(node, ["sh", "-c", script]).stdout.split()


@contextmanager
def frozen_agent(bed: Testbed, node: str) -> Iterator[None]:
    """The agent of a node does nothing for the block, as if hung; its probes fail."""
    pids = agent_pids(bed, node)
    assert pids
    bed.node_exec(node, ["kill", "-STOP", *pids])
    try:
        yield
    finally:
        bed.node_exec(node, ["sh", "-c", f"kill -CONT {' '.join(pids)} 2>/dev/null; true"])


@contextmanager
def agent_environment(bed: Testbed, **values: str) -> Iterator[None]:
    """The agents run with extra environment variables for the block."""
    target = ("-n", dataplane.NAMESPACE, "set", "env", "daemonset/bpfdp-agent")
    bed.kubectl(*target, *(f"{k}={v}" for k, v in values.items()))
    try:
        yield
    finally:
        bed.kubectl(*target, *(f"{k}-" for k in values))
        bed.kubectl(
            "-n", dataplane.NAMESPACE, "rollout", "status", "daemonset/bpfdp-agent",
            "--timeout=180s",
        )  # fmt: skip


def test_all_is_well(shop: Places) -> None:
    dataplane.wait_available(shop.bed)
    seen = columns(shop.bed)
    nodes = len(shop.nodes)
    assert (seen["AVAILABLE"], seen["PROGRESSING"], seen["DEGRADED"]) == ("True", "False", "False")
    assert seen["NODES"] == f"{nodes}/{nodes}"
    assert seen["KUBE-PROXY"] == "Disabled"
    assert seen["MODE"] == "Tunnel"


def test_bpfnodes_report_what_they_found(shop: Places) -> None:
    for node in shop.nodes:
        status = get(shop.bed, f"bpfnodes/{node}")["status"]
        assert status["kernel"]
        assert all(f["supported"] for f in status["features"] if f["name"] != "tcx")
        assert status["pods"] > 0
        assert status["services"] > 0


def test_events_tell_the_steps(shop: Places) -> None:
    events = get(
        shop.bed, "events", "-A", "--field-selector", "involvedObject.kind=BpfDataplaneConfig"
    )["items"]
    assert {"KubeProxyRemoved"} <= {e["reason"] for e in events}


def test_agent_down_is_degraded_and_forwards_on(shop: Places) -> None:
    node = shop.nodes[0]
    service = shop.service(f"web-{shop.nodes[1]}")
    with frozen_agent(shop.bed, node):
        wait_for(
            "Degraded with the node's name",
            lambda: (
                conditions(shop.bed).get("Degraded", {}).get("status") == "True"
                and node in conditions(shop.bed)["Degraded"]["message"]
            ),
            90,
        )
        assert columns(shop.bed)["DEGRADED"] == "True"
        request = Request("tcp", service.addresses[4], service.ports["tcp"])
        assert ask_one(shop.place(POD), request).arrived, "forwarding does not need the agent"
    dataplane.wait_available(shop.bed)


def test_a_node_without_a_feature_is_named(shop: Places) -> None:
    bed, node = shop.bed, shop.nodes[1]
    with agent_environment(bed, BPFDP_FAKE_MISSING_FEATURES=f"lpm_trie@{node}"):
        found = wait_for(
            "PreflightPassed to be False",
            lambda: (
                (c := conditions(bed)).get("PreflightPassed", {}).get("status") == "False"
                and node in c["PreflightPassed"]["message"]
                and c
            ),
            120,
        )
        assert found["PreflightPassed"]["reason"] == "KernelUnsupported"
        assert "lpm_trie" in found["PreflightPassed"]["message"]
        assert found["Degraded"]["status"] == "True"
        service = shop.service(f"web-{node}")
        request = Request("tcp", service.addresses[4], service.ports["tcp"])
        assert ask_one(shop.place(POD), request).arrived, "the last good programs forward on"
    dataplane.wait_available(bed)

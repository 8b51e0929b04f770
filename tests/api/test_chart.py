# SPDX-License-Identifier: Apache-2.0
"""The chart in a real API server: its objects are accepted, and its rights are enough and no more.

Operator and hooks run for real, with the tokens of the chart's ServiceAccounts. Nothing schedules
pods here; kube-proxy's DaemonSet and a node are only objects.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]
NAMESPACE = "bpf-dataplane"
SPEC = {
    "kubeProxyManagement": "Enabled",
    "apiServer": {"mode": "Explicit", "host": "192.0.2.1", "port": 6443},
}


def eventually(what: str, probe: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not probe():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def installed(api: Any, program: Callable[[str], str]) -> Any:
    """The API server with everything the chart renders, hooks included, as Helm would send it."""
    rendered = subprocess.run(
        [
            program("helm"), "template", "bpf-dataplane", str(REPO / "charts" / "bpf-dataplane"),
            "-n", NAMESPACE, "--kube-version", "1.36.0",
        ],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    api.kubectl("create", "namespace", NAMESPACE)
    result = api.kubectl("apply", "--server-side", "-f", "-", stdin=rendered)
    assert result.returncode == 0, result.stderr
    assert "unknown field" not in result.stderr
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1"}}
    assert api.apply(node).returncode == 0
    return api


def token(api: Any, account: str, *flags: str) -> str:
    result = api.kubectl("create", "token", account, "-n", NAMESPACE, *flags)
    assert result.returncode == 0, result.stderr
    text: str = result.stdout.strip()
    return text


def as_account(api: Any, account: str) -> dict[str, str]:
    """Environment in which our programs act as one of the chart's ServiceAccounts."""
    bearer = api.bearer(token(api, account), account)
    return {
        **os.environ,
        "KUBECONFIG": str(bearer.kubeconfig),
        "PYTHONPATH": str(REPO / "operator"),
        "POD_NAMESPACE": NAMESPACE,
        "BPFDP_DEFAULT_SPEC": json.dumps(SPEC),
        "BPFDP_CRDS": str(REPO / "crds"),
    }


def start_hook(api: Any, command: str, account: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bpfdp_operator", "hook", command],
        env=as_account(api, account),
        stderr=subprocess.PIPE,
        text=True,
    )


def run_hook(api: Any, command: str, account: str) -> str:
    hook = start_hook(api, command, account)
    _, log = hook.communicate(timeout=60)
    assert hook.returncode == 0, log
    return log


@pytest.fixture
def agent(installed: Any) -> Any:
    """The API server as seen by the agent in a pod on node-1."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "agent-1", "namespace": NAMESPACE},
        "spec": {
            "nodeName": "node-1",
            "serviceAccountName": "bpfdp-agent",
            "containers": [{"name": "agent", "image": "none"}],
        },
    }
    assert installed.apply(pod).returncode == 0
    bound = ("--bound-object-kind", "Pod", "--bound-object-name", "agent-1")
    return installed.bearer(token(installed, "bpfdp-agent", *bound), "agent")


def bpf_node(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "bpfdataplane.io/v1alpha1",
        "kind": "BpfNode",
        "metadata": {"name": name},
    }


class TestAgent:
    def test_writes_the_bpfnode_of_its_own_node(self, agent: Any) -> None:
        result = agent.apply(bpf_node("node-1"))
        assert result.returncode == 0, result.stderr
        result = agent.apply_status(bpf_node("node-1") | {"status": {"kernel": "6.18.0"}})
        assert result.returncode == 0, result.stderr

    def test_may_not_write_another_nodes(self, agent: Any, installed: Any) -> None:
        denied = (
            "the agent of node 'node-1' may write only the BpfNode of its own node, not 'node-2'"
        )
        # A policy takes effect some moments after it was written.
        eventually(
            "the policy", lambda: denied in agent.apply(bpf_node("node-2"), dry_run=True).stderr
        )
        assert denied in agent.apply(bpf_node("node-2")).stderr
        assert installed.apply(bpf_node("node-2")).returncode == 0
        result = agent.apply_status(bpf_node("node-2") | {"status": {"kernel": "faked"}})
        assert denied in result.stderr

    @pytest.mark.parametrize(
        ("verb", "what", "allowed"),
        [
            ("list", "services", "yes"),
            ("watch", "endpointslices.discovery.k8s.io", "yes"),
            ("watch", "networkpolicies.networking.k8s.io", "yes"),
            ("watch", "servicecidrs.networking.k8s.io", "yes"),
            ("watch", "bpfdataplanes", "yes"),
            ("list", "pods", "yes"),
            ("get", "nodes/node-1", "yes"),
            ("create", "events", "yes"),
            ("patch", "bpfdataplanes/default", "no"),
            ("delete", "bpfnodes/node-1", "no"),
            ("list", "secrets", "no"),
            ("patch", "nodes/node-1", "no"),
            ("patch", "pods", "no"),
            ("list", "configmaps", "no"),
        ],
    )
    def test_may_do_this_and_not_that(self, agent: Any, verb: str, what: str, allowed: str) -> None:
        result = agent.kubectl("auth", "can-i", verb, what)
        assert result.stdout.strip().splitlines()[-1] == allowed, result.stderr


class TestOperator:
    @pytest.mark.parametrize(
        ("verb", "what", "namespace", "allowed"),
        [
            ("patch", "daemonsets.apps/kube-proxy", "kube-system", "yes"),
            ("patch", "daemonsets.apps/other", "kube-system", "no"),
            ("delete", "daemonsets.apps/kube-proxy", "kube-system", "no"),
            ("patch", "daemonsets.apps/bpfdp-agent", NAMESPACE, "yes"),
            ("patch", "daemonsets.apps/other", NAMESPACE, "no"),
            ("get", "configmaps/kube-proxy", "kube-system", "yes"),
            ("get", "configmaps/other", "kube-system", "no"),
            ("list", "pods", "kube-system", "yes"),
            ("list", "pods", "default", "no"),
            ("list", "secrets", NAMESPACE, "no"),
            ("create", "bpfdataplanes", "default", "no"),
        ],
    )
    def test_may_do_this_and_not_that(
        self, installed: Any, verb: str, what: str, namespace: str, allowed: str
    ) -> None:
        operator = installed.bearer(token(installed, "bpfdp-operator"), "operator")
        result = operator.kubectl("auth", "can-i", verb, what, "-n", namespace)
        assert result.stdout.strip().splitlines()[-1] == allowed, result.stderr


# In a pod it has the port of its probe to itself; here another test may have it.
RUN_OPERATOR = """
import socket
import bpfdp_operator.__main__ as operator
with socket.socket() as sock:
    sock.bind(("127.0.0.1", 0))
    operator.HEALTH = f"http://127.0.0.1:{sock.getsockname()[1]}/healthz"
operator.main([])
"""

LINUX = {"kubernetes.io/os": "linux"}
KUBE_PROXY = {
    "apiVersion": "apps/v1",
    "kind": "DaemonSet",
    "metadata": {"name": "kube-proxy", "namespace": "kube-system"},
    "spec": {
        "selector": {"matchLabels": {"k8s-app": "kube-proxy"}},
        "template": {
            "metadata": {"labels": {"k8s-app": "kube-proxy"}},
            "spec": {
                "nodeSelector": LINUX | {"bpfdataplane.io/kube-proxy": "true"},
                "containers": [{"name": "kube-proxy", "image": "none"}],
            },
        },
    },
}


@pytest.fixture
def operator(installed: Any, tmp_path: Path) -> Iterator[Callable[[], str]]:
    """The operator, running with its own rights until it is stopped; called, it ends with its log."""
    log = tmp_path / "operator.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN_OPERATOR],
            env=as_account(installed, "bpfdp-operator"),
            stdout=stream,
            stderr=stream,
        )

    def stop() -> str:
        process.kill()
        process.wait()
        return log.read_text()

    yield stop
    stop()


def test_hooks_and_operator_have_the_rights_they_need(
    installed: Any, operator: Callable[[], str]
) -> None:
    """Install, operator, then uninstall with the operator dead: each step with its own account."""
    assert installed.apply(KUBE_PROXY).returncode == 0
    assert "CRD applied" in run_hook(installed, "apply-crds", "bpfdp-hook-crds")
    run_hook(installed, "create-default", "bpfdp-hook-default")
    assert installed.get("bpfdp", "default")["spec"]["apiServer"] == SPEC["apiServer"]
    assert "left as it is" in run_hook(installed, "create-default", "bpfdp-hook-default")

    def agents_applied() -> bool:
        found = installed.kubectl("get", "daemonset", "bpfdp-agent", "-n", NAMESPACE, "-o", "yaml")
        return found.returncode == 0 and "192.0.2.1" in found.stdout

    try:
        eventually("the agents' DaemonSet", agents_applied)
    except AssertionError as error:
        pytest.fail(f"{error}; the operator's log: {operator()}")
    eventually("a message in the status", lambda: "message" in config_status(installed))
    events = installed.kubectl("get", "events", "-n", "default", "-o", "yaml").stdout
    assert "BpfDataplaneConfig" in events
    log = operator()
    assert "forbidden" not in log.lower(), log
    assert "403" not in log, log

    for node in ("node-1", "node-2"):
        installed.kubectl("delete", "bpfn", node, "--ignore-not-found")
    restore = start_hook(installed, "restore", "bpfdp-hook-restore")
    try:
        # The hook counts the operator as dead after 20 s.
        eventually("kube-proxy's selector", lambda: selector(installed) == LINUX, seconds=60)
        # The DaemonSet controller's part.
        patch = json.dumps({"status": {"observedGeneration": 99}})
        installed.kubectl(
            "patch", "daemonset", "kube-proxy", "-n", "kube-system", "--subresource=status",
            "--type=merge", "-p", patch,
        )  # fmt: skip
        _, log = restore.communicate(timeout=30)
    finally:
        restore.kill()
    assert restore.returncode == 0, log
    assert "forbidden" not in log.lower(), log
    assert installed.kubectl("get", "bpfdp", "default").returncode != 0
    assert installed.kubectl("get", "daemonset", "bpfdp-agent", "-n", NAMESPACE).returncode != 0


def selector(api: Any) -> dict[str, str]:
    template = api.get("daemonset", "kube-proxy", "-n", "kube-system")["spec"]["template"]
    found: dict[str, str] = template["spec"]["nodeSelector"]
    return found


def config_status(api: Any) -> dict[str, Any]:
    status: dict[str, Any] = api.get("bpfdp", "default").get("status", {})
    return status


def test_probes_reach_the_api_server_whole(installed: Any) -> None:
    """The chart's YAML merges its probes from one."""
    deployment = installed.get("deployment", "bpfdp-operator", "-n", NAMESPACE)
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    for probe, period in (("startupProbe", 2), ("readinessProbe", 5), ("livenessProbe", 15)):
        assert container[probe]["httpGet"]["host"] == "127.0.0.1"
        assert container[probe]["periodSeconds"] == period

# SPDX-License-Identifier: Apache-2.0
"""The stage: a cluster of two nodes of its own, bench pods, and programs run inside of them."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from cluster import dataplane, workloads
from cluster.testbed import Testbed, cgroups, machine
from cluster.testbed import cluster as cluster_
from cluster.testbed.settings import BIN, KUBECONFIG, Settings
from versus.api import NAMESPACE, SERVICES, SLICES, Api, endpoint_slice, service
from versus.report import ROOT, say

SOURCE = Path(__file__).parent / "load.c"
LOAD = ROOT / "build" / "bench" / "load"
PORTS = range(7001, 7006)
"""Five endpoints of the measured services: five ports of one real pod."""
NEAR, FAR = "node1", "node2"
PODS = {"client": NEAR, "near": NEAR, "far": FAR}


class Stage:
    """The cluster, its API, and what runs in the bench pods."""

    def __init__(self) -> None:
        self.bed = Testbed()
        self.api = Api(KUBECONFIG)
        self._servers: list[subprocess.Popen[str]] = []
        self.addresses: dict[str, str] = {}
        self.cluster_ips: dict[str, str] = {}
        self.node_ports: dict[str, int] = {}
        self._pids: dict[str, int] = {}

    def prepare(self) -> None:
        """Bench pods without masquerading, servers in them, and the measured services."""
        kubectl = self.bed.kubectl
        kubectl("-n", "kube-system", "scale", "deployment/coredns", "--replicas=0")
        for node in self.bed.nodes:
            path = "/etc/cni/net.d/10-testbed.conflist"
            self.bed.node_exec(node, ["sed", "-i", 's/"ipMasq": true/"ipMasq": false/', path])
        self.api.ask("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
        for name, node in PODS.items():
            pod = workloads.client(name, node)
            pod["metadata"]["namespace"] = NAMESPACE
            self.api.ask("POST", f"/api/v1/namespaces/{NAMESPACE}/pods", pod)
        self._allow_all()
        kubectl("wait", "-n", NAMESPACE, "--for=condition=Ready", "pods", "--all", "--timeout=90s")
        for name, node in PODS.items():
            got = dataplane.get(self.bed, "-n", NAMESPACE, f"pod/{name}")
            self.addresses[name] = got["status"]["podIP"]
            self._pids[name] = min(pod_processes(node, got["metadata"]["uid"]))
        for name, letter in (("near", "n"), ("far", "f")):
            self._servers.append(self._serve(name, letter))
            self._measured(name)
        self._measured("churned", "near")

    def _allow_all(self) -> None:
        policy = {
            "metadata": {"name": "allow"},
            "spec": {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{}]},
        }
        path = f"/apis/networking.k8s.io/v1/namespaces/{NAMESPACE}/networkpolicies"
        self.api.ask("POST", path, policy)

    def _serve(self, pod: str, letter: str) -> subprocess.Popen[str]:
        process = self.start(pod, [LOAD, "serve", letter, *map(str, PORTS)])
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"the server in {pod} did not start")
        return process

    def _measured(self, name: str, pod: str = "") -> None:
        made = self.api.ask("POST", SERVICES, service(name, type="NodePort"))
        self.cluster_ips[name] = made["spec"]["clusterIP"]
        self.node_ports[name] = made["spec"]["ports"][0]["nodePort"]
        address = [self.addresses[pod or name]]
        for port in PORTS:
            item = endpoint_slice(f"{name}-{port}", name, address, port)
            self.api.ask("POST", SLICES, item)

    def start(self, pod: str, argv: Sequence[str | Path]) -> subprocess.Popen[str]:
        """Start a program of the machine in a pod's network namespace and its node's cgroup."""
        inside = ["nsenter", f"--net=/proc/{self._pids[pod]}/ns/net", "--"]
        return self.bed.start(PODS[pod], [*inside, *map(str, argv)])

    def run(self, pod: str, argv: Sequence[str | Path], timeout: float = 60) -> str:
        """Run a program like `start` to its end; raises RuntimeError with what it said."""
        process = self.start(pod, argv)
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            if process.poll() is None:
                process.kill()
        if process.returncode:
            raise RuntimeError(f"{pod}: {' '.join(map(str, argv))}: {output[-500:]}")
        return output

    def close(self) -> None:
        """End the servers."""
        for process in self._servers:
            process.terminate()


def pod_processes(node: str, uid: str) -> set[int]:
    """The processes of a pod, by its cgroup."""
    pids: set[int] = set()
    for directory, _, _ in os.walk(pod_cgroup(node, uid)):
        with suppress(OSError):
            pids |= {int(p) for p in Path(directory, "cgroup.procs").read_text().split()}
    return pids


def pod_cgroup(node: str, uid: str, controller: str = "cpuacct") -> Path:
    """A pod's directory in a cgroup v1 controller; raises LookupError when there is none."""
    top = Path("/sys/fs/cgroup") / controller / "bpfdp-testbed" / node
    for directory, names, _ in os.walk(top):
        for name in names:
            if name.endswith(f"pod{uid}"):
                return Path(directory, name)
    raise LookupError(f"no cgroup of pod {uid} below {top}")


def build_load() -> None:
    """Compile the load program, statically: pods' file systems do not matter."""
    LOAD.parent.mkdir(parents=True, exist_ok=True)
    argv = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", str(LOAD), str(SOURCE)]
    subprocess.run(argv, check=True)


@contextmanager
def stage(keep: bool) -> Iterator[Stage]:
    """A cluster of its own, taken down at the end and when interrupted, unless it is to be kept."""

    def interrupted(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if machine.owner():
        raise SystemExit("a cluster is up; the benchmark needs its own: run `make cluster-down`")
    signal.signal(signal.SIGTERM, interrupted)
    build_load()
    os.environ["PATH"] = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    made = None
    try:
        with machine.locked():
            cluster_.up(Settings(nodes=2), [dataplane.ARCHIVE])
        made = Stage()
        made.prepare()
        yield made
    finally:
        if made:
            made.close()
        if not keep:
            say("taking the cluster down")
            with machine.locked():
                cluster_.down()
            left = cgroups.processes()
            say("nothing is left" if not left else f"[red]processes left: {left}[/]")

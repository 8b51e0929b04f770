# SPDX-License-Identifier: Apache-2.0
"""Where requests come from: pods, nodes and the client outside the cluster; and where they go."""

from __future__ import annotations

from dataclasses import dataclass

from cluster import workloads
from cluster.dataplane import get, wait_for
from cluster.probes import Run
from cluster.testbed import Testbed

POD, NODE, OUTSIDE = "pod", "node", "outside"


@dataclass(frozen=True, slots=True)
class Service:
    """A service's addresses and ports: (IPv4, IPv6) and by protocol."""

    addresses: dict[int, str]
    node_ports: dict[str, int]
    ports: dict[str, int]


class Places:
    """The shop's places on a testbed."""

    def __init__(self, bed: Testbed) -> None:
        self.bed = bed
        self.nodes = [n.name for n in bed.nodes]

    def apply(self, manifest: str) -> None:
        """`kubectl apply` of a manifest."""
        self.bed.kubectl("apply", "-f", "-", stdin=manifest)

    def delete(self, manifest: str) -> None:
        """`kubectl delete` of a manifest, waiting for the end."""
        self.bed.kubectl("delete", "--ignore-not-found", "-f", "-", stdin=manifest)

    def wait_ready(self, timeout: float = 120.0) -> None:
        """Wait until every pod of the shop is ready and every service has its endpoints."""
        self.bed.kubectl(
            "wait", "-n", workloads.NAMESPACE, "--for=condition=Ready", "pods", "--all",
            f"--timeout={timeout:.0f}s",
        )  # fmt: skip
        for node in self.nodes:
            for role in ("web", "host"):
                wait_for(f"endpoints of {role}-{node}", lambda n=f"{role}-{node}": self._ready(n))

    def _ready(self, name: str) -> bool:
        slices = get(
            self.bed, "-n", workloads.NAMESPACE, "endpointslices",
            "-l", f"kubernetes.io/service-name={name}",
        )["items"]  # fmt: skip
        families = {s["addressType"] for s in slices for e in s.get("endpoints") or [] if e}
        return families == {"IPv4", "IPv6"}

    def service(self, name: str) -> Service:
        """A service as the API server has it."""
        spec = get(self.bed, "-n", workloads.NAMESPACE, f"service/{name}")["spec"]
        return Service(
            {6 if ":" in a else 4: a for a in spec["clusterIPs"]},
            {p["protocol"].lower(): p["nodePort"] for p in spec["ports"] if "nodePort" in p},
            {p["protocol"].lower(): p["port"] for p in spec["ports"]},
        )

    def pod_addresses(self, name: str) -> dict[int, str]:
        """A pod's addresses by family."""
        ips = get(self.bed, "-n", workloads.NAMESPACE, f"pod/{name}")["status"]["podIPs"]
        return {6 if ":" in i["ip"] else 4: i["ip"] for i in ips}

    def node_address(self, node: str, family: int) -> str:
        """A node's address in a family."""
        found = next(n for n in self.bed.nodes if n.name == node)
        return found.v4 if family == 4 else found.v6

    def client_address(self, family: int) -> str:
        """The outside client's address in a family."""
        return self.bed.client_v4 if family == 4 else self.bed.client_v6

    def from_pod(self, name: str) -> Run:
        """Run scripts in a pod."""
        return lambda script: self.bed.kubectl(
            "exec", "-n", workloads.NAMESPACE, name, "--", "sh", "-c", script
        )

    def from_node(self, node: str) -> Run:
        """Run scripts on a node."""
        return lambda script: self.bed.node_exec(node, ["sh", "-c", script]).stdout

    def from_outside(self) -> Run:
        """Run scripts on the client outside the cluster."""
        return lambda script: self.bed.client_exec(["sh", "-c", script]).stdout

    def place(self, kind: str) -> Run:
        """The first node's client pod, the first node itself, or the outside client."""
        if kind == POD:
            return self.from_pod(f"client-{self.nodes[0]}")
        return self.from_node(self.nodes[0]) if kind == NODE else self.from_outside()

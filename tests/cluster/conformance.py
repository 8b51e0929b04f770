# SPDX-License-Identifier: Apache-2.0
"""Upstream's own tests, unmodified, against the dataplane: `e2e.test` of the same Kubernetes.

Which specs run is said by a focus and a list of what cannot run here, each with its reason. Leaves
a JUnit report and `build/results/conformance-SUITE.json` with `failed` and `run`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from xml.etree import ElementTree

import click
from cluster.dataplane import REPO
from cluster.testbed import Testbed
from cluster.testbed.settings import BIN

RESULTS = REPO / "build" / "results"
PROCESSES = 5


@dataclass(frozen=True, slots=True)
class Suite:
    """A choice of specs by regular expressions over their full names."""

    focus: str
    impossible: tuple[str, ...]


NO_SCTP = r"SCTP|\bsctp\b"  # this kernel has no SCTP sockets
SUITES = {
    "policy": Suite(r"\[sig-network\] Netpol", ("SCTPConnectivity",)),
    "services": Suite(
        r"\[sig-network\] (Services|Conntrack|Networking (Granular|should provide unchanging)|EndpointSlice|Traffic Distribution"
        r"|Topology|Service endpoints latency|DNS|HostPort|Proxy)",
        (
            NO_SCTP,
            r"Feature:LoadBalancer",  # a cloud's load balancer
            r"configMap nameserver",  # rewrites the cluster's DNS
            r"Provider:GCE",
            r"RelaxedServiceNameValidation",  # a gate that is off
            r"after restarting (apiserver|kube-proxy)",  # ssh to the control plane; kube-proxy itself
        ),
    ),
}


def run(bed: Testbed, name: str, suite: Suite, focus: str) -> int:
    """Run the suite with progress on the terminal; ginkgo's exit code."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    report = f"conformance-{name}.xml"
    argv = [
        str(BIN / "ginkgo"), f"--procs={PROCESSES}", f"--focus={focus or suite.focus}",
        f"--skip={'|'.join(suite.impossible)}", f"--output-dir={RESULTS}",
        f"--junit-report={report}", "--no-color", "--succinct", "--timeout=60m",
        str(BIN / "e2e.test"), "--", "--provider=skeleton", f"--kubeconfig={bed.kubeconfig}",
        f"--num-nodes={len(bed.nodes)}", "--allowed-not-ready-nodes=-1", "--minStartupPods=-1",
        "--dump-logs-on-failure=false", "--e2e-verify-service-account=false",
    ]  # fmt: skip
    code = subprocess.run(argv, check=False, env=dict(bed.environment()), cwd=RESULTS).returncode
    summarise(name, len(bed.nodes))
    return code


def summarise(name: str, nodes: int) -> None:
    """The JUnit report as the project's result lines; the names of what failed to stdout."""
    cases = ElementTree.parse(RESULTS / f"conformance-{name}.xml").iter("testcase")
    ran = [c for c in cases if c.find("skipped") is None and "[sig-" in c.get("name", "")]
    failed = [c for c in ran if c.find("failure") is not None or c.find("error") is not None]
    conditions = f"Kubernetes 1.36.3, {nodes} nodes, {PROCESSES} processes"
    lines = [
        {"name": "failed", "value": len(failed), "unit": "specs", "must": "== 0"},
        {"name": "run", "value": len(ran), "unit": "specs", "must": "> 0"},
    ]
    target = RESULTS / f"conformance-{name}.json"
    target.write_text(json.dumps([{**line, "conditions": conditions} for line in lines], indent=1))
    for case in failed:
        click.echo(f"FAILED {case.get('name')}")
    click.echo(f"{len(ran) - len(failed)} passed, {len(failed)} failed")


@click.command()
@click.argument("name", type=click.Choice(sorted(SUITES)))
@click.option("--focus", default="", help="Run only specs whose name matches this expression.")
def main(name: str, focus: str) -> None:
    """Run upstream's specs on the cluster that is up, with the dataplane installed."""
    sys.exit(run(Testbed(), name, SUITES[name], focus))


if __name__ == "__main__":
    main()

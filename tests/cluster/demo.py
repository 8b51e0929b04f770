# SPDX-License-Identifier: Apache-2.0
"""`make demo`: a real cluster, the dataplane takes it over from kube-proxy, and a tour.

Everything printed is what the cluster answered. Any step that does not show what it promises ends
the demo with an error.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable

from cluster import dataplane, workloads
from cluster.places import NODE, OUTSIDE, POD, Places
from cluster.probes import Request, ask_one
from cluster.test_20_policy import policy
from cluster.testbed import Testbed
from rich.console import Console
from rich.rule import Rule
from rich.table import Table

console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
STARTED = time.monotonic()


def needs() -> list[str]:
    """What this machine lacks; empty when the demo can run."""
    missing = []
    if platform.system() != "Linux":
        missing.append("Linux (the dataplane is BPF programs in the Linux kernel)")
    elif tuple(map(int, platform.release().split("-")[0].split(".")[:2])) < (5, 18):
        missing.append(f"a newer kernel than {platform.release()} (5.18 or later)")
    if hasattr(os, "geteuid") and os.geteuid() != 0:
        missing.append("root (namespaces, BPF and containers need it): run `sudo make demo`")
    return missing


def step(title: str) -> None:
    """A headline with the time since the start."""
    console.print()
    console.print(Rule(f"[bold]{title}[/]  [dim]{time.monotonic() - STARTED:.0f} s", align="left"))


def show(command: str, output: str) -> None:
    """A command and what it printed."""
    console.print(f"[bold cyan]$ {command}[/]")
    console.print(output.rstrip(), markup=False, soft_wrap=True)


def must(what: str, true: object) -> None:
    """End the demo when something is not as promised."""
    if not true:
        console.print(f"[bold red]Not as promised: {what}[/]")
        console.print("Look at: kubectl get bpfdataplanes -o yaml; kubectl get bpfnodes")
        sys.exit(1)


def rule_counts(bed: Testbed) -> Table:
    """kube-proxy's rules, a row per node."""
    table = Table("node", "kube-proxy rules")
    for node in bed.nodes:
        table.add_row(node.name, str(dataplane.kube_proxy_rules(bed, node.name)))
    return table


def before(bed: Testbed) -> None:
    """The cluster as it comes: kube-proxy does the services."""
    step("A real cluster, with kube-proxy")
    show("kubectl get nodes -o wide", bed.kubectl("get", "nodes", "-o", "wide"))
    daemonset = ("-n", "kube-system", "get", "daemonset", "kube-proxy")
    show(f"kubectl {' '.join(daemonset)}", bed.kubectl(*daemonset))
    console.print(rule_counts(bed))


def take_over(bed: Testbed) -> None:
    """Install the chart and wait until kube-proxy is gone."""
    step("helm install: the operator rolls out agents and takes the services over")
    dataplane.install(bed)
    show("kubectl get bpfdataplanes", bed.kubectl("get", "bpfdataplanes"))
    dataplane.wait_available(bed)
    step("Taken over")
    show("kubectl get bpfdataplanes", bed.kubectl("get", "bpfdataplanes"))
    show("kubectl get bpfnodes", bed.kubectl("get", "bpfnodes"))
    daemonset = ("-n", "kube-system", "get", "daemonset", "kube-proxy")
    show(f"kubectl {' '.join(daemonset)}", bed.kubectl(*daemonset))
    console.print(rule_counts(bed))
    must("no rule of kube-proxy is left", dataplane.rules_on_all(bed) == 0)


def requests(places: Places) -> None:
    """One request through a ClusterIP, one through a NodePort of another node."""
    step("Requests: who answered, and the client address the server saw")
    target = f"web-{places.nodes[1]}"
    service = places.service(target)
    table = Table("from", "to", "protocol", "answered by", "client address seen")
    cases: list[tuple[str, str, str, int]] = [
        (POD, "ClusterIP", "tcp", 4),
        (POD, "ClusterIP", "udp", 6),
        (NODE, "ClusterIP", "tcp", 4),
        (NODE, "own NodePort", "udp", 4),
        (OUTSIDE, f"NodePort of {places.nodes[0]}", "tcp", 4),
        (OUTSIDE, f"NodePort of {places.nodes[0]}", "udp", 6),
    ]
    for kind, frontend, proto, family in cases:
        if frontend == "ClusterIP":
            request = Request(proto, service.addresses[family], service.ports[proto])
        else:
            address = places.node_address(places.nodes[0], family)
            request = Request(proto, address, service.node_ports[proto])
        answer = ask_one(places.place(kind), request)
        table.add_row(kind, f"{frontend}, IPv{family}", proto, answer.hostname, answer.client)
        must(f"{kind} reaches {target} through {frontend}", answer.hostname == target)
        if kind == OUTSIDE:
            kept = answer.client == places.client_address(family)
            must("the outside client's address is kept with the backend on another node", kept)
    console.print(table)


def policies(places: Places) -> None:
    """A policy that cuts one client and not another."""
    step("A policy cuts one client and not the other")
    server, near, far = (
        f"web-{places.nodes[1]}",
        f"client-{places.nodes[0]}",
        f"client-{places.nodes[1]}",
    )
    spec = {
        "podSelector": {"matchLabels": {"app": server}},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": far}}}]}],
    }
    request = Request("tcp", places.pod_addresses(server)[4], workloads.POD_TCP)
    table = Table("client", "without policy", f"only {far} allowed")
    without = {c: ask_one(places.from_pod(c), request).arrived for c in (near, far)}
    places.apply(policy("demo", spec))

    def enforced() -> bool:
        return not ask_one(places.from_pod(near), request).arrived

    dataplane.wait_for("the policy to be enforced", enforced, 20)
    for name in (near, far):
        after = ask_one(places.from_pod(name), request).arrived
        table.add_row(name, *("answered" if a else "cut" for a in (without[name], after)))
        must(f"{name} is {'allowed' if name == far else 'cut'}", after == (name == far))
    console.print(table)
    places.delete(policy("demo", spec))


def further(bed: Testbed) -> None:
    """What to try by hand."""
    step("Go on by hand")
    for line in (
        f"export KUBECONFIG={bed.kubeconfig}",
        "kubectl get bpfdataplanes,bpfnodes",
        "kubectl -n bpf-dataplane exec ds/bpfdp-agent -- bpfdp status",
        f"kubectl -n {workloads.NAMESPACE} get pods,services -o wide",
        f"helm uninstall {dataplane.RELEASE} -n {dataplane.NAMESPACE}   # kube-proxy comes back",
        "make cluster-down",
    ):
        console.print(f"  {line}", markup=False)


def main() -> None:
    """The whole tour."""
    missing = needs()
    if missing:
        sys.exit("The demo cannot run here. It needs:\n  - " + "\n  - ".join(missing))
    bed = Testbed()
    tour: list[Callable[[], None]] = []
    installed = bed.helm("list", "-n", dataplane.NAMESPACE, "-q").split()
    if not installed:
        tour.append(lambda: before(bed))
    places = Places(bed)
    tour += [
        lambda: take_over(bed),
        lambda: places.apply(workloads.manifests(places.nodes)),
        places.wait_ready,
        lambda: requests(places),
        lambda: policies(places),
        lambda: further(bed),
    ]
    for part in tour:
        part()
    console.print(f"\n[bold green]Done in {time.monotonic() - STARTED:.0f} s.[/]")


if __name__ == "__main__":
    main()

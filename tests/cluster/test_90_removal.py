# SPDX-License-Identifier: Apache-2.0
"""Deleting the CR and `helm uninstall`: kube-proxy first, then nothing of ours but the CRDs.

These run last: they take the dataplane away.
"""

from __future__ import annotations

import json

from cluster import dataplane, workloads
from cluster.dataplane import get, wait_for
from cluster.places import OUTSIDE, POD, Places
from cluster.probes import Request, ask_one
from cluster.testbed import Testbed

TRACES = (
    "ls /sys/fs/bpf 2>/dev/null | grep bpfdp;"
    " ip -o link | grep bpfdp;"
    " for l in $(ls /sys/class/net); do tc filter show dev $l ingress;"
    " tc filter show dev $l egress; done 2>/dev/null | grep -E 'from_|to_';"
    " nft list ruleset 2>/dev/null | grep bpfdp"
)


def traces(bed: Testbed) -> dict[str, str]:
    """What is left of ours on the nodes: pins, devices, filters, rules."""
    found = {
        n.name: bed.node_exec(n.name, ["sh", "-c", f"{TRACES}; true"]).stdout for n in bed.nodes
    }
    return {node: text for node, text in found.items() if text.strip()}


def programs_left(bed: Testbed) -> list[str]:
    """Our BPF programs and maps that the kernel still holds (the kernel is shared by all nodes)."""
    node = bed.nodes[0].name
    listed = []
    for kind in ("prog", "map"):
        text = bed.node_exec(node, ["bpftool", "-j", kind, "show"]).stdout
        listed += [str(o.get("name", "")) for o in json.loads(text or "[]")]
    ours = ("from_pod", "to_pod", "from_net", "to_net", "from_tunnel", "frontends", "identities")
    return [name for name in listed if name.startswith(ours)]


def kube_proxy_ready(bed: Testbed) -> bool:
    """Whether kube-proxy runs on every node."""
    status = get(bed, "-n", "kube-system", "daemonset/kube-proxy")["status"]
    return status.get("numberReady", 0) == len(bed.nodes)


def serves(shop: Places) -> bool:
    """Whether a ClusterIP and a NodePort answer."""
    service = shop.service(f"web-{shop.nodes[1]}")
    cluster = Request("tcp", service.addresses[4], service.ports["tcp"])
    node = Request("tcp", shop.node_address(shop.nodes[0], 4), service.node_ports["tcp"])
    return ask_one(shop.place(POD), cluster).arrived and ask_one(shop.place(OUTSIDE), node).arrived


def test_deleting_the_cr_brings_kube_proxy_back_first(shop: Places) -> None:
    bed = shop.bed
    bed.kubectl("delete", dataplane.CR, "--timeout=180s")
    assert kube_proxy_ready(bed)
    assert all(dataplane.kube_proxy_rules(bed, n.name) > 0 for n in bed.nodes)
    assert serves(shop)
    wait_for("the nodes to be clean", lambda: not traces(bed) or None, 60)
    wait_for("the kernel to be clean", lambda: not programs_left(bed) or None, 60)


def test_a_new_cr_takes_over_again(shop: Places) -> None:
    cr = {
        "apiVersion": "bpfdataplane.io/v1alpha1",
        "kind": "BpfDataplaneConfig",
        "metadata": {"name": "default"},
        "spec": {"kubeProxyManagement": "Enabled"},
    }
    shop.apply(json.dumps(cr))
    dataplane.wait_available(shop.bed)
    assert serves(shop)


def test_helm_uninstall_leaves_only_the_crds(shop: Places) -> None:
    bed = shop.bed
    dataplane.uninstall(bed)
    assert kube_proxy_ready(bed)
    assert serves(shop)
    assert not traces(bed)
    wait_for("the kernel to be clean", lambda: not programs_left(bed) or None, 60)
    crds = bed.kubectl("get", "crds", "-o", "name").split()
    ours = sorted(c.rpartition("/")[2] for c in crds if "bpfdataplane.io" in c)
    assert ours == ["bpfdataplanes.bpfdataplane.io", "bpfnodes.bpfdataplane.io"]
    kinds = "clusterroles,clusterrolebindings,validatingadmissionpolicies"
    assert "bpfdp" not in bed.kubectl("get", kinds, "-o", "name")
    left = bed.kubectl("get", "all", "-n", dataplane.NAMESPACE, "-o", "name")
    assert "bpfdp" not in left
    ds = get(bed, "-n", "kube-system", "daemonset/kube-proxy")
    selector = ds["spec"]["template"]["spec"].get("nodeSelector", {})
    assert "bpfdataplane.io/kube-proxy" not in selector
    bed.kubectl("delete", "namespace", workloads.NAMESPACE, "--wait=false", "--ignore-not-found")

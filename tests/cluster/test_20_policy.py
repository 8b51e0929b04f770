# SPDX-License-Identifier: Apache-2.0
"""NetworkPolicy on the cluster: who may still talk to whom, and how soon."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from cluster import workloads
from cluster.dataplane import wait_for
from cluster.places import Places
from cluster.probes import Request, Run, ask

ENFORCED_WITHIN = 15.0


def policy(name: str, spec: dict[str, Any]) -> str:
    """A NetworkPolicy of the shop."""
    return json.dumps(
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": name, "namespace": workloads.NAMESPACE},
            "spec": spec,
        }
    )


@contextmanager
def applied(shop: Places, spec: dict[str, Any], name: str = "under-test") -> Iterator[None]:
    """A policy in force for the block, gone after it."""
    manifest = policy(name, spec)
    shop.apply(manifest)
    try:
        yield
    finally:
        shop.delete(manifest)


def expect(wanted: dict[tuple[str, Request], bool], runs: dict[str, Run]) -> None:
    """Wait until every (place, request) is answered or not, as wanted."""

    def as_wanted() -> bool:
        wrong = {}
        for place, run in runs.items():
            asked = {r: ok for (p, r), ok in wanted.items() if p == place}
            for request, answer in ask(run, asked).items():
                if answer.arrived != asked[request]:
                    wrong[place, request] = answer
        if wrong:
            raise ValueError(f"not as wanted: {wrong}")
        return True

    wait_for("the policy to be enforced", as_wanted, ENFORCED_WITHIN)


@pytest.fixture(scope="module")
def shape(shop: Places) -> dict[str, Any]:
    """A server on the first node, a client on it, one on another node."""
    return {
        "server": f"web-{shop.nodes[0]}",
        "near": f"client-{shop.nodes[0]}",
        "far": f"client-{shop.nodes[1]}",
    }


def both(shop: Places, shape: dict[str, Any]) -> dict[str, Run]:
    return {p: shop.from_pod(shape[p]) for p in ("near", "far")}


def to_server(shop: Places, shape: dict[str, Any], family: int, proto: str = "tcp") -> Request:
    port = workloads.POD_TCP if proto == "tcp" else workloads.POD_UDP
    return Request(proto, shop.pod_addresses(shape["server"])[family], port)


def selecting(shape: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return {"podSelector": {"matchLabels": {"app": shape["server"]}}, **spec}


def test_without_policy_all_pass(shop: Places, shape: dict[str, Any]) -> None:
    wanted = {(p, to_server(shop, shape, f)): True for p in ("near", "far") for f in (4, 6)}
    expect(wanted, both(shop, shape))


def test_default_deny_ingress(shop: Places, shape: dict[str, Any]) -> None:
    with applied(shop, selecting(shape, policyTypes=["Ingress"])):
        wanted = {
            (p, to_server(shop, shape, f, proto)): False
            for p in ("near", "far") for f in (4, 6) for proto in ("tcp", "udp")
        }  # fmt: skip
        expect(wanted, both(shop, shape))
        node = shop.from_node(shop.nodes[0])
        assert all(
            a.arrived for a in ask(node, [to_server(shop, shape, f) for f in (4, 6)]).values()
        ), "a node always reaches its own pods (kubelet's probes)"


def test_the_service_is_no_way_around(shop: Places, shape: dict[str, Any]) -> None:
    service = shop.service(shape["server"])
    outside = shop.from_outside()
    nodeport = Request("tcp", shop.node_address(shop.nodes[1], 4), service.node_ports["tcp"])
    with applied(shop, selecting(shape, policyTypes=["Ingress"])):
        wanted = {
            (p, Request("tcp", service.addresses[f], service.ports["tcp"])): False
            for p in ("near", "far") for f in (4, 6)
        }  # fmt: skip
        expect(wanted, both(shop, shape))
        expect({("outside", nodeport): False}, {"outside": outside})
    expect({("outside", nodeport): True}, {"outside": outside})


def test_pod_selector_cuts_one_client_and_not_another(shop: Places, shape: dict[str, Any]) -> None:
    rule = {"from": [{"podSelector": {"matchLabels": {"app": shape["far"]}}}]}
    with applied(shop, selecting(shape, policyTypes=["Ingress"], ingress=[rule])):
        wanted = {
            (p, to_server(shop, shape, f)): p == "far" for p in ("near", "far") for f in (4, 6)
        }
        expect(wanted, both(shop, shape))


def test_namespace_selector(shop: Places, shape: dict[str, Any]) -> None:
    name = workloads.NAMESPACE
    for value, allowed in ((name, True), ("elsewhere", False)):
        selector = {"matchLabels": {"kubernetes.io/metadata.name": value}}
        rule = {"from": [{"namespaceSelector": selector}]}
        with applied(shop, selecting(shape, policyTypes=["Ingress"], ingress=[rule])):
            expect({("near", to_server(shop, shape, 4)): allowed}, both(shop, shape))


def test_ip_block_with_except(shop: Places, shape: dict[str, Any]) -> None:
    near = shop.pod_addresses(shape["near"])
    blocks = [
        {"ipBlock": {"cidr": "0.0.0.0/0", "except": [f"{near[4]}/32"]}},
        {"ipBlock": {"cidr": "::/0", "except": [f"{near[6]}/128"]}},
    ]
    with applied(shop, selecting(shape, policyTypes=["Ingress"], ingress=[{"from": blocks}])):
        wanted = {
            (p, to_server(shop, shape, f)): p == "far" for p in ("near", "far") for f in (4, 6)
        }
        expect(wanted, both(shop, shape))


def test_ports_and_ranges(shop: Places, shape: dict[str, Any]) -> None:
    tcp_only = {"ports": [{"port": workloads.POD_TCP - 10, "endPort": workloads.POD_TCP}]}
    with applied(shop, selecting(shape, policyTypes=["Ingress"], ingress=[tcp_only])):
        wanted = {
            ("near", to_server(shop, shape, f, proto)): proto == "tcp"
            for f in (4, 6) for proto in ("tcp", "udp")
        }  # fmt: skip
        expect(wanted, {"near": shop.from_pod(shape["near"])})


def test_egress(shop: Places, shape: dict[str, Any]) -> None:
    spec = {
        "podSelector": {"matchLabels": {"app": shape["near"]}},
        "policyTypes": ["Egress"],
        "egress": [{"to": [{"podSelector": {"matchLabels": {"app": f"web-{shop.nodes[1]}"}}}]}],
    }
    allowed = shop.pod_addresses(f"web-{shop.nodes[1]}")
    with applied(shop, spec):
        wanted = {("near", to_server(shop, shape, f)): False for f in (4, 6)}
        wanted |= {("near", Request("tcp", allowed[f], workloads.POD_TCP)): True for f in (4, 6)}
        expect(wanted, {"near": shop.from_pod(shape["near"])})


def test_ip_block_judges_the_real_outside_client(shop: Places, shape: dict[str, Any]) -> None:
    service = shop.service(shape["server"])
    request = Request("tcp", shop.node_address(shop.nodes[1], 4), service.node_ports["tcp"])
    runs = {"outside": shop.from_outside()}
    for cidr, allowed in ((f"{shop.client_address(4)}/32", True), ("203.0.113.0/24", False)):
        rule = {"from": [{"ipBlock": {"cidr": cidr}}]}
        with applied(shop, selecting(shape, policyTypes=["Ingress"], ingress=[rule])):
            expect({("outside", request): allowed}, runs)

# SPDX-License-Identifier: Apache-2.0
"""Bad input is named, with the remedy, where users look; and it harms nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from cluster import dataplane, workloads
from cluster.dataplane import conditions, get, wait_for
from cluster.places import POD, Places
from cluster.probes import Request, ask_one
from cluster.test_30_truth import agent_environment


def serves(shop: Places) -> bool:
    """Whether a service with a remote backend answers a pod."""
    service = shop.service(f"web-{shop.nodes[1]}")
    request = Request("tcp", service.addresses[4], service.ports["tcp"])
    return ask_one(shop.place(POD), request).arrived


def node_errors(shop: Places) -> list[dict[str, Any]]:
    """The last error of every node that has one."""
    nodes = get(shop.bed, "bpfnodes")["items"]
    return [n["status"]["lastError"] for n in nodes if n["status"].get("lastError")]


def agent_logs(shop: Places) -> str:
    """What all agents have logged."""
    return shop.bed.kubectl(
        "-n", dataplane.NAMESPACE, "logs", "-l", "app.kubernetes.io/component=agent", "--tail=-1"
    )


def event_about(shop: Places, kind: str, name: str) -> Callable[[], list[str]]:
    """Messages of the Events about an object of the shop."""
    selector = f"involvedObject.kind={kind},involvedObject.name={name}"

    def messages() -> list[str]:
        found = get(shop.bed, "-n", workloads.NAMESPACE, "events", "--field-selector", selector)[
            "items"
        ]
        return [e["message"] for e in found if e["reason"] == "InvalidObject"]

    return messages


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("template-error", "TemplateError"), ("verifier-reject", "ProgramRejected")],
)
def test_a_bad_program_is_reported_and_the_last_good_one_runs(
    shop: Places, fault: str, reason: str
) -> None:
    with agent_environment(shop.bed, BPFDP_FAULT=fault):
        wait_for("the node's reason", lambda: {e["reason"] for e in node_errors(shop)} & {reason})
        wait_for(
            "the reason in the CR",
            lambda: conditions(shop.bed).get("Degraded", {}).get("reason") == reason,
        )
        message = conditions(shop.bed)["Degraded"]["message"]
        assert any(node in message for node in shop.nodes)
        assert serves(shop), "the last good programs forward on"
    dataplane.wait_available(shop.bed)


def test_a_malformed_endpointslice_is_named_and_harms_nothing(shop: Places) -> None:
    bad = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "malformed",
            "namespace": workloads.NAMESPACE,
            "labels": {"kubernetes.io/service-name": "web"},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["10.244.0.250"], "conditions": {"ready": True}}],
        "ports": [{"name": "http", "protocol": "TCP"}],
    }
    shop.apply(json.dumps(bad))
    try:
        wait_for("an Event on the slice", event_about(shop, "EndpointSlice", "malformed"), 30)
        assert "malformed" in agent_logs(shop)
        assert serves(shop)
        service = shop.service("web")
        request = Request("tcp", service.addresses[4], service.ports["tcp"])
        assert all(ask_one(shop.place(POD), request).arrived for _ in range(6))
    finally:
        shop.delete(json.dumps(bad))


def test_a_bad_policy_is_named_fails_closed_and_harms_no_other(shop: Places) -> None:
    """More distinct peers than a program can hold: the API accepts it, we cannot enforce it."""
    target, other = f"web-{shop.nodes[0]}", f"web-{shop.nodes[1]}"
    peers = [{"podSelector": {"matchLabels": {"peer": f"p{i}"}}} for i in range(3000)]
    bad = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "too-much", "namespace": workloads.NAMESPACE},
        "spec": {
            "podSelector": {"matchLabels": {"app": target}},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": peers}],
        },
    }
    shop.apply(json.dumps(bad))
    try:
        messages = wait_for(
            "an Event on the policy", event_about(shop, "NetworkPolicy", "too-much"), 30
        )
        assert any("too-much" in m or "peers" in m or "limit" in m for m in messages)
        addresses = {n: shop.pod_addresses(n)[4] for n in (target, other)}
        run = shop.place(POD)
        wait_for(
            "the pod to fail closed",
            lambda: not ask_one(run, Request("tcp", addresses[target], workloads.POD_TCP)).arrived,
            30,
        )
        assert ask_one(run, Request("tcp", addresses[other], workloads.POD_TCP)).arrived
    finally:
        shop.delete(json.dumps(bad))
    wait_for(
        "the pod to be reachable again",
        lambda: ask_one(run, Request("tcp", addresses[target], workloads.POD_TCP)).arrived,
        30,
    )
    dataplane.wait_available(shop.bed)

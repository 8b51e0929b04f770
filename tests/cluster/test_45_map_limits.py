# SPDX-License-Identifier: Apache-2.0
"""A map that is too small is said before it is full, and made larger while it is in use."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from cluster import dataplane, workloads
from cluster.dataplane import get, wait_for
from cluster.places import Places
from cluster.test_40_bad_input import serves
from cluster.testbed import Testbed

FEW, ENOUGH = 1024, 4096
CROWD = "crowd"


def crowd(slices: int) -> str:
    """A service with 100 endpoints a slice, at addresses of nobody."""
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": CROWD, "namespace": workloads.NAMESPACE},
        "spec": {"ports": [{"name": "http", "port": 80}], "ipFamilies": ["IPv4"]},
    }
    items: list[dict[str, Any]] = [service]
    for number in range(slices):
        items.append(
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": f"{CROWD}-{number}",
                    "namespace": workloads.NAMESPACE,
                    "labels": {"kubernetes.io/service-name": CROWD},
                },
                "addressType": "IPv4",
                "ports": [{"name": "http", "port": 80, "protocol": "TCP"}],
                "endpoints": [{"addresses": [f"192.0.2.{n}"]} for n in range(100)]
                if not number
                else [{"addresses": [f"198.18.{number}.{n}"]} for n in range(100)],
            }
        )
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items})


@contextmanager
def map_sizes(bed: Testbed, **sizes: int) -> Iterator[None]:
    """The CR asks for these sizes within the block."""
    set_sizes(bed, sizes)
    try:
        yield
    finally:
        set_sizes(bed, dict.fromkeys(sizes))
        dataplane.wait_available(bed)


def set_sizes(bed: Testbed, sizes: dict[str, int] | dict[str, None]) -> None:
    """Without waiting."""
    patch = json.dumps({"spec": {"maps": sizes}})
    bed.kubectl("patch", "bpfdataplanes", "default", "--type=merge", "-p", patch)


def size_on_all(bed: Testbed, name: str) -> set[int]:
    """What the nodes say their map of IPv4 can hold."""
    found = set()
    for node in get(bed, "bpfnodes")["items"]:
        found |= {
            m["maxEntries"] for m in node["status"].get("maps", []) if m["name"] == f"{name}4"
        }
    return found


def refusals(shop: Places) -> list[str]:
    """Events about the crowd."""
    selector = f"involvedObject.kind=Service,involvedObject.name={CROWD}"
    found = get(shop.bed, "-n", workloads.NAMESPACE, "events", "--field-selector", selector)
    return [e["message"] for e in found["items"] if e["reason"] == "MapFull"]


def reasons(bed: Testbed) -> set[str]:
    """Reasons of every node's ServicesSynced."""
    nodes = get(bed, "bpfnodes")["items"]
    return {
        c["reason"]
        for n in nodes
        for c in n["status"]["conditions"]
        if c["type"] == "ServicesSynced"
    }


class Conversation:
    """One connection from a pod to a ClusterIP that carries ten requests a second."""

    def __init__(self, shop: Places, seconds: int) -> None:
        service = shop.service(f"web-{shop.nodes[1]}")
        address, port = service.addresses[4], service.ports["tcp"]
        url = f"http://{address}:{port}/hostname?n=[1-{seconds * 10}]"
        said = "%{http_code} %{num_connects}\\n"
        curl = ["curl", "-sS", "-o", "/dev/null", "-w", said, "--rate", "10/s", "-m", "20", url]
        pod = ["-n", workloads.NAMESPACE, "exec", f"client-{shop.nodes[0]}", "--"]
        self._running = subprocess.Popen(
            ["kubectl", *pod, *curl],
            env=dict(shop.bed.environment()),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> list[tuple[str, int]]:
        """(HTTP status, connections opened for it) of each request."""
        out, err = self._running.communicate(timeout=60)
        assert not err, err
        return [
            (code, int(opened))
            for code, opened in (line.split() for line in out.split("\n") if line)
        ]


@pytest.fixture
def crowded(shop: Places) -> Iterator[Places]:
    """Small maps, and a service with more endpoints than they can hold."""
    manifest = crowd(12)
    with map_sizes(shop.bed, backends=FEW):
        wait_for("small maps", lambda: size_on_all(shop.bed, "backends") == {FEW})
        shop.apply(manifest)
        yield shop
        shop.delete(manifest)


def test_what_does_not_fit_is_refused_and_a_larger_map_takes_it_under_traffic(
    crowded: Places,
) -> None:
    bed = crowded.bed
    wait_for("the nodes' reason", lambda: reasons(bed) == {"MapFull"})
    messages = wait_for("the Event", lambda: refusals(crowded))
    assert all("spec.maps.backends" in message for message in messages)
    assert serves(crowded), "other services are as they were"

    conversation = Conversation(crowded, seconds=25)
    set_sizes(bed, {"backends": ENOUGH})
    wait_for("large maps", lambda: size_on_all(bed, "backends") == {ENOUGH})
    wait_for("every service", lambda: reasons(bed) == {"Synced"})
    answers = conversation.end()
    assert {code for code, _ in answers} == {"200"}
    assert sum(opened for _, opened in answers) == 1, "one connection all the way"

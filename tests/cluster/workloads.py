# SPDX-License-Identifier: Apache-2.0
"""What the cluster tests and the demo run on the cluster: servers, services and clients.

One server pod a node (`web-NODE`), one host-network server a node (`host-NODE`), each behind a
service of its own, so that a test names the backend it wants local, remote or host-network.
"""

from __future__ import annotations

import json
from typing import Any

NAMESPACE = "shop"
AGNHOST = "registry.k8s.io/e2e-test-images/agnhost:2.63.0"

POD_TCP, POD_UDP = 8080, 8081
HOST_TCP, HOST_UDP = 18080, 18081
SERVICE_TCP, SERVICE_UDP = 80, 81


def server(name: str, node: str, *, host_network: bool) -> dict[str, Any]:
    """A pod that answers with its host name over TCP (HTTP) and UDP."""
    tcp, udp = (HOST_TCP, HOST_UDP) if host_network else (POD_TCP, POD_UDP)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "labels": {"app": name, "role": "host" if host_network else "web"},
        },
        "spec": {
            "nodeName": node,
            "hostNetwork": host_network,
            "terminationGracePeriodSeconds": 1,
            "containers": [
                {
                    "name": "netexec",
                    "image": AGNHOST,
                    "args": ["netexec", f"--http-port={tcp}", f"--udp-port={udp}"],
                    "ports": [
                        {"name": "http", "containerPort": tcp},
                        {"name": "udp", "containerPort": udp, "protocol": "UDP"},
                    ],
                    "readinessProbe": {
                        "httpGet": {"path": "/healthz", "port": tcp},
                        "periodSeconds": 1,
                    },
                }
            ],
        },
    }


def client(name: str, node: str, labels: dict[str, str] | None = None) -> dict[str, Any]:
    """A pod with curl and nc in it that does nothing by itself."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "labels": {"app": name, "role": "client", **(labels or {})},
        },
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "client", "image": AGNHOST, "args": ["pause"]}],
        },
    }


def service(name: str, selector: dict[str, str], *, host_network: bool = False) -> dict[str, Any]:
    """A dual-stack NodePort service with a TCP and a UDP port."""
    tcp, udp = (HOST_TCP, HOST_UDP) if host_network else (POD_TCP, POD_UDP)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "type": "NodePort",
            "ipFamilyPolicy": "PreferDualStack",
            "selector": selector,
            "ports": [
                {"name": "http", "port": SERVICE_TCP, "targetPort": tcp},
                {"name": "udp", "port": SERVICE_UDP, "targetPort": udp, "protocol": "UDP"},
            ],
        },
    }


def manifests(nodes: list[str]) -> str:
    """Everything, as one JSON list for `kubectl apply -f -`."""
    items: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
    ]
    for node in nodes:
        items += [
            server(f"web-{node}", node, host_network=False),
            server(f"host-{node}", node, host_network=True),
            service(f"web-{node}", {"app": f"web-{node}"}),
            service(f"host-{node}", {"app": f"host-{node}"}, host_network=True),
            client(f"client-{node}", node),
        ]
    items.append(service("web", {"role": "web"}))
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items})

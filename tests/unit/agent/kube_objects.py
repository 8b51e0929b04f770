# SPDX-License-Identifier: Apache-2.0
"""Kubernetes objects for tests, written short and decoded as they come from the API server."""

from __future__ import annotations

from typing import Any

import msgspec
from bpfdp_agent.watch.wire import (
    Added,
    AnyObject,
    Deleted,
    EndpointSlice,
    Kind,
    Node,
    ObjectKey,
    Pod,
    Service,
    decode,
)


def decoded(kind: Kind, body: dict[str, Any]) -> AnyObject:
    return decode(kind, msgspec.json.encode(body))


def service(
    name: str = "web",
    ip: str | list[str] = "10.96.0.1",
    namespace: str = "ns",
    *,
    status: dict[str, Any] | None = None,
    meta: dict[str, Any] | None = None,
    ports: list[dict[str, Any]] | None = None,
    **spec: Any,
) -> Service:
    ips = [ip] if isinstance(ip, str) else ip
    body = {
        "metadata": {"name": name, "namespace": namespace, **(meta or {})},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": ips[0],
            "clusterIPs": ips,
            "ports": ports
            if ports is not None
            else [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}],
            **spec,
        },
        "status": {"loadBalancer": {}, **(status or {})},
    }
    found = decoded(Kind.SERVICE, body)
    assert isinstance(found, Service)
    return found


def endpoint(
    address: str,
    node: str | None = "node1",
    *,
    ready: bool | None = True,
    serving: bool | None = None,
    terminating: bool | None = None,
    zones: tuple[str, ...] = (),
    nodes: tuple[str, ...] = (),
) -> dict[str, Any]:
    conditions = {
        "ready": ready,
        "serving": ready if serving is None else serving,
        "terminating": terminating,
    }
    hints = {"forZones": [{"name": z} for z in zones], "forNodes": [{"name": n} for n in nodes]}
    body: dict[str, Any] = {"addresses": [address], "conditions": conditions}
    if node is not None:
        body["nodeName"] = node
    if zones or nodes:
        body["hints"] = hints
    return body


def endpoint_slice(
    endpoints: list[dict[str, Any]] | None,
    service_name: str = "web",
    *,
    name: str = "",
    namespace: str = "ns",
    family: int = 4,
    ports: list[dict[str, Any]] | None = None,
) -> EndpointSlice:
    body = {
        "metadata": {
            "name": name or f"{service_name}-v{family}",
            "namespace": namespace,
            "labels": {"kubernetes.io/service-name": service_name},
        },
        "addressType": f"IPv{family}",
        "endpoints": endpoints,
        "ports": ports
        if ports is not None
        else [{"name": "http", "port": 8080, "protocol": "TCP"}],
    }
    found = decoded(Kind.ENDPOINT_SLICE, body)
    assert isinstance(found, EndpointSlice)
    return found


def node(
    name: str = "node1",
    addresses: tuple[str, ...] = ("192.168.0.1", "fd00:1::1"),
    zone: str = "",
    external: tuple[str, ...] = (),
) -> Node:
    listed = [{"type": "InternalIP", "address": a} for a in addresses]
    listed += [{"type": "ExternalIP", "address": a} for a in external]
    labels = {"topology.kubernetes.io/zone": zone} if zone else {}
    found = decoded(
        Kind.NODE,
        {
            "metadata": {"name": name, "labels": labels},
            "status": {"addresses": [{"type": "Hostname", "address": name}, *listed]},
        },
    )
    assert isinstance(found, Node)
    return found


def pod(
    name: str = "a",
    ips: tuple[str, ...] = ("10.0.0.1",),
    *,
    namespace: str = "ns",
    node_name: str = "node1",
    labels: dict[str, str] | None = None,
    host_network: bool = False,
    phase: str = "Running",
    ports: list[dict[str, Any]] | None = None,
    created: str = "2026-01-01T00:00:00Z",
    deleting: bool = False,
) -> Pod:
    metadata: dict[str, Any] = {
        "name": name,
        "namespace": namespace,
        "uid": f"uid-{name}",
        "labels": labels or {},
        "creationTimestamp": created,
    }
    if deleting:
        metadata["deletionTimestamp"] = "2026-01-02T00:00:00Z"
    body = {
        "metadata": metadata,
        "spec": {
            "nodeName": node_name,
            "hostNetwork": host_network,
            "containers": [{"name": "c", "ports": ports or []}],
        },
        "status": {"phase": phase, "podIPs": [{"ip": ip} for ip in ips]},
    }
    found = decoded(Kind.POD, body)
    assert isinstance(found, Pod)
    return found


KINDS = {Service: Kind.SERVICE, EndpointSlice: Kind.ENDPOINT_SLICE, Node: Kind.NODE, Pod: Kind.POD}


def added(found: AnyObject) -> Added:
    return Added(KINDS[type(found)], found)


def deleted(found: AnyObject) -> Deleted:
    return Deleted(KINDS[type(found)], ObjectKey(found.metadata.namespace, found.metadata.name))

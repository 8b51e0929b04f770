# SPDX-License-Identifier: Apache-2.0
"""The contract's vectors, read and made into API objects for any cast of addresses."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

HERE = Path(__file__).parent
PORT, TARGET_PORT, OTHER_PORT, NODE_PORT = 80, 8080, 81, 30080
SERVICE = "contract"

Client = Literal["pod", "node", "outside"]
Verdict = Literal["reject", "drop", "untouched"]
Masquerade = Literal["keep", "masquerade"]
FRONTENDS = (
    *("cluster-ip", "node-port", "load-balancer", "external-ip"),
    *("other-port", "unallocated", "load-balancer-other-port"),
)


class Flow(msgspec.Struct, frozen=True, rename="kebab", forbid_unknown_fields=True):
    """Who asks by which address, and what comes of it: backends, or a verdict."""

    from_: Client = msgspec.field(name="from")
    to: str
    backends: tuple[str, ...] = ()
    verdict: Verdict | None = None
    kube_proxy: tuple[Masquerade, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.backends) == bool(self.verdict) or self.to not in FRONTENDS:
            raise ValueError(f"flow {self.from_} → {self.to}: backends or a verdict")

    @property
    def expected(self) -> frozenset[str] | str:
        """What is to be seen."""
        return self.verdict or frozenset(self.backends)


class EndpointState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Conditions and hints."""

    ready: bool = True
    serving: bool | None = None
    terminating: bool = False
    zones: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()


class Vector(msgspec.Struct, frozen=True, rename="kebab", forbid_unknown_fields=True):
    """A service, its endpoints, and what its clients meet."""

    name: str
    flows: tuple[Flow, ...]
    type: str = "ClusterIP"
    spec: dict[str, Any] = {}
    labels: dict[str, str] = {}
    endpoints: dict[str, EndpointState] = msgspec.field(
        default_factory=lambda: {"y": EndpointState(), "z": EndpointState()}
    )
    ip_mode: str | None = None
    node_port: bool = True
    zone: str = ""


class Transition(msgspec.Struct, frozen=True):
    """A service that changes its type."""

    before: Vector
    after: Vector

    @property
    def name(self) -> str:
        """For the test's id."""
        return f"{self.before.type} to {self.after.type}"


def _read(name: str) -> Any:
    return yaml.safe_load((HERE / f"{name}.yaml").read_text())


def vectors() -> list[Vector]:
    """Every vector of a service that does not change."""
    names = ("masquerade", "endpoints", "frontends")
    return [msgspec.convert(raw, Vector) for name in names for raw in _read(name)]


def transitions() -> list[Transition]:
    """Every change from one type to another."""
    by_type = msgspec.convert(_read("transitions"), dict[str, tuple[Flow, ...]])
    made = [Vector(name=kind, type=kind, flows=flows) for kind, flows in by_type.items()]
    return [Transition(a, b) for a, b in itertools.permutations(made, 2)]


def service_object(
    vector: Vector, addresses: Mapping[str, str], protocol: str = "TCP", name: str = SERVICE
) -> dict[str, Any]:
    """The v1 Service. `addresses`: cluster-ip, load-balancer, external-ip and the clients'."""
    spec = {field: _named(value, addresses) for field, value in vector.spec.items()}
    port: dict[str, Any] = {"name": "p", "port": PORT, "protocol": protocol}
    external = vector.type in ("NodePort", "LoadBalancer")
    if external and vector.node_port:
        port["nodePort"] = NODE_PORT
    status: dict[str, Any] = {"loadBalancer": {}}
    if vector.type == "LoadBalancer":
        ingress: dict[str, Any] = {"ip": addresses["load-balancer"]}
        if vector.ip_mode:
            ingress["ipMode"] = vector.ip_mode
        status["loadBalancer"]["ingress"] = [ingress]
    ip = spec.pop("clusterIP", "" if vector.type == "ExternalName" else addresses["cluster-ip"])
    return {
        "metadata": {"name": name, "namespace": "ns", "labels": vector.labels},
        "spec": {
            "type": vector.type,
            "clusterIP": ip,
            "clusterIPs": [ip],
            "ports": [port],
            **spec,
        },
        "status": status,
    }


def _named(value: Any, addresses: Mapping[str, str]) -> Any:
    """Names of addresses in lists become the addresses; blanks around them stay."""
    if not isinstance(value, list):
        return value
    return [text.replace(text.strip(), addresses.get(text.strip(), text.strip())) for text in value]


def slice_object(
    vector: Vector,
    places: Mapping[str, tuple[str, str]],
    family: int,
    protocol: str = "TCP",
    name: str = SERVICE,
) -> dict[str, Any]:
    """The EndpointSlice. `places`: address and node name of y and z."""
    endpoints = []
    for which, state in vector.endpoints.items():
        address, node = places[which]
        serving = state.ready if state.serving is None else state.serving
        endpoint: dict[str, Any] = {
            "addresses": [address],
            "nodeName": node,
            "conditions": {
                "ready": state.ready,
                "serving": serving,
                "terminating": state.terminating,
            },
        }
        if state.zones or state.nodes:
            endpoint["hints"] = {
                "forZones": [{"name": zone} for zone in state.zones],
                "forNodes": [{"name": node} for node in state.nodes],
            }
        endpoints.append(endpoint)
    return {
        "metadata": {
            "name": f"{name}-{family}",
            "namespace": "ns",
            "labels": {"kubernetes.io/service-name": name, **vector.labels},
        },
        "addressType": f"IPv{family}",
        "endpoints": endpoints,
        "ports": [{"name": "p", "port": TARGET_PORT, "protocol": protocol}],
    }

# SPDX-License-Identifier: Apache-2.0
"""Where the API server really listens, found without kube-proxy (pure).

Order: spec.apiServer Explicit; the ConfigMap `kubernetes-services-endpoint` in the operator's
namespace; the EndpointSlices of default/kubernetes. An address in use stays in use while it is
still listed, so that agents are not rolled for a reordering; when nothing is found the last known
good endpoint is kept: the API server's own service must never drop to zero backends.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from bpfdp_operator.world import ConfigMap, EndpointSlice, World

OVERRIDE_NAME = "kubernetes-services-endpoint"


class ApiEndpoint(msgspec.Struct, frozen=True):
    """A host (name or address) and port of the API server."""

    host: str
    port: int
    source: str

    @property
    def text(self) -> str:
        """`host:port`, with brackets around an IPv6 address."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse(text: str, source: str) -> ApiEndpoint | None:
    """Read `host:port` or `[v6]:port`; None where it is not one."""
    host, separator, port = text.rpartition(":")
    if not separator or not port.isdigit() or not host:
        return None
    return ApiEndpoint(host.strip("[]"), int(port), source)


def find(world: World) -> ApiEndpoint | None:
    """Return the endpoint to give to the agents, or None where none has ever been known."""
    if world.config is None:
        return None
    spec = world.config.spec.api_server
    if spec.mode == "Explicit" and spec.host and spec.port:
        return ApiEndpoint(spec.host, spec.port, "Explicit")
    overridden = _from_override(world.endpoint_override)
    if overridden is not None:
        return overridden
    known = parse(world.config.status.api_server.endpoint, "EndpointSlice")
    listed = _from_slices(world.kubernetes_slices)
    if known is not None and (known in listed or not listed):
        return known
    return listed[0] if listed else None


def _from_override(config_map: ConfigMap | None) -> ApiEndpoint | None:
    if config_map is None:
        return None
    host = config_map.data.get("KUBERNETES_SERVICE_HOST", "").strip()
    port = config_map.data.get("KUBERNETES_SERVICE_PORT", "").strip()
    if not host or not port.isdigit():
        return None
    return ApiEndpoint(host.strip("[]"), int(port), "ConfigMap")


def _from_slices(slices: tuple[EndpointSlice, ...]) -> list[ApiEndpoint]:
    """All usable endpoints, IPv4 before IPv6, in a stable order."""
    found = set()
    for piece in slices:
        ports = [p.port for p in piece.ports or () if p.port and p.name in (None, "", "https")]
        for endpoint in piece.endpoints or ():
            if endpoint.conditions.ready is False or not ports:
                continue
            found |= {(address, ports[0]) for address in endpoint.addresses if _usable(address)}
    ordered = sorted(found, key=lambda e: (ipaddress.ip_address(e[0]).version, e))
    return [ApiEndpoint(address, port, "EndpointSlice") for address, port in ordered]


def _usable(address: str) -> bool:
    """Refuse what is not an address and what other nodes cannot reach."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return not (parsed.is_loopback or parsed.is_unspecified)

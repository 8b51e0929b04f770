# SPDX-License-Identifier: Apache-2.0
"""A vector's objects through the agent's own model to map entries."""

from __future__ import annotations

from typing import Any

import msgspec
from bpfdp_agent.desired.services import ServiceTables
from bpfdp_agent.diff.tables import Writes
from bpfdp_agent.model.nodes import NodeIndex, node_info
from bpfdp_agent.model.services import service_view
from bpfdp_agent.watch.wire import EndpointSlice, Kind, Node, ObjectKey, Service, decode
from contract.vectors import SERVICE, Vector, service_object, slice_object


class Planned:
    """One node, A, in one family. `nodes`: addresses of A and B; `backends`: of y and z."""

    def __init__(
        self,
        family: int,
        addresses: dict[str, str],
        nodes: dict[str, str],
        backends: dict[str, str],
    ) -> None:
        self._family = family
        self._addresses = addresses
        self._nodes = nodes
        self._backends = backends
        self._tables = ServiceTables(family)
        self._started = False

    def apply(self, vector: Vector, protocol: str) -> Writes:
        """The writes that make the maps what the vector's objects ask for."""
        index = NodeIndex("A")
        for name, address in self._nodes.items():
            index.put(node_info(_node(name, address, vector.zone if name == "A" else "")))
        places = {"y": (self._backends["y"], "A"), "z": (self._backends["z"], "B")}
        service = _decoded(Kind.SERVICE, service_object(vector, self._addresses, protocol))
        found = _decoded(Kind.ENDPOINT_SLICE, slice_object(vector, places, self._family, protocol))
        assert isinstance(service, Service)
        assert isinstance(found, EndpointSlice)
        views = {ObjectKey("ns", SERVICE): service_view(service, [found], self._family, index)}
        if self._started:
            return self._tables.update(views)
        self._started = True
        return self._tables.start({}, views)


def _node(name: str, address: str, zone: str) -> Node:
    labels = {"topology.kubernetes.io/zone": zone} if zone else {}
    found = _decoded(
        Kind.NODE,
        {
            "metadata": {"name": name, "labels": labels},
            "status": {"addresses": [{"type": "InternalIP", "address": address}]},
        },
    )
    assert isinstance(found, Node)
    return found


def _decoded(kind: Kind, body: dict[str, Any]) -> object:
    return decode(kind, msgspec.json.encode(body))

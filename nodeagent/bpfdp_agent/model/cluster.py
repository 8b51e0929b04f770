# SPDX-License-Identifier: Apache-2.0
"""The cluster as the API server last told it: typed stores, indexes, and what changed.

`apply` takes one event; `take_changes` gives what changed since it was last called, so that the
desired state is worked out anew for that and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import msgspec

from bpfdp_agent.model.nodes import NodeIndex, node_info
from bpfdp_agent.model.pods import holder, pod_addresses
from bpfdp_agent.watch.wire import (
    Added,
    AnyObject,
    BpfDataplaneConfig,
    Deleted,
    EndpointSlice,
    Event,
    Kind,
    Modified,
    Namespace,
    NetworkPolicy,
    Node,
    ObjectKey,
    Pod,
    Service,
    ServiceCIDR,
    Synced,
)

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from bpfdp_agent.model.nodes import NodeInfo

K = TypeVar("K", bound="Hashable")


class Changes(msgspec.Struct):
    """What changed. A service's endpoints, or their nodes, count as the service.

    `addresses` are those that a pod or node has won, lost, or holds with other labels or ports.
    """

    services: set[ObjectKey] = msgspec.field(default_factory=set)
    pods: set[ObjectKey] = msgspec.field(default_factory=set)
    addresses: set[bytes] = msgspec.field(default_factory=set)
    namespaces: set[str] = msgspec.field(default_factory=set)
    policies: set[ObjectKey] = msgspec.field(default_factory=set)
    nodes: set[str] = msgspec.field(default_factory=set)
    service_ranges: bool = False
    config: bool = False

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in self.__struct_fields__)


class ClusterView:
    """The stores. Read them freely; only `apply` writes. `own_node` is the agent's node."""

    def __init__(self, own_node: str) -> None:
        self.nodes = NodeIndex(own_node)
        self.services: dict[ObjectKey, Service] = {}
        self.slices: dict[ObjectKey, EndpointSlice] = {}
        self.pods: dict[ObjectKey, Pod] = {}
        self.namespaces: dict[str, Namespace] = {}
        self.node_objects: dict[str, Node] = {}
        self.policies: dict[ObjectKey, NetworkPolicy] = {}
        self.service_ranges: dict[str, ServiceCIDR] = {}
        self.config: BpfDataplaneConfig | None = None
        self._changes = Changes()
        self._synced: set[Kind] = set()
        self._slices_of: dict[ObjectKey, set[ObjectKey]] = {}
        self._slices_on: dict[str, set[ObjectKey]] = {}
        self._pods_at: dict[bytes, set[ObjectKey]] = {}
        self._pods_in: dict[str, set[ObjectKey]] = {}
        self._pods_on: dict[str, set[ObjectKey]] = {}

    # -- reading --------------------------------------------------------------------------

    def synced(self, *kinds: Kind) -> bool:
        """Whether the first list of each of these kinds is complete."""
        return self._synced.issuperset(kinds)

    def slices_of(self, service: ObjectKey) -> list[EndpointSlice]:
        """A service's EndpointSlices in the order of their names."""
        return [self.slices[k] for k in sorted(self._slices_of.get(service, ()))]

    def pods_in(self, namespace: str) -> list[Pod]:
        """The pods of a namespace, ended ones included, in the order of their names."""
        return [self.pods[k] for k in sorted(self._pods_in.get(namespace, ()))]

    def pods_on(self, node: str) -> list[Pod]:
        """The pods bound to a node, ended ones included."""
        return [self.pods[k] for k in sorted(self._pods_on.get(node, ()))]

    def pod_at(self, address: bytes) -> Pod | None:
        """The pod that has this address (never a host-network or ended one)."""
        return holder(self.pods[k] for k in self._pods_at.get(address, ()))

    def addresses(self) -> set[bytes]:
        """Every address of a pod or a node."""
        return self._pods_at.keys() | {a for node in self.nodes for a in node.addresses}

    # -- writing --------------------------------------------------------------------------

    def apply(self, event: Event) -> None:
        """Take one event into the stores. A malformed object leaves its last good version."""
        match event:
            case Added(object=found) | Modified(object=found):
                self._put(found)
            case Deleted(kind=kind, key=key):
                self._delete(kind, key)
            case Synced(kind=kind):
                self._synced.add(kind)
            case _:
                pass

    def take_changes(self) -> Changes:
        """What changed since the last call."""
        taken, self._changes = self._changes, Changes()
        return taken

    def _put(self, found: AnyObject) -> None:
        match found:
            case Service():
                if self.services.get(found.key) != found:
                    self.services[found.key] = found
                    self._changes.services.add(found.key)
            case EndpointSlice():
                self._set_slice(found.key, found)
            case Pod():
                self._set_pod(found.key, found)
            case Namespace():
                if self.namespaces.get(found.metadata.name) != found:
                    self.namespaces[found.metadata.name] = found
                    self._changes.namespaces.add(found.metadata.name)
            case Node():
                self._set_node(found.metadata.name, found)
            case NetworkPolicy():
                if self.policies.get(found.key) != found:
                    self.policies[found.key] = found
                    self._changes.policies.add(found.key)
            case ServiceCIDR():
                self._changes.service_ranges |= self.service_ranges.get(found.key.name) != found
                self.service_ranges[found.key.name] = found
            case BpfDataplaneConfig():
                self._changes.config |= self.config != found
                self.config = found

    def _delete(self, kind: Kind, key: ObjectKey) -> None:
        match kind:
            case Kind.SERVICE:
                if self.services.pop(key, None):
                    self._changes.services.add(key)
            case Kind.ENDPOINT_SLICE:
                self._set_slice(key, None)
            case Kind.POD:
                self._set_pod(key, None)
            case Kind.NAMESPACE:
                if self.namespaces.pop(key.name, None):
                    self._changes.namespaces.add(key.name)
            case Kind.NODE:
                self._set_node(key.name, None)
            case Kind.NETWORK_POLICY:
                if self.policies.pop(key, None):
                    self._changes.policies.add(key)
            case _:
                self._delete_setting(kind, key)

    def _delete_setting(self, kind: Kind, key: ObjectKey) -> None:
        if kind is Kind.SERVICE_CIDR:
            self._changes.service_ranges |= key.name in self.service_ranges
            self.service_ranges.pop(key.name, None)
        elif kind is Kind.CONFIG:
            self._changes.config |= self.config is not None
            self.config = None

    def _set_slice(self, key: ObjectKey, new: EndpointSlice | None) -> None:
        old = self.slices.get(key)
        if old == new:
            return
        if old:
            _unindex(self._slices_of, [old.service], key)
            _unindex(self._slices_on, _nodes_of(old), key)
            self._changes.services.add(old.service)
            del self.slices[key]
        if new:
            _index(self._slices_of, [new.service], key)
            _index(self._slices_on, _nodes_of(new), key)
            self._changes.services.add(new.service)
            self.slices[key] = new

    def _set_pod(self, key: ObjectKey, new: Pod | None) -> None:
        old = self.pods.get(key)
        if old == new:
            return
        self._changes.pods.add(key)
        if old:
            addresses = pod_addresses(old)
            _unindex(self._pods_at, addresses, key)
            _unindex(self._pods_in, [key.namespace], key)
            _unindex(self._pods_on, [old.spec.node_name], key)
            self._changes.addresses.update(addresses)
            del self.pods[key]
        if new:
            addresses = pod_addresses(new)
            _index(self._pods_at, addresses, key)
            _index(self._pods_in, [key.namespace], key)
            _index(self._pods_on, [new.spec.node_name], key)
            self._changes.addresses.update(addresses)
            self.pods[key] = new

    def _set_node(self, name: str, new: Node | None) -> None:
        old_object = self.node_objects.get(name)
        if old_object == new:
            return
        self._changes.nodes.add(name)
        old, info = self.nodes.get(name), node_info(new) if new else None
        if new and info:
            self.node_objects[name] = new
            self.nodes.put(info)
        else:
            del self.node_objects[name]
            self.nodes.remove(name)
        if old != info:
            self._node_moved(name, old, info)

    def _node_moved(self, name: str, old: NodeInfo | None, new: NodeInfo | None) -> None:
        """A node's addresses or zone are others now: so are the entries made from them."""
        self._changes.addresses.update(old.addresses if old else (), new.addresses if new else ())
        if name == self.nodes.own:
            self._changes.services.update(self.services)
            return
        # endpoints without a node name ("") find their node by its address
        for slices in (self._slices_on.get(name, ()), self._slices_on.get("", ())):
            self._changes.services.update(self.slices[k].service for k in slices)


def _nodes_of(found: EndpointSlice) -> set[str]:
    return {endpoint.node_name or "" for endpoint in found.endpoints or ()}


def _index(index: dict[K, set[ObjectKey]], values: Iterable[K], key: ObjectKey) -> None:
    for value in values:
        index.setdefault(value, set()).add(key)


def _unindex(index: dict[K, set[ObjectKey]], values: Iterable[K], key: ObjectKey) -> None:
    for value in values:
        index[value].discard(key)
        if not index[value]:
            del index[value]

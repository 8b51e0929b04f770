# SPDX-License-Identifier: Apache-2.0
"""Nodes by name and by address, and which of them is this one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from bpfdp_agent.model.addresses import mapped, packed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bpfdp_agent.watch.wire import Node

ZONE_LABEL = "topology.kubernetes.io/zone"
KUBE_PROXY_LABEL = "bpfdataplane.io/kube-proxy"
"""kube-proxy stays on nodes where this is "true"."""


class NodeInfo(msgspec.Struct, frozen=True):
    """What others need to know of a node.

    `tunnel` is its first InternalIP as 16 bytes (the outer address for both families; empty when
    the node has none). `addresses` are its InternalIPs and ExternalIPs.
    """

    name: str
    addresses: tuple[bytes, ...]
    tunnel: bytes
    zone: str
    keeps_kube_proxy: bool = False


def node_info(node: Node) -> NodeInfo:
    """What others need of the API server's object; unreadable addresses are left out."""
    known = {
        kind: tuple(
            address
            for a in node.status.addresses
            if a.type == kind and (address := packed(a.address)) is not None
        )
        for kind in ("InternalIP", "ExternalIP")
    }
    internal = known["InternalIP"]
    return NodeInfo(
        name=node.metadata.name,
        addresses=tuple(dict.fromkeys(internal + known["ExternalIP"])),
        tunnel=mapped(internal[0]) if internal else b"",
        zone=node.metadata.labels.get(ZONE_LABEL, ""),
        keeps_kube_proxy=node.metadata.labels.get(KUBE_PROXY_LABEL) == "true",
    )


TO_BE_DELETED_TAINT = "ToBeDeletedByClusterAutoscaler"


def eligible(node: Node | None) -> bool:
    """Whether load balancers should send to the node: not while it is going (KEP-3836)."""
    if node is None or node.metadata.deletion_timestamp:
        return False
    return all(taint.key != TO_BE_DELETED_TAINT for taint in node.spec.taints)


class NodeIndex:
    """Nodes by name and by address. `own` is the name of the node the agent runs on."""

    def __init__(self, own: str) -> None:
        self.own = own
        self._nodes: dict[str, NodeInfo] = {}
        self._by_address: dict[bytes, set[str]] = {}

    def put(self, node: NodeInfo) -> None:
        """Add or replace a node."""
        self.remove(node.name)
        self._nodes[node.name] = node
        for address in node.addresses:
            self._by_address.setdefault(address, set()).add(node.name)

    def remove(self, name: str) -> None:
        """Forget a node, if known."""
        node = self._nodes.pop(name, None)
        for address in node.addresses if node else ():
            names = self._by_address[address]
            names.discard(name)
            if not names:
                del self._by_address[address]

    def get(self, name: str) -> NodeInfo | None:
        """A node by name."""
        return self._nodes.get(name)

    def at(self, address: bytes) -> NodeInfo | None:
        """The node with this address; where several claim it, this node, else the first by name."""
        names = self._by_address.get(address)
        if not names:
            return None
        return self._nodes[self.own if self.own in names else min(names)]

    @property
    def own_addresses(self) -> tuple[bytes, ...]:
        """This node's addresses as the API server knows them."""
        own = self._nodes.get(self.own)
        return own.addresses if own else ()

    @property
    def zone(self) -> str:
        """This node's zone; empty when it has none."""
        own = self._nodes.get(self.own)
        return own.zone if own else ""

    @property
    def keeps_kube_proxy(self) -> bool:
        """Whether kube-proxy stays on this node when it leaves the others."""
        own = self._nodes.get(self.own)
        return own is not None and own.keeps_kube_proxy

    def __iter__(self) -> Iterator[NodeInfo]:
        return iter(self._nodes.values())

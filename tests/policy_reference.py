# SPDX-License-Identifier: Apache-2.0
"""What NetworkPolicy means, said as plainly as can be: the judge of the compiler.

Independent of the agent but for the API's own structs. Never fast, never shared, never clever.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from bpfdp_agent.watch.wire import (
    LabelSelector,
    NetworkPolicy,
    NetworkPolicyPeer,
    NetworkPolicyPort,
)

NUMBERS = {"TCP": 6, "UDP": 17, "SCTP": 132}


@dataclass(frozen=True)
class RefPod:
    namespace: str
    labels: dict[str, str]
    address: str
    ports: dict[tuple[str, str], int] = field(default_factory=dict)  # (name, "TCP") → number


@dataclass(frozen=True)
class Connection:
    """What one end sees: the other end's address (and pod, if it is one), protocol, port.

    `destination` is the pod connected to, if it is one: the one whose port names count.
    """

    peer_address: str
    peer: RefPod | None
    protocol: int
    port: int
    destination: RefPod | None


def allowed(
    policies: list[NetworkPolicy],
    namespaces: dict[str, dict[str, str]],
    pod: RefPod,
    direction: str,
    connection: Connection,
) -> bool:
    """Whether the pod may have the connection in this direction ("ingress" or "egress")."""
    isolating = [p for p in policies if isolates(p, pod, direction)]
    if not isolating:
        return True
    for policy in isolating:
        for rule in policy.spec.ingress if direction == "ingress" else policy.spec.egress:
            peers = rule.from_ if direction == "ingress" else rule.to
            if peer_matches(peers, policy.metadata.namespace, namespaces, connection, rule.ports):
                return True
    return False


def isolates(policy: NetworkPolicy, pod: RefPod, direction: str) -> bool:
    types = policy.spec.policy_types
    if not types:
        types = ("Ingress", "Egress") if policy.spec.egress else ("Ingress",)
    return (
        policy.metadata.namespace == pod.namespace
        and direction.capitalize() in types
        and selector_matches(policy.spec.pod_selector, pod.labels)
    )


def peer_matches(
    peers: tuple[NetworkPolicyPeer, ...],
    namespace: str,
    namespaces: dict[str, dict[str, str]],
    connection: Connection,
    ports: tuple[NetworkPolicyPort, ...],
) -> bool:
    """Whether some peer of the rule is the other end, on a port that it allows."""
    for peer in peers or (None,):
        if peer is None or one_peer_matches(peer, namespace, namespaces, connection):
            names_count = peer is None or peer.ip_block is None
            if not ports or any(port_matches(p, connection, names_count) for p in ports):
                return True
    return False


def one_peer_matches(
    peer: NetworkPolicyPeer,
    namespace: str,
    namespaces: dict[str, dict[str, str]],
    connection: Connection,
) -> bool:
    if peer.ip_block is not None:
        address = ipaddress.ip_address(connection.peer_address)
        inside = address in ipaddress.ip_network(peer.ip_block.cidr, strict=False)
        return inside and not any(
            address in ipaddress.ip_network(e, strict=False) for e in peer.ip_block.except_
        )
    other = connection.peer
    if other is None:
        return False
    if peer.namespace_selector is None:
        if other.namespace != namespace:
            return False
    elif other.namespace not in namespaces or not selector_matches(
        peer.namespace_selector, namespaces[other.namespace]
    ):
        return False
    return peer.pod_selector is None or selector_matches(peer.pod_selector, other.labels)


def port_matches(port: NetworkPolicyPort, connection: Connection, names_count: bool) -> bool:
    if connection.protocol != NUMBERS[port.protocol]:
        return False
    if port.port is None:
        return True
    if isinstance(port.port, str):
        if connection.destination is None:
            return False
        # A name is resolved on the destination. An ingress ipBlock has one (the selected pod);
        # an egress ipBlock does not: it stands for addresses, not pods.
        if not names_count and connection.destination is connection.peer:
            return False
        return connection.destination.ports.get((port.port, port.protocol)) == connection.port
    return port.port <= connection.port <= (port.end_port or port.port)


def selector_matches(selector: LabelSelector, labels: dict[str, str]) -> bool:
    for key, value in selector.match_labels.items():
        if labels.get(key) != value:
            return False
    for expression in selector.match_expressions:
        present = expression.key in labels
        listed = labels.get(expression.key) in expression.values
        if not {
            "In": present and listed,
            "NotIn": not present or not listed,
            "Exists": present,
            "DoesNotExist": not present,
        }[expression.operator]:
            return False
    return True

# SPDX-License-Identifier: Apache-2.0
"""What the dataplane and policy need of a pod."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from bpfdp_agent.model.addresses import packed
from bpfdp_agent.model.protocols import PROTOCOLS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bpfdp_agent.watch.wire import Pod


class PodLink(msgspec.Struct, frozen=True):
    """A pod's host-side veth and the addresses inside, as found through its network namespace."""

    addresses: tuple[bytes, ...]
    ifindex: int
    netns: str = ""
    """The namespace's name under /run/netns."""
    netns_cookie: int = 0


class NamedPort(msgspec.Struct, frozen=True, order=True):
    """A container port that policies and services may call by name; protocol is IPPROTO_*."""

    name: str
    protocol: int
    port: int


def pod_addresses(pod: Pod) -> tuple[bytes, ...]:
    """Its addresses; none for host-network pods, whose addresses are the node's, and ended ones."""
    if pod.spec.host_network or pod.terminated:
        return ()
    found = (packed(p.ip) for p in pod.status.pod_ips)
    return tuple(dict.fromkeys(a for a in found if a is not None))


def named_ports(pod: Pod) -> tuple[NamedPort, ...]:
    """The named ports of all containers, sorted; init containers too (some are sidecars)."""
    found = {
        NamedPort(port.name, PROTOCOLS[port.protocol], port.container_port)
        for container in (*pod.spec.containers, *pod.spec.init_containers)
        for port in container.ports
        if port.name and port.protocol in PROTOCOLS
    }
    return tuple(sorted(found))


def holder(pods: Iterable[Pod]) -> Pod | None:
    """Which of the pods that claim an address has it: the living before the leaving, the newest."""
    return max(
        pods,
        key=lambda p: (
            p.metadata.deletion_timestamp is None,
            p.metadata.creation_timestamp or "",
            p.metadata.uid,
        ),
        default=None,
    )

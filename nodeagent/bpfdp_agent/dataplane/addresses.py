# SPDX-License-Identifier: Apache-2.0
"""This node's own devices and addresses.

`NodeWatcher(pattern).snapshots()` yields the NodeLinks at first and after each change. `links.py`
has `netns_cookie()` for the cgroup programs.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bpfdp_agent.dataplane.links import (
    RTMGRP_IPV4_IFADDR,
    RTMGRP_IPV6_IFADDR,
    RTMGRP_LINK,
    Link,
    Monitor,
    fetch_links,
    wait_any,
)
from bpfdp_agent.dataplane.tunnel import OUR_DEVICES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

log = logging.getLogger(__name__)

DATA_PATTERN = "^(en|eth|wl|bond|ib).*"
"""Devices that lead to other nodes and clients, where the CR does not say otherwise."""
SETTLE_SECONDS = 0.1
LOOK_AGAIN_SECONDS = 60.0

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class NodeLinks:
    """`data`: the devices that match the pattern and are up.

    `addresses` holds the global addresses of every device, `vxlans` every VXLAN device but ours.
    """

    data: tuple[Link, ...]
    addresses: tuple[IPAddress, ...]
    vxlans: tuple[Link, ...] = ()

    @property
    def overlays(self) -> tuple[Link, ...]:
        """The CNI's VXLAN devices that routes lead to: the way to the pods of other nodes.

        One that is told per packet where to send (`external`) needs what only the stack has, and a
        bridge's port is no way of the node's own.
        """
        named = {link.ifindex for link in self.data}
        return tuple(
            link
            for link in self.vxlans
            if link.up and not link.external and not link.enslaved and link.ifindex not in named
        )

    def device_of(self, address: IPAddress) -> Link | None:
        """The data device that carries the address."""
        for link in self.data:
            if any(own.ip == address for own in link.addresses):
                return link
        return None

    def main_device(self, node_addresses: Iterable[IPAddress]) -> Link | None:
        """The device other nodes are reached through: that of a node address, else the first."""
        for address in node_addresses:
            if (found := self.device_of(address)) is not None:
                return found
        return self.data[0] if self.data else None


def select(links: Sequence[Link], pattern: str) -> NodeLinks:
    """What of the devices is data, and every own address. re.error for a bad pattern."""
    expression = re.compile(pattern or DATA_PATTERN)
    data = [link for link in links if link.up and expression.search(link.name)]
    vxlans = [link for link in links if link.kind == "vxlan" and link.name not in OUR_DEVICES]
    own = {address.ip for link in links for address in link.addresses}
    return NodeLinks(
        data=tuple(sorted(data, key=lambda link: link.ifindex)),
        addresses=tuple(sorted(own, key=lambda a: (a.version, int(a)))),
        vxlans=tuple(sorted(vxlans, key=lambda link: link.ifindex)),
    )


class NodeWatcher:
    """Follows this namespace's devices; `pattern` selects the data devices."""

    def __init__(self, pattern: str = DATA_PATTERN) -> None:
        self.pattern = pattern

    async def read(self) -> NodeLinks:
        """The devices and addresses now."""
        return select(await fetch_links(), self.pattern)

    async def snapshots(self) -> AsyncIterator[NodeLinks]:
        """Now and after each change. Never ends; raises DeviceFailed."""
        changed = asyncio.Event()
        last: NodeLinks | None = None
        groups = RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR
        async with Monitor(groups, changed):
            while True:
                current = await self.read()
                if current != last:
                    last = current
                    yield current
                await wait_any(changed, LOOK_AGAIN_SECONDS)
                await asyncio.sleep(SETTLE_SECONDS)

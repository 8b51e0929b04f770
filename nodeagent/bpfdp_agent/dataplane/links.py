# SPDX-License-Identifier: Apache-2.0
"""Reading links and addresses of a network namespace, and hearing when they change."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyroute2

from bpfdp_agent.bpf.errors import DeviceFailed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Address = ipaddress.IPv4Interface | ipaddress.IPv6Interface

RTMGRP_LINK = 0x1
RTMGRP_IPV4_IFADDR = 0x10
RTMGRP_IPV6_IFADDR = 0x100

_IFF_UP = 0x1
_SCOPE_UNIVERSE = 0
_NO_NSID = 0xFFFFFFFF
_TENTATIVE_FAILED = 0x08  # IFA_F_DADFAILED


@dataclass(frozen=True, slots=True)
class Link:
    """One device. `peer` is IFLA_LINK: a veth's other end, counted in that end's namespace.

    `peer_netns` is this namespace's number for the one the peer is in, None: this one.
    """

    ifindex: int
    name: str
    kind: str
    peer: int
    peer_netns: int | None
    mac: str
    mtu: int
    up: bool
    addresses: tuple[Address, ...] = ()
    """Global addresses."""
    vxlan_port: int = 0
    """UDP port of a VXLAN device."""
    external: bool = False
    """A VXLAN device that is told per packet where it goes (collect-metadata)."""
    enslaved: bool = False
    """A port of a bridge or bond."""


def read_links() -> list[Link]:
    """The calling thread's namespace. Blocking (a millisecond); not inside a running event loop."""
    with pyroute2.IPRoute() as netlink:
        return _links(netlink.get_links(), netlink.get_addr())


def number_of_netns(descriptor: int) -> int:
    """What the calling thread's namespace calls the one behind the descriptor; -1: not known to it.

    Two namespaces know each other when a device of one has its other end in the other.
    """
    with pyroute2.IPRoute() as netlink:
        number = netlink.get_netnsid(fd=descriptor)["nsid"]
    return -1 if number == _NO_NSID else int(number)


@contextlib.contextmanager
def netlink_errors(doing: str) -> Iterator[None]:
    """Turn pyroute2's errors into DeviceFailed."""
    try:
        yield
    except pyroute2.NetlinkError as error:
        raise DeviceFailed(f"cannot {doing}: {error}") from error


async def fetch_links() -> list[Link]:
    """The same for an event loop. Raises DeviceFailed."""
    with netlink_errors("read this node's devices"):
        return await _fetch_links()


async def _fetch_links() -> list[Link]:
    async with pyroute2.AsyncIPRoute() as netlink:
        links = [each async for each in await netlink.get_links()]
        addresses = [each async for each in await netlink.get_addr()]
    return _links(links, addresses)


def _links(links: Iterable[Any], addresses: Iterable[Any]) -> list[Link]:
    by_link: dict[int, list[Address]] = {}
    for message in addresses:
        if message["scope"] != _SCOPE_UNIVERSE:
            continue
        flags = message.get_attr("IFA_FLAGS") or 0
        text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
        if text is None or flags & _TENTATIVE_FAILED:
            continue
        address = ipaddress.ip_interface(f"{text}/{message['prefixlen']}")
        by_link.setdefault(message["index"], []).append(address)
    return [_link(message, by_link.get(message["index"], [])) for message in links]


def _link(message: Any, addresses: list[Address]) -> Link:
    info = message.get_attr("IFLA_LINKINFO")
    kind = (info.get_attr("IFLA_INFO_KIND") or "") if info is not None else ""
    vxlan = info.get_attr("IFLA_INFO_DATA") if kind == "vxlan" else None
    return Link(
        ifindex=message["index"],
        name=message.get_attr("IFLA_IFNAME") or "",
        kind=kind,
        peer=message.get_attr("IFLA_LINK") or 0,
        peer_netns=message.get_attr("IFLA_LINK_NETNSID"),
        mac=message.get_attr("IFLA_ADDRESS") or "",
        mtu=message.get_attr("IFLA_MTU") or 0,
        up=bool(message["flags"] & _IFF_UP),
        addresses=tuple(sorted(addresses, key=lambda a: (a.version, int(a)))),
        vxlan_port=(vxlan.get_attr("IFLA_VXLAN_PORT") or 0) if vxlan is not None else 0,
        external=vxlan is not None and bool(vxlan.get_attr("IFLA_VXLAN_COLLECT_METADATA")),
        enslaved=bool(message.get_attr("IFLA_MASTER")),
    )


class Monitor:
    """Sets `event` when links or addresses of this namespace change; open with `async with`.

    The messages themselves are thrown away: whoever waits reads the state again, so that a lost
    message (ENOBUFS) costs nothing.
    """

    def __init__(self, groups: int, event: asyncio.Event) -> None:
        self._groups = groups
        self._event = event
        self._socket: socket.socket | None = None

    async def __aenter__(self) -> Monitor:
        opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        opened.setblocking(False)
        opened.bind((0, self._groups))
        asyncio.get_running_loop().add_reader(opened, self._drain)
        self._socket = opened
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def _drain(self) -> None:
        assert self._socket is not None
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    self._socket.recv(65536)
                except BlockingIOError:
                    raise
                except OSError:  # ENOBUFS: messages were lost, which says as much as having them
                    break
        self._event.set()


async def wait_any(event: asyncio.Event, seconds: float) -> None:
    """Until the event is set (then cleared) or the time is over."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)
    event.clear()


def netns_cookie() -> int:
    """The kernel's number of this network namespace, as bpf_get_netns_cookie() gives it."""
    so_netns_cookie = 71
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        raw = probe.getsockopt(socket.SOL_SOCKET, so_netns_cookie, 8)
    (cookie,) = struct.unpack("=Q", raw)
    return int(cookie)

# SPDX-License-Identifier: Apache-2.0
"""The VXLAN device through which nodes hand each other packets of outside clients.

One device in collect-metadata mode: programs say per packet which node it goes to. It has no
addresses; both families use it.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyroute2

from bpfdp_agent.bpf.errors import DeviceFailed
from bpfdp_agent.dataplane.links import netlink_errors

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bpfdp_agent.dataplane.links import Link

DEVICE = "bpfdp_vxlan"
_NEW_DEVICE = "bpfdp_vxlan_new"
OUR_DEVICES = frozenset({DEVICE, _NEW_DEVICE})
OVERHEAD = 70
"""Bytes VXLAN adds over IPv6: outer IPv6 40, UDP 8, VXLAN 8, inner Ethernet 14 (IPv4: 50)."""
_SYSCTL = Path("/proc/sys/net")


async def ensure(port: int, mtu: int) -> int:
    """Make the device with this UDP port and MTU, up; returns its ifindex.

    A device with another port is replaced. Raises DeviceFailed, naming the remedy, when the port
    or the name is taken.
    """
    async with pyroute2.AsyncIPRoute() as netlink:
        try:
            return await _ensure(netlink, port, mtu)
        except pyroute2.NetlinkError as error:
            raise _explained(error, port) from error


async def remove() -> bool:
    """Remove the device; False when there was none. Raises DeviceFailed."""
    with netlink_errors(f"remove {DEVICE}"):
        return await _remove()


async def _remove() -> bool:
    async with pyroute2.AsyncIPRoute() as netlink:
        links = [await _find(netlink, name) for name in (DEVICE, _NEW_DEVICE)]
        found = [link for link in links if link is not None]
        for link in found:
            await netlink.link("del", index=link["index"])
        return bool(found)


async def _ensure(netlink: Any, port: int, mtu: int) -> int:
    link = await _find(netlink, DEVICE)
    if link is None or not _is_wanted(link, port):
        link = await _replace(netlink, link, port)
    index = int(link["index"])
    if mtu and link.get_attr("IFLA_MTU") != mtu:
        await netlink.link("set", index=index, mtu=mtu)
    await netlink.link("set", index=index, state="up")
    return index


async def _replace(netlink: Any, old: Any | None, port: int) -> Any:
    """A new device in the old one's place, which goes only when the new one could be made."""
    leftover = await _find(netlink, _NEW_DEVICE)
    if leftover is not None:
        await netlink.link("del", index=leftover["index"])
    await netlink.link(
        "add",
        ifname=_NEW_DEVICE,
        kind="vxlan",
        vxlan_collect_metadata=True,
        vxlan_port=port,
        vxlan_learning=False,
    )
    made = await _find(netlink, _NEW_DEVICE)
    if made is None:
        raise DeviceFailed(f"{_NEW_DEVICE} vanished: is another agent running on this node?")
    if old is not None:
        await netlink.link("del", index=old["index"])
    await netlink.link("set", index=made["index"], ifname=DEVICE)
    _quiet()
    return made


async def _find(netlink: Any, name: str) -> Any | None:
    """The device, from a dump: asking for a name that is not there would be an error.

    A dump is read to its end, or the socket's next one fails with EBUSY.
    """
    links = [link async for link in await netlink.get_links()]
    return next((link for link in links if link.get_attr("IFLA_IFNAME") == name), None)


def _is_wanted(link: Any, port: int) -> bool:
    info = link.get_attr("IFLA_LINKINFO")
    if info is None or info.get_attr("IFLA_INFO_KIND") != "vxlan":
        return False
    data = info.get_attr("IFLA_INFO_DATA")
    return (
        bool(data.get_attr("IFLA_VXLAN_COLLECT_METADATA"))
        and data.get_attr("IFLA_VXLAN_PORT") == port
    )


def _quiet() -> None:
    """No link-local address (and no router solicitations), no reverse path check on the device.

    Packets of outside clients arrive on it, whose way back is another device.
    """
    for setting, value in (
        (f"ipv6/conf/{DEVICE}/disable_ipv6", "0"),
        (f"ipv6/conf/{DEVICE}/addr_gen_mode", "1"),
        (f"ipv6/conf/{DEVICE}/accept_ra", "0"),
        (f"ipv4/conf/{DEVICE}/rp_filter", "0"),
    ):
        try:
            (_SYSCTL / setting).write_text(value)
        except OSError:
            continue  # read-only /proc/sys or no IPv6: the device works without


def check_port(port: int, others: Iterable[Link]) -> None:
    """Raises DeviceFailed when another VXLAN device has the port, up or not.

    Were ours made first, it would be the CNI's that cannot come up.
    """
    for link in others:
        if link.vxlan_port == port:
            raise DeviceFailed(_taken(port, f"VXLAN device {link.name}"))


def _taken(port: int, by: str) -> str:
    return (
        f"UDP port {port}, which the tunnel between nodes wants, is in use on this node by {by}:"
        " choose another port in spec.tunnel.port of the BpfDataplaneConfig"
    )


def _explained(error: Any, port: int) -> DeviceFailed:
    if error.code in (errno.EADDRINUSE, errno.EEXIST):
        return DeviceFailed(_taken(port, "another tunnel (the CNI's?) or program"))
    if error.code == errno.EOPNOTSUPP:
        return DeviceFailed("the kernel has no VXLAN: use one with CONFIG_VXLAN")
    return DeviceFailed(f"cannot set up {DEVICE}: {error}")

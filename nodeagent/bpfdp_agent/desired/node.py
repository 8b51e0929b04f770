# SPDX-License-Identifier: Apache-2.0
"""This node and the others: `settings`, `interfaces`, `own_addresses`, `nodes`, `dsr_optout`."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

import msgspec

from bpfdp_agent.layouts import (
    ADDRESS_KEY,
    CIDR_KEY,
    INDEX,
    NODE_KEY,
    SETTINGS,
    U32,
    NodeFlag,
    SettingsFlag,
)
from bpfdp_agent.model.addresses import cidr, contains, family_of, mapped, packed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bpfdp_agent.model.nodes import NodeIndex

OWN = 0
NODE_PORTS = 1
"""Bits of an own_addresses value: NODE_PORTS where NodePorts are served on the address."""

_IPv4_UNDERLAY, _IPv6_UNDERLAY = 50, 70
"""Bytes that VXLAN adds: outer IP 20 or 40, UDP 8, VXLAN 8, inner Ethernet 14."""
LEAST_MTU = 1280


class NodeFacts(msgspec.Struct, frozen=True):
    """What the settings map tells the programs. Interface numbers are 0 where there is none."""

    netns_cookie: int
    data_ifindex: int
    tunnel_ifindex: int
    tunnel_vni: int
    tunnel_port: int
    addresses: tuple[bytes, ...]
    """The node's own, the main one of each family first."""
    dsr: bool = False
    policy_disabled: bool = False
    maglev: bool = False
    connect_tcp: bool = False
    connect_udp: bool = False
    connect_udp_used: bool = False
    """Pods' UDP sockets may be translated: connect_udp was set before."""
    overlay_port: int = 0
    """UDP port of the CNI's VXLAN."""


def settings_entries(facts: NodeFacts) -> dict[bytes, bytes]:
    """The one entry of `settings`."""
    flags = SettingsFlag(0)
    if facts.dsr:
        flags |= SettingsFlag.DSR
    if facts.policy_disabled:
        flags |= SettingsFlag.POLICY_DISABLED
    if facts.maglev:
        flags |= SettingsFlag.MAGLEV
    if facts.connect_tcp:
        flags |= SettingsFlag.CONNECT_TCP
    if facts.connect_udp:
        flags |= SettingsFlag.CONNECT_UDP
    if facts.connect_udp or facts.connect_udp_used:
        flags |= SettingsFlag.CONNECT_UDP_USED
    value = SETTINGS.pack(
        4,
        host_netns_cookie=facts.netns_cookie,
        data_ifindex=facts.data_ifindex,
        tunnel_ifindex=facts.tunnel_ifindex,
        tunnel_vni=facts.tunnel_vni,
        tunnel_port=facts.tunnel_port,
        overlay_port=facts.overlay_port,
        flags=flags,
        node4=first_of(facts.addresses, 4) or bytes(4),
        node6=first_of(facts.addresses, 6) or bytes(16),
    )
    return {INDEX.pack(4, index=0): value}


def interface_entries(numbers: Iterable[int]) -> dict[bytes, bytes]:
    """`interfaces`: the devices that packets may be sent out of past the stack."""
    return {INDEX.pack(4, index=number): U32.pack(4, value=1) for number in numbers}


def first_of(addresses: Iterable[bytes], family: int) -> bytes | None:
    """The first address of a family."""
    return next((a for a in addresses if family_of(a) == family), None)


def own_address_entries(
    addresses: Iterable[bytes], family: int, node_port_addresses: Iterable[str]
) -> dict[bytes, bytes]:
    """`own_addresses` of a family. No node_port_addresses: NodePorts are served on all."""
    networks = _networks(node_port_addresses)
    entries = {}
    for address in addresses:
        if family_of(address) == family:
            value = NODE_PORTS if _serves_node_ports(address, networks) else OWN
            entries[ADDRESS_KEY.pack(family, addr=address)] = U32.pack(family, value=value)
    return entries


def node_entries(nodes: NodeIndex, node_port_addresses: Iterable[str]) -> dict[bytes, bytes]:
    """`nodes`: the addresses of all other nodes, whose tunnel packets are believed."""
    networks = _networks(node_port_addresses)
    return {
        NODE_KEY.pack(4, addr=mapped(address)): U32.pack(4, value=_node_flags(address, networks))
        for node in nodes
        if node.name != nodes.own
        for address in node.addresses
    }


def _node_flags(address: bytes, networks: list[tuple[int, bytes]]) -> NodeFlag:
    served = _serves_node_ports(address, networks)
    return NodeFlag.KNOWN | NodeFlag.PORTS if served else NodeFlag.KNOWN


def _networks(node_port_addresses: Iterable[str]) -> list[tuple[int, bytes]]:
    return [n for text in node_port_addresses if (n := cidr(text)) is not None]


def _serves_node_ports(address: bytes, networks: list[tuple[int, bytes]]) -> bool:
    return not networks or any(contains(n, address) for n in networks)


def cidr_entries(networks: Iterable[str], family: int) -> dict[bytes, bytes]:
    """`dsr_optout` or `service_ranges` of a family."""
    found = (cidr(text) for text in networks)
    return {
        CIDR_KEY.pack(family, prefixlen=n[0], addr=n[1]): U32.pack(family, value=1)
        for n in found
        if n is not None and family_of(n[1]) == family
    }


def tunnel_mtu(wanted: int, device_mtu: int, tunnel_address: bytes) -> int:
    """The tunnel device's MTU: as configured, else what fits the underlying device."""
    if wanted or not device_mtu:
        return wanted
    overhead = _IPv6_UNDERLAY if family_of_mapped(tunnel_address) == 6 else _IPv4_UNDERLAY
    return max(device_mtu - overhead, LEAST_MTU)


def family_of_mapped(address: bytes) -> int:
    """Family of a 16-byte address in which IPv4 is ::ffff:a.b.c.d."""
    return 4 if address.startswith(mapped(bytes(4))[:12]) else 6


def packed_all(texts: Iterable[object]) -> tuple[bytes, ...]:
    """Addresses as bytes; what is no address is left out."""
    return tuple(a for text in texts if (a := packed(str(text))) is not None)


def as_text(address: bytes) -> str:
    """An address for people."""
    return str(ipaddress.ip_address(address))

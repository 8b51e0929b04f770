# SPDX-License-Identifier: Apache-2.0
"""The node itself: its devices, addresses and tunnel, and the maps that tell programs of them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from bpfdp_agent.bpf.errors import DeviceFailed
from bpfdp_agent.dataplane import tunnel
from bpfdp_agent.dataplane.addresses import NodeLinks, NodeWatcher
from bpfdp_agent.dataplane.links import netns_cookie
from bpfdp_agent.desired.node import (
    NodeFacts,
    as_text,
    cidr_entries,
    interface_entries,
    node_entries,
    own_address_entries,
    packed_all,
    settings_entries,
    tunnel_mtu,
)
from bpfdp_agent.diff.tables import replace
from bpfdp_agent.layouts import FAMILIES
from bpfdp_agent.model.addresses import mapped
from bpfdp_agent.reconcile.connections import udp_translated_in_pods
from bpfdp_agent.watch.wire import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bpfdp_agent.config import Config
    from bpfdp_agent.dataplane.links import Link
    from bpfdp_agent.dataplane.maps import MapStore
    from bpfdp_agent.reconcile.surroundings import Surroundings

log = logging.getLogger(__name__)

MAX_ADDRESSES = 256


class NodeSync:
    """Follows the node's links and the other nodes. `complete` after the first round."""

    def __init__(self, around: Surroundings, maps: MapStore, changed: Callable[[], None]) -> None:
        self._around = around
        self._maps = maps
        self._changed = changed
        self._config: Config | None = None
        self._cookie = netns_cookie()
        self.complete = False
        self.links: NodeLinks | None = None
        self.tunnel_ifindex = 0

    def configure(self, config: Config) -> None:
        """Take a new config; the links are selected anew."""
        self._config = config

    async def follow(self, pattern: str, wake: Callable[[], None]) -> None:
        """Keep `links` current until cancelled."""
        async for links in NodeWatcher(pattern).snapshots():
            self.links = links
            wake()

    @property
    def addresses(self) -> tuple[bytes, ...]:
        """Every own address: the API server's InternalIPs first, then all of the devices'."""
        given = packed_all(self._around.settings.node_ips)
        found = packed_all(self.links.addresses) if self.links else ()
        known = self._around.view.nodes.own_addresses
        return tuple(dict.fromkeys((*known, *given, *found)))

    @property
    def devices(self) -> tuple[Link, ...]:
        """Devices with from_net and to_net: the data devices and the CNI's overlay."""
        return (*self.links.data, *self.links.overlays) if self.links else ()

    def main_device(self) -> Link | None:
        """The device other nodes are reached through."""
        if self.links is None:
            return None
        here = {
            packed_all([link.ip])[0]: each for each in self.links.data for link in each.addresses
        }
        known = (here[a] for a in self.addresses if a in here)
        return next(known, self.links.data[0] if self.links.data else None)

    async def reconcile(self) -> int:
        """Tunnel device, then the maps. Waits for the links and the list of nodes."""
        config = self._config
        if config is None or self.links is None or not self._around.view.synced(Kind.NODE):
            return 0
        device = self.main_device()
        if device is None:
            log.warning(
                "no interface matches spec.interfaces.dataPattern %r: outside clients and other"
                " nodes are not served here",
                config.data_pattern,
            )
        try:
            await self._ensure_tunnel(config, device)
        except DeviceFailed as error:
            if not self.complete:
                self._around.status.condition("Attached", False, "AgentNotReady", str(error))
            raise
        facts = NodeFacts(
            netns_cookie=self._cookie,
            data_ifindex=device.ifindex if device else 0,
            tunnel_ifindex=self.tunnel_ifindex,
            tunnel_vni=config.tunnel_vni,
            tunnel_port=config.tunnel_port,
            addresses=self.addresses,
            dsr=config.dsr,
            policy_disabled=not config.policy_enabled,
            maglev=config.maglev,
            connect_tcp=config.connect_tcp,
            connect_udp=config.connect_udp,
            connect_udp_used=udp_translated_in_pods(self._maps),
            overlay_port=next((o.vxlan_port for o in self.links.vxlans), 0),
        )
        operations = self._write_maps(config, facts)
        texts = sorted(as_text(a) for a in facts.addresses)
        self._around.status.update(addresses=tuple(texts[:MAX_ADDRESSES]))
        self.complete = True
        self._changed()
        return operations

    async def _ensure_tunnel(self, config: Config, device: Link | None) -> None:
        if self.links:
            tunnel.check_port(config.tunnel_port, self.links.vxlans)
        own = self._around.view.nodes.get(self._around.view.nodes.own)
        address = own.tunnel if own and own.tunnel else mapped(bytes(4))
        mtu = tunnel_mtu(config.tunnel_mtu, device.mtu if device else 0, address)
        self.tunnel_ifindex = await tunnel.ensure(config.tunnel_port, mtu)

    def _write_maps(self, config: Config, facts: NodeFacts) -> int:
        others = node_entries(self._around.view.nodes, config.node_port_addresses)
        operations = self._replace("nodes", 4, others)
        usable = interface_entries(device.ifindex for device in self.devices)
        operations += self._replace("interfaces", 4, usable)
        for family in FAMILIES:
            own = own_address_entries(facts.addresses, family, config.node_port_addresses)
            operations += self._replace("own_addresses", family, own)
            operations += self._replace(
                "dsr_optout", family, cidr_entries(config.dsr_optout, family)
            )
            operations += self._write_service_ranges(family)
        return operations + self._replace("settings", 4, settings_entries(facts))

    def _write_service_ranges(self, family: int) -> int:
        view = self._around.view
        if not view.synced(Kind.SERVICE_CIDR):
            return 0
        networks = [text for each in view.service_ranges.values() for text in each.spec.cidrs]
        return self._replace("service_ranges", family, cidr_entries(networks, family))

    def _replace(self, name: str, family: int, desired: Mapping[bytes, bytes]) -> int:
        writes = replace(name, family, self._maps.read(name, family), desired)
        for step in writes:
            self._maps.write(name, family, step.puts, step.deletes)
        return len(writes)

# SPDX-License-Identifier: Apache-2.0
"""Connections: ageing the conntrack tables, and cutting UDP flows loose from dead backends."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import sys
from typing import TYPE_CHECKING

from bpfdp_agent.bpf import syscall
from bpfdp_agent.bpf.errors import BpfError
from bpfdp_agent.dataplane import conntrack, sockets
from bpfdp_agent.layouts import (
    BACKEND,
    FAMILIES,
    INDEX,
    SETTINGS,
    SOCKET_KEY,
    SettingsFlag,
    SocketKind,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from bpfdp_agent.dataplane.maps import MapStore
    from bpfdp_agent.reconcile.surroundings import Surroundings

log = logging.getLogger(__name__)

PERIOD = 15.0
USAGE_MAPS = (
    *("frontends", "slots", "backends", "members", "maglev", "source_ranges"),
    *("endpoints", "identities"),
)


class Connections:
    """One per Session."""

    def __init__(self, around: Surroundings, maps: MapStore) -> None:
        self._around = around
        self._maps = maps
        self.pod_namespaces: Callable[[], Iterable[str]] = tuple
        """Names under /run/netns; none until somebody who knows sets it."""

    async def run(self) -> None:
        """Collect what is old and count what maps hold, every PERIOD, until cancelled."""
        while True:
            try:
                await self.collect()
            except (BpfError, OSError) as error:
                self._around.report("conntrack", error)
            else:
                self._around.report("conntrack", None)
            await asyncio.sleep(PERIOD)

    async def collect(self) -> None:
        """One pass over both tables."""
        usage = {}
        for family in FAMILIES:
            table = self._maps["ct", family]
            seen = await conntrack.collect(table)
            left = seen.entries - seen.removed
            self._around.metrics.conntrack_entries.labels(str(family)).set(left)
            self._around.metrics.conntrack_removed.labels("age").inc(seen.removed)
            usage[table.name] = (left, table.info.max_entries)
            for name in USAGE_MAPS:
                each = self._maps[name, family]
                count = syscall.map_count(each.descriptor, each.info)
                usage[each.name] = (count, each.info.max_entries)
        for name, (used, room) in usage.items():
            self._around.metrics.map_entries.labels(name).set(used)
            self._around.metrics.map_max_entries.labels(name).set(room)
        self._around.status.maps(usage)

    async def forget_backends(self, family: int, gone: dict[bytes, bytes]) -> None:
        """UDP flows to these backends (entries of the map `backends`) choose anew at once."""
        ids = {INDEX.unpack(family, key)["index"] for key in gone}
        purged = await conntrack.purge_udp(self._maps["ct", family], ids)
        self._around.metrics.conntrack_removed.labels("backend gone").inc(purged)
        closed = await asyncio.to_thread(self._close_sockets, family, gone)
        if purged or closed:
            log.debug("%d UDP flows and %d sockets were on backends that went", purged, closed)

    def _close_sockets(self, family: int, gone: dict[bytes, bytes]) -> int:
        places = list(_places(family, gone.values()))
        table = self._maps["sockets", family]

        def translated(cookie: bytes, backend: sockets.Backend) -> bool:
            return table.lookup(_service_key(family, cookie, backend)) is not None

        closed = sockets.close_connected_udp(places, translated)
        if udp_translated_in_pods(self._maps):
            closed += sockets.close_in_pods(self.pod_namespaces(), places, translated)
        return closed


def udp_translated_in_pods(maps: MapStore) -> bool:
    """Whether there may be such sockets: the mode is or was Enabled since the node booted."""
    (value,) = maps.read("settings", 4).values()
    flags: int = SETTINGS.unpack(4, value)["flags"]
    return bool(flags & SettingsFlag.CONNECT_UDP_USED)


def _service_key(family: int, cookie: bytes, backend: sockets.Backend) -> bytes:
    address, port = backend
    return SOCKET_KEY.pack(
        family,
        cookie_low=int.from_bytes(cookie[:4], sys.byteorder),
        cookie_high=int.from_bytes(cookie[4:], sys.byteorder),
        addr=address.packed,
        port=port,
        proto=socket.IPPROTO_UDP,
        kind=SocketKind.SERVICE,
    )


def _places(family: int, values: Iterable[bytes]) -> Iterable[sockets.Backend]:
    for value in values:
        backend = BACKEND.unpack(family, value)
        yield ipaddress.ip_address(backend["addr"]), backend["port"]

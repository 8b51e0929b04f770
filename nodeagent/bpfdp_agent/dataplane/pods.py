# SPDX-License-Identifier: Apache-2.0
"""The pods of this node, found through their network namespaces, whatever the CNI is.

Every entry of /run/netns is a pod sandbox (or someone else's namespace: then it has no veth into
ours). A veth in it whose other end is a veth of ours, pointing back, is a pod's: its global
addresses are the pod's. `PodWatcher.snapshots()` yields the full list at first and after each
change. A namespace that vanishes while it is read is simply not in the list.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyroute2

from bpfdp_agent.bpf.errors import DeviceFailed
from bpfdp_agent.bpf.netns import in_netns
from bpfdp_agent.dataplane.inotify import DirectoryWatch
from bpfdp_agent.dataplane.links import (
    RTMGRP_LINK,
    Link,
    Monitor,
    fetch_links,
    netns_cookie,
    number_of_netns,
    read_links,
    wait_any,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

log = logging.getLogger(__name__)

NETNS_DIR = Path("/run/netns")
OWN_NETNS = Path("/proc/self/ns/net")
"""The main thread's, whichever namespace the calling thread is in."""
DEAF_SECONDS = 0.3
"""Time between looks while the directory cannot be watched."""
FULL_READ_SECONDS = 10.0
"""Every namespace is read again after this time, in case a pod's addresses changed."""
YOUNG_SECONDS = 0.1
"""A new namespace is read again after this time, doubling: nothing tells when a pod's end of the
veth gets an address, or the second one (listening inside would keep the namespace alive)."""
YOUNG_LIMIT = 15.0
"""Until this age a namespace counts as new."""
SETTLE_SECONDS = 0.02
"""A CNI makes several changes in a row: they are read once."""


@dataclass(frozen=True, slots=True)
class PodLink:
    """A pod's veth pair. `netns` is the namespace's file name; addresses as text, sorted."""

    netns: str
    netns_cookie: int
    ifindex: int
    """The host's end."""
    ifname: str
    host_mac: str
    pod_ifindex: int
    mac: str
    """The pod's end."""
    mtu: int
    addresses: tuple[str, ...]


class Inside(NamedTuple):
    """What was found in a namespace: its links and its SO_NETNS_COOKIE."""

    links: Sequence[Link]
    cookie: int


def match(netns: str, inside: Inside, host: Mapping[int, Link]) -> list[PodLink]:
    """The pairs between a namespace and the host: both are veths and name each other."""
    found = []
    for link in inside.links:
        other = host.get(link.peer)
        if link.kind != "veth" or other is None or other.kind != "veth":
            continue
        if other.peer != link.ifindex or not link.addresses:
            continue
        addresses = tuple(str(address.ip) for address in link.addresses)
        found.append(
            PodLink(
                netns=netns,
                netns_cookie=inside.cookie,
                ifindex=other.ifindex,
                ifname=other.name,
                host_mac=other.mac,
                pod_ifindex=link.ifindex,
                mac=link.mac,
                mtu=link.mtu,
                addresses=addresses,
            )
        )
    return found


def read_namespace(path: Path) -> Inside | None:
    """Links of the namespace with their peer in this process's; None when it cannot be read.

    Without looking at the peer's namespace, two pairs with the same numbers could be confused.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return in_netns(descriptor, lambda: Inside(_links_into_ours(), netns_cookie()))
    except (OSError, pyroute2.NetlinkError, pyroute2.NetlinkDecodeError) as error:
        log.debug("namespace %s cannot be read: %s", path.name, error)
        return None
    finally:
        os.close(descriptor)


def _links_into_ours() -> list[Link]:
    veths = [link for link in read_links() if link.kind == "veth" and link.peer_netns is not None]
    if not veths:
        return []
    ours = os.open(OWN_NETNS, os.O_RDONLY | os.O_CLOEXEC)
    try:
        number = number_of_netns(ours)
    finally:
        os.close(ours)
    return [link for link in veths if link.peer_netns == number]


class PodWatcher:
    """Follows the namespaces of one directory."""

    def __init__(self, directory: Path = NETNS_DIR) -> None:
        self._directory = directory
        self._read: dict[str, tuple[int, Inside]] = {}
        self._first_seen: dict[str, float] = {}
        self._last_full = float("-inf")

    async def read(self, *, full: bool = True) -> list[PodLink]:
        """The pods now. Without `full`, namespaces known to be complete are not entered again."""
        host = {link.ifindex: link for link in await fetch_links()}
        names = self._names()
        self._meet(names)
        stale = [n for n in names if full or not self._complete(n, names[n], host)]
        if stale:
            fresh = await asyncio.to_thread(self._read_namespaces, stale)
            self._keep(names, fresh)
        self._forget(names)
        found = [pod for n, (_, inside) in self._read.items() for pod in match(n, inside, host)]
        return sorted(found, key=lambda pod: (pod.netns, pod.ifindex))

    async def snapshots(self) -> AsyncIterator[list[PodLink]]:
        """The full list, now and after each change. Never ends; raises DeviceFailed.

        What was read before an error is still known when it is begun again.
        """
        changed = asyncio.Event()
        last: list[PodLink] | None = None
        async with Monitor(RTMGRP_LINK, changed), DirectoryWatch(self._directory, changed) as watch:
            while True:
                now = time.monotonic()
                full = now - self._last_full >= FULL_READ_SECONDS
                pods = await self.read(full=full)
                if full:
                    self._last_full = now
                if pods != last:
                    last = pods
                    yield pods
                heard = watch.renew()
                await wait_any(changed, self._pause(heard=heard))
                await asyncio.sleep(SETTLE_SECONDS)

    def _pause(self, *, heard: bool) -> float:
        """How long to wait for an event: shorter while some namespace is being set up."""
        young = [age for name in self._first_seen if (age := self._age(name)) < YOUNG_LIMIT]
        pause = FULL_READ_SECONDS if heard else DEAF_SECONDS
        return min([pause, *(max(YOUNG_SECONDS, age / 2) for age in young)])

    def _meet(self, names: Iterable[str]) -> None:
        for name in names:
            self._first_seen.setdefault(name, time.monotonic())

    def _age(self, name: str) -> float:
        return time.monotonic() - self._first_seen.get(name, float("-inf"))

    def _names(self) -> dict[str, int]:
        """Entries of the directory with their inode: a reused name is another namespace.

        Raises DeviceFailed when it cannot be listed, which says nothing of the pods.
        """
        found = {}
        try:
            entries = list(self._directory.iterdir())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise DeviceFailed(f"cannot list the network namespaces: {error}") from error
        for entry in entries:
            try:
                found[entry.name] = entry.stat().st_ino
            except FileNotFoundError:
                continue
            except OSError:
                if known := self._read.get(entry.name):
                    found[entry.name] = known[0]
        return found

    def _complete(self, name: str, inode: int, host: Mapping[int, Link]) -> bool:
        known = self._read.get(name)
        if known is None or known[0] != inode or self._age(name) < YOUNG_LIMIT:
            return False
        return bool(match(name, known[1], host))

    def _read_namespaces(self, names: Sequence[str]) -> dict[str, Inside | None]:
        return {name: read_namespace(self._directory / name) for name in names}

    def _keep(self, names: Mapping[str, int], fresh: Mapping[str, Inside | None]) -> None:
        """What was read; a namespace that is still there and failed stays as it was read last."""
        for name, inside in fresh.items():
            known = self._read.get(name)
            if inside is not None:
                self._read[name] = (names[name], inside)
            elif known is not None and known[0] == names[name]:
                log.warning("namespace %s cannot be read: its pod stays as it was", name)
            else:
                self._read.pop(name, None)

    def _forget(self, names: Mapping[str, int]) -> None:
        for name in self._read.keys() - names.keys():
            del self._read[name]
        for name in self._first_seen.keys() - names.keys():
            del self._first_seen[name]

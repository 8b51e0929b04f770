# SPDX-License-Identifier: Apache-2.0
"""Pods: who every address is, and for the pods of this node where they are and who judges them.

The order keeps policy closed: policies learn a new identity before an address maps to it; a pod's
policy programs are in their slots before its endpoint names them; its endpoint is written before
its hooks are attached (hooks.py attaches what `attachable` says). The flows of an address whose
pod is gone, or is behind another veth, are forgotten: they were judged for that pod.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from bpfdp_agent.dataplane import conntrack
from bpfdp_agent.dataplane.pods import PodWatcher
from bpfdp_agent.desired.endpoints import endpoint_entries, namespace_entries
from bpfdp_agent.desired.identities import IdentityTables
from bpfdp_agent.desired.node import packed_all
from bpfdp_agent.diff.tables import replace
from bpfdp_agent.layouts import ADDRESS_KEY, ENDPOINT, FAMILIES
from bpfdp_agent.model.pods import PodLink
from bpfdp_agent.watch.wire import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bpfdp_agent.dataplane.maps import MapStore
    from bpfdp_agent.diff.tables import Writes
    from bpfdp_agent.model.cluster import Changes
    from bpfdp_agent.reconcile.policies import PolicySync
    from bpfdp_agent.reconcile.surroundings import Surroundings

log = logging.getLogger(__name__)

NEEDS = (Kind.POD, Kind.NAMESPACE, Kind.NODE, Kind.NETWORK_POLICY)
"""Lists that must be complete before anything is deleted from the maps."""


class PodSync:
    """Keeps `identities`, `endpoints` and `pod_namespaces`.

    `attachable`: host-side interfaces of known pods. `complete` is set from the first complete
    round on.
    """

    def __init__(
        self,
        around: Surroundings,
        maps: MapStore,
        policies: PolicySync,
        changed: Callable[[], None],
    ) -> None:
        self._around = around
        self._maps = maps
        self._policies = policies
        self._changed = changed
        self._watcher = PodWatcher()
        self._identities = IdentityTables()
        self._addresses: set[bytes] = set()
        self._left: dict[int, set[bytes]] = {family: set() for family in FAMILIES}
        self._links: tuple[PodLink, ...] | None = None
        self._started = False
        self._interrupted = False
        self.complete = False
        self.attachable: frozenset[int] = frozenset()

    def changed(self, changes: Changes) -> None:
        """Take what of the changes concerns identities."""
        self._addresses |= changes.addresses

    async def follow(self, wake: Callable[[], None]) -> None:
        """Keep the pods' links current until cancelled; begun again after DeviceFailed."""
        async for found in self._watcher.snapshots():
            self._links = tuple(
                PodLink(packed_all(p.addresses), p.ifindex, p.netns, p.netns_cookie) for p in found
            )
            wake()

    async def reconcile(self) -> int:
        """Identities, then endpoints; returns the number of map operations."""
        view = self._around.view
        if not view.synced(*NEEDS):
            return 0
        operations = await self._reconcile_identities()
        if not self._policies.identities_known:
            self._policies.identities_known = True
            self._changed()
        if self._links is None or not self._policies.started:
            return operations
        operations += self._reconcile_endpoints(self._links)
        await self._forget_flows()
        return operations

    # -- identities -----------------------------------------------------------------------

    async def _reconcile_identities(self) -> int:
        view = self._around.view
        addresses, self._addresses = self._addresses, set()
        if self._started:
            change = self._identities.update(view, addresses)
            writes = self._resync() if self._interrupted else change.writes
        else:
            actual = {f: self._maps.read("identities", f) for f in FAMILIES}
            change = self._identities.start(view, actual)
            writes = change.writes
        self._started = self._interrupted = True
        operations = await self._policies.add_identities(change.new)
        operations += self._write(writes)
        operations += await self._policies.drop_identities(change.gone)
        self._interrupted = False
        return operations

    def _resync(self) -> Writes:
        """After an error: from what the maps hold."""
        return self._identities.resync({f: self._maps.read("identities", f) for f in FAMILIES})

    # -- endpoints ------------------------------------------------------------------------

    def _reconcile_endpoints(self, links: tuple[PodLink, ...]) -> int:
        operations = 0
        attachable: set[int] = set()
        slots: set[int] = set()
        count = 0
        for family in FAMILIES:
            actual = self._maps.read("endpoints", family)
            wanted = endpoint_entries(
                self._around.view, family, links, self._policies.slots_of, actual
            )
            operations += self._write(replace("endpoints", family, actual, wanted))
            operations += self._write_namespaces(family, links, wanted)
            self._left[family] |= _left(family, actual, wanted)
            values = [ENDPOINT.unpack(family, value) for value in wanted.values()]
            attachable.update(v["ifindex"] for v in values)
            slots.update(v[side] for v in values for side in ("ingress_slot", "egress_slot"))
            count = max(count, len(wanted))
        self.attachable = frozenset(attachable)
        self._policies.in_use = frozenset(slots)
        self._around.status.update(pods=count)
        if self._policies.failing is None:
            self._around.status.condition(
                "PoliciesSynced", True, "Synced", "Every pod is judged by its NetworkPolicies."
            )
        self.complete = True
        self._changed()
        return operations

    def _write_namespaces(
        self, family: int, links: tuple[PodLink, ...], endpoints: Mapping[bytes, bytes]
    ) -> int:
        actual = self._maps.read("pod_namespaces", family)
        wanted = namespace_entries(family, links, endpoints)
        return self._write(replace("pod_namespaces", family, actual, wanted))

    @property
    def namespaces(self) -> frozenset[str]:
        """Names under /run/netns of the pods' network namespaces."""
        return frozenset(link.netns for link in self._links or ())

    async def _forget_flows(self) -> None:
        """Of the addresses that a pod left; those of a pass that failed are tried again."""
        for family, left in self._left.items():
            if not left:
                continue
            purged = await conntrack.purge_addresses(self._maps["ct", family], left)
            self._around.metrics.conntrack_removed.labels("pod gone").inc(purged)
            left.clear()

    def _write(self, writes: Writes) -> int:
        for step in writes:
            self._maps.write(step.map, step.family, step.puts, step.deletes)
        return len(writes)


def _left(family: int, actual: Mapping[bytes, bytes], wanted: Mapping[bytes, bytes]) -> set[bytes]:
    """Addresses that have no endpoint any more, or one on another interface."""

    def ifindex(value: bytes) -> int:
        found: int = ENDPOINT.unpack(family, value)["ifindex"]
        return found

    return {
        ADDRESS_KEY.unpack(family, key)["addr"]
        for key, value in actual.items()
        if key not in wanted or ifindex(wanted[key]) != ifindex(value)
    }

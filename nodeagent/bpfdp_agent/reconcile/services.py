# SPDX-License-Identifier: Apache-2.0
"""Services: what changed in the view → the service maps of both families, and health ports."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from bpfdp_agent.bpf.errors import BpfError, MapFull
from bpfdp_agent.desired.services import ServiceTables
from bpfdp_agent.diff.tables import SERVICE_MAPS
from bpfdp_agent.layouts import FAMILIES, FrontendFlag
from bpfdp_agent.model.services import service_view
from bpfdp_agent.reconcile.programming import ProgrammingLatency
from bpfdp_agent.serve.events import ref_of
from bpfdp_agent.serve.proxyhealth import ServiceHealth
from bpfdp_agent.serve.proxymetrics import family_name
from bpfdp_agent.watch.wire import EndpointSlice, Kind, ObjectKey, Service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from bpfdp_agent.config import Config
    from bpfdp_agent.dataplane.maps import MapStore
    from bpfdp_agent.desired.services import Refusal
    from bpfdp_agent.diff.tables import MapWrites, Writes
    from bpfdp_agent.model.cluster import ClusterView
    from bpfdp_agent.model.services import ServiceView
    from bpfdp_agent.reconcile.connections import Connections
    from bpfdp_agent.reconcile.surroundings import Surroundings
    from bpfdp_agent.serve.events import ObjectRef

log = logging.getLogger(__name__)

NEEDS = (Kind.SERVICE, Kind.ENDPOINT_SLICE, Kind.NODE)
"""Lists that must be complete before anything is deleted from the maps."""


MOST_EVENTS = 10
"""In one round, where many Services have the same fault."""


class ServiceSync:
    """Keeps the service maps equal to the view. `complete` after the first round."""

    def __init__(
        self,
        around: Surroundings,
        maps: MapStore,
        connections: Connections,
        synced: Callable[[], None],
    ) -> None:
        self._around = around
        self._maps = maps
        self._connections = connections
        self._synced = synced
        self._tables = {family: ServiceTables(family) for family in FAMILIES}
        self._dirty: set[ObjectKey] = set()
        self._maglev = False
        self._started = False
        self.complete = False
        self._begun: set[int] = set()
        self._interrupted: set[int] = set()
        self._gone: dict[int, dict[bytes, bytes]] = {family: {} for family in FAMILIES}
        self._invalid: dict[tuple[ObjectKey, int], dict[ObjectRef, str]] = {}
        self._served: set[tuple[ObjectKey, int]] = set()
        self._health_checks: dict[ObjectKey, ServiceHealth] = {}
        self._no_local: dict[int, dict[ObjectKey, tuple[str, ...]]] = {f: {} for f in FAMILIES}
        self._latency = ProgrammingLatency()

    def configure(self, config: Config) -> None:
        """Take a new config."""
        self._maglev = config.maglev

    def changed(self, services: Iterable[ObjectKey]) -> None:
        """These, or their endpoints, are others now."""
        self._dirty.update(services)
        self._around.proxy.queued()
        self._around.metrics.proxy.queued(FAMILIES)

    async def reconcile(self) -> int:
        """Write what changed; returns the number of map operations."""
        view = self._around.view
        if not view.synced(*NEEDS):
            return 0
        dirty = self._take_dirty(view)
        operations = 0
        failures: list[Exception] = []
        for family in FAMILIES:
            try:
                operations += self._reconcile_family(family, dirty)
            except Exception as error:  # the other family goes on
                failures.append(error)
        if failures:
            self._dirty |= dirty
        else:
            self._started = True
            self._publish()
        await self._forget_gone()
        if failures:
            raise failures[0]
        return operations

    def _take_dirty(self, view: ClusterView) -> set[ObjectKey]:
        dirty, self._dirty = self._dirty, set()
        return dirty if self._started else dirty | set(view.services)

    def _reconcile_family(self, family: int, dirty: set[ObjectKey]) -> int:
        started = time.monotonic()
        views = {k: self._view_of(k, family) for k in dirty}
        writes = self._changes(family, views)
        self._gone[family] |= self._backends_to_go(family, writes)
        operations = self._write(family, writes, dirty)
        self._follow(family, views)
        self._count(family, views, started)
        return operations

    def _count(self, family: int, views: dict[ObjectKey, ServiceView], started: float) -> None:
        """A family is in sync: as kube-proxy tells it."""
        metrics = self._around.metrics.proxy
        self._around.proxy.updated(family)
        metrics.synced(family, started)
        for key, view in views.items():
            self._no_local[family].pop(key, None)
            if without := policies_without_endpoint(view):
                self._no_local[family][key] = without
            slices = [s for s in self._around.view.slices_of(key) if _in_family(s, family)]
            for seconds in self._latency.of(key, family, slices):
                metrics.programming.labels(family_name(family)).observe(seconds)
        for policy in ("internal", "external"):
            found = sum(each.count(policy) for each in self._no_local[family].values())
            metrics.no_local_endpoints.labels(policy, family_name(family)).set(found)

    async def _forget_gone(self) -> None:
        """Cut flows loose from backends that went; after an error the next round does it again."""
        for family in FAMILIES:
            if self._gone[family] and family not in self._interrupted:
                await self._connections.forget_backends(family, self._gone[family])
                self._gone[family] = {}

    def _view_of(self, key: ObjectKey, family: int) -> ServiceView:
        view = self._around.view
        return service_view(view.services.get(key), view.slices_of(key), family, view.nodes)

    def _changes(self, family: int, views: dict[ObjectKey, ServiceView]) -> Writes:
        tables = self._tables[family]
        tables.limit({n: self._maps[n, family].info.max_entries for n in SERVICE_MAPS})
        tables.use_maglev(self._maglev)
        if family not in self._begun:
            actual = self._actual(family)
            self._begun.add(family)
            return tables.start(actual, views)
        writes = tables.update(views)
        return tables.resync(self._actual(family)) if family in self._interrupted else writes

    def _actual(self, family: int) -> dict[str, dict[bytes, bytes]]:
        return {name: self._maps.read(name, family) for name in SERVICE_MAPS}

    def _write(self, family: int, writes: Writes, dirty: set[ObjectKey]) -> int:
        """In order; after an error the next round starts from what the maps then hold."""
        self._interrupted.add(family)
        try:
            for step in writes:
                self._write_step(family, step, writes)
        except MapFull as error:
            self._tell_full(error, dirty)
            raise
        self._interrupted.discard(family)
        return len(writes)

    def _write_step(self, family: int, step: MapWrites, writes: Writes) -> None:
        """One step; without room for old and new at once, the map's old entries go first."""
        try:
            self._maps.write(step.map, family, step.puts, step.deletes)
        except MapFull:
            leaving = [key for each in writes if each.map == step.map for key in each.deletes]
            if not leaving:
                raise
            self._maps.write(step.map, family, step.puts, leaving)

    def _backends_to_go(self, family: int, writes: Writes) -> dict[bytes, bytes]:
        """The backends that the writes delete, as they are in the map."""
        backends = self._maps["backends", family]
        keys = [key for step in writes if step.map == "backends" for key in step.deletes]
        return {key: value for key in keys if (value := backends.lookup(key)) is not None}

    def _tell_refused(self) -> None:
        """Services that do not fit: each is named once, in an Event and in the condition."""
        told = {
            (key, family): _no_room(refusal, family)
            for family, tables in self._tables.items()
            for key, refusal in tables.refused.items()
        }
        for (key, _), why in sorted(told.items())[:MOST_EVENTS]:
            self._around.events.warning(ref_of(Kind.SERVICE, key), "MapFull", why)
        status = self._around.status
        if not told:
            status.condition(
                "ServicesSynced", True, "Synced", "Every Service and its endpoints are in the maps."
            )
            return
        names = _names({key for key, _ in told})
        first = told[min(told)]
        status.condition("ServicesSynced", False, "MapFull", f"{names}: {first}")

    def _tell_full(self, error: BpfError, dirty: set[ObjectKey]) -> None:
        self._around.status.condition(
            "ServicesSynced", False, "MapFull", f"{_names(dirty)}: {error}"
        )
        for key in sorted(dirty)[:MOST_EVENTS]:
            self._around.events.warning(ref_of(Kind.SERVICE, key), "MapFull", str(error))

    def _follow(self, family: int, views: dict[ObjectKey, ServiceView]) -> None:
        """Problems, health check ports, and which services are served in either family."""
        for key, view in views.items():
            self._follow_problems(key, family, view)
            self._served.discard((key, family))
            if view.ports:
                self._served.add((key, family))
            check = health_check(self._around.view, key)
            self._health_checks.pop(key, None)
            if check:
                self._health_checks[key] = check

    def _follow_problems(self, key: ObjectKey, family: int, view: ServiceView) -> None:
        """Name the objects that are wrong in part, once, and when they are well again."""
        before, now = self._invalid.get((key, family), {}), _problems_of(key, view)
        self._invalid.pop((key, family), None)
        for ref in before.keys() - now.keys():
            if not any(ref in others for others in self._invalid.values()):
                self._around.valid(ref)
        for ref, problem in now.items():
            if before.get(ref) != problem:
                self._around.invalid(ref, problem)
        if now:
            self._invalid[key, family] = now

    def _publish(self) -> None:
        around = self._around
        around.status.update(
            services=len({key for key, _ in self._served}),
            backends=sum(t.backends for t in self._tables.values()),
        )
        self._tell_refused()
        around.proxy.set_services(self._health_checks.values())
        around.metrics.proxy.all_synced()
        around.proxy_servers.wake.set()
        self.complete = True
        self._synced()


def _problems_of(key: ObjectKey, view: ServiceView) -> dict[ObjectRef, str]:
    """What is wrong, by the object at fault."""
    found: dict[ObjectRef, list[str]] = {}
    if view.problems:
        found[ref_of(Kind.SERVICE, key)] = list(view.problems)
    for each in view.slice_problems:
        found.setdefault(ref_of(Kind.ENDPOINT_SLICE, each.slice), []).append(each.problem)
    return {ref: "; ".join(problems) for ref, problems in found.items()}


def _in_family(found: EndpointSlice, family: int) -> bool:
    return found.address_type == f"IPv{family}"


def policies_without_endpoint(view: ServiceView) -> tuple[str, ...]:
    """For each port the Local traffic policies that leave this node without an endpoint."""
    found = []
    for port in view.ports:
        flags = FrontendFlag(0)
        for frontend in port.frontends:
            inside = frontend.flags & FrontendFlag.CLUSTER_IP
            side = FrontendFlag.INTERNAL_DROP if inside else FrontendFlag.EXTERNAL_DROP
            flags |= frontend.flags & side
        if flags and not port.local:
            found += [name for flag, name in _POLICIES if flag in flags]
    return tuple(found)


_POLICIES = ((FrontendFlag.INTERNAL_DROP, "internal"), (FrontendFlag.EXTERNAL_DROP, "external"))


def _no_room(refusal: Refusal, family: int) -> str:
    return (
        f"no room in the map {refusal.map}{family}: it would have to hold {refusal.needs} entries"
        f" and can hold {refusal.limit}; what was served before goes on. Raise"
        f" spec.maps.{FIELDS.get(refusal.map, refusal.map)} of BpfDataplaneConfig default"
    )


FIELDS = {"source_ranges": "sourceRanges"}


def _names(keys: set[ObjectKey]) -> str:
    shown = ", ".join(f"Service {key}" for key in sorted(keys)[:3])
    return f"{shown} and {len(keys) - 3} more" if len(keys) > 3 else shown


def health_check(view: ClusterView, key: ObjectKey) -> ServiceHealth | None:
    """The service's healthCheckNodePort with its number of distinct local Ready addresses."""
    service = view.services.get(key)
    if service is None or not _wants_health_check(service):
        return None
    ready = {
        endpoint.addresses[0]
        for each in view.slices_of(key)
        for endpoint in each.endpoints or ()
        if endpoint.addresses
        and endpoint.node_name == view.nodes.own
        and endpoint.conditions.ready is not False
    }
    return ServiceHealth(service.spec.health_check_node_port, key.namespace, key.name, len(ready))


def _wants_health_check(service: Service) -> bool:
    return (
        service.spec.type == "LoadBalancer"
        and service.spec.external_traffic_policy == "Local"
        and service.spec.health_check_node_port > 0
    )

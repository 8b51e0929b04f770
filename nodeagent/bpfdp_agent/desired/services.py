# SPDX-License-Identifier: Apache-2.0
"""The service maps of one family, kept up to date service by service.

`ServiceTables` holds what the maps should contain. A changed service costs its own entries and
nothing else: nothing here goes through all services but `start` and `resync`.

Ids: a service port keeps its id, and a backend (address and port, shared by all services) its own,
as long as they live, across restarts too (`start` adopts them from the pinned maps). Freed ids
are used again last, so that what still remembers one (affinity) does not meet another service.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import msgspec

from bpfdp_agent.desired.maglev import LARGEST, lookup_table
from bpfdp_agent.diff.tables import SERVICE_MAPS, Delta, Writes, difference, service_writes
from bpfdp_agent.layouts import (
    BACKEND,
    FRONTEND,
    FRONTEND_KEY,
    INDEX,
    LIST_KEY,
    MAGLEV,
    MEMBER_KEY,
    SLOT_KEY,
    SOURCE_RANGE_KEY,
    U32,
    BackendFlag,
    FrontendFlag,
    ListKind,
)
from bpfdp_agent.model.services import Backend, ServicePort, ServicePortKey, ServiceView
from bpfdp_agent.watch.wire import ObjectKey

if TYPE_CHECKING:
    from collections.abc import Mapping

API_SERVER = ObjectKey("default", "kubernetes")
"""Never drops to zero backends: an agent that reached the API through it would cut itself off."""

Place: TypeAlias = tuple[bytes, int]
"""What identifies a backend: address and port."""

_MAX_SERVICE_ID = 2**31 - 1  # a list's id is twice that plus its kind
_MAX_BACKEND_ID = 2**32 - 1
_PRESENT = U32.pack(4, value=1)


class _Claim(NamedTuple):
    """A service port's wish for a frontend's key; the smallest wins (oldest of the best rank)."""

    rank: int
    created: str
    claimant: ServicePortKey
    value: bytes


class Refusal(NamedTuple):
    """A service that there is no room for: in which map, which would have to hold `needs`."""

    wanted: ServiceView
    map: str
    needs: int
    limit: int


class _Port(msgspec.Struct):
    """A service port as the maps have it. `lists`: backends by slot."""

    id: int
    wanted: ServicePort
    lists: dict[ListKind, list[Place]]


class _Shared(msgspec.Struct):
    """A backend: its id, and what each service port that uses it knows of it.

    `place` and `key` are kept so that all tables share one object for each.
    """

    id: int
    place: Place
    key: bytes
    known: dict[ServicePortKey, Backend] = msgspec.field(default_factory=dict)


class _Ids:
    """Ids from 1 to `last`, going round, never one in use."""

    def __init__(self, last: int) -> None:
        self._last = last
        self._next = 1
        self._used: set[int] = set()

    def take(self) -> int:
        """An unused id."""
        while self._next in self._used:
            self._advance()
        taken = self._next
        self.keep(taken)
        return taken

    def keep(self, taken: int) -> None:
        """Mark an id as used; later ones come after it."""
        self._used.add(taken)
        self._next = max(self._next, taken)
        self._advance()

    def free(self, taken: int) -> None:
        """Give an id back."""
        self._used.discard(taken)

    def _advance(self) -> None:
        self._next = self._next % self._last + 1


class _Adopted(msgspec.Struct):
    """What pinned maps say about ids: by frontend key, by backend's place, by list and slot."""

    services: dict[bytes, int] = {}
    backends: dict[Place, int] = {}
    known: dict[int, Backend] = {}
    lists: dict[int, dict[int, int]] = {}
    taken: set[int] = set()

    def service_id(self, frontend: bytes) -> int:
        """The id a frontend leads to, given away once; 0 when there is none to give."""
        found = self.services.get(frontend, 0)
        if found in self.taken:
            return 0
        self.taken.add(found)
        return found

    def backends_of(self, list_id: int) -> list[Backend]:
        """A list's backends in the order of their slots."""
        slots = self.lists.get(list_id, {})
        return [self.known[slots[s]] for s in sorted(slots) if slots[s] in self.known]


class ServiceTables:
    """Frontends, slots, Maglev tables, backends, members and source ranges of one family."""

    def __init__(self, family: int) -> None:
        self._family = family
        self._maglev = False
        self._tables: dict[str, dict[bytes, bytes]] = {name: {} for name in SERVICE_MAPS}
        self._pending: dict[str, dict[bytes, bytes | None]] = {}
        self._ports: dict[ServicePortKey, _Port] = {}
        self._ports_of: dict[ObjectKey, tuple[ServicePortKey, ...]] = {}
        self._addresses: dict[ObjectKey, bytes] = {}
        self._claims: dict[bytes, dict[ServicePortKey, _Claim]] = {}
        self._backends: dict[Place, _Shared] = {}
        self._service_ids = _Ids(_MAX_SERVICE_ID)
        self._backend_ids = _Ids(_MAX_BACKEND_ID)
        self._adopted = _Adopted()
        self._views: dict[ObjectKey, ServiceView] = {}
        self._refused: dict[ObjectKey, Refusal] = {}
        self._limits: dict[str, int] = {}
        self._touched_claims: set[bytes] = set()
        self._touched_places: set[Place] = set()

    # -- what is asked from outside -------------------------------------------------------

    def start(
        self,
        actual: Mapping[str, Mapping[bytes, bytes]],
        views: Mapping[ObjectKey, ServiceView],
    ) -> Writes:
        """Take all services at once, with the ids that the pinned maps (`actual`) give them.

        Call it once, when Services and EndpointSlices are complete: what is in the maps and in
        no service is deleted.
        """
        self._adopted = _read_pinned(self._family, actual)
        for taken in set(self._adopted.services.values()):
            self._service_ids.keep(taken)
        for taken in self._adopted.known:
            self._backend_ids.keep(taken)
        leftovers = set(self._adopted.services.values()), set(self._adopted.known)
        self.update(views)
        for taken in leftovers[0] - {p.id for p in self._ports.values()}:
            self._service_ids.free(taken)
        for taken in leftovers[1] - {b.id for b in self._backends.values()}:
            self._backend_ids.free(taken)
        self._adopted = _Adopted()
        return self.resync(actual)

    def update(self, views: Mapping[ObjectKey, ServiceView]) -> Writes:
        """Take changed services (an empty view for one that is gone); the writes they need.

        A service that a map has no room for stays as it was, whole, and is in `refused`; it is
        tried again when something else went.
        """
        deltas = {name: Delta() for name in SERVICE_MAPS}
        self._flush(deltas)
        for service in sorted(views, key=lambda each: self._turn(each, views[each])):
            self._admit(service, views[service], deltas)
        room = {name for name, delta in deltas.items() if delta.deletes}
        for service, refusal in sorted(self._refused.items()):
            if refusal.map in room and service not in views:
                self._admit(service, refusal.wanted, deltas)
        return service_writes(self._family, deltas)

    def _turn(self, service: ObjectKey, view: ServiceView) -> tuple[bool, str, ObjectKey]:
        """Who comes first where there is not room for all: what the maps have, then the oldest."""
        keys = (self._frontend_key(p, n) for p in view.ports for n in range(len(p.frontends)))
        known = service in self._ports_of or any(k in self._adopted.services for k in keys)
        return not known, min((p.created for p in view.ports), default=""), service

    def _admit(self, service: ObjectKey, view: ServiceView, deltas: dict[str, Delta]) -> None:
        """Take a service's view, or leave it as it is where that does not fit."""
        self._refused.pop(service, None)
        before = self._views.get(service, ServiceView())
        sizes = {name: len(table) for name, table in self._tables.items()}
        self._put_service(service, view, deltas)
        over = next((n for n, s in sizes.items() if self._exceeds(n, s)), None)
        if over is None or service == API_SERVER:
            return
        needs = len(self._tables[over])
        self._put_service(service, before, deltas)
        self._refused[service] = Refusal(view, over, needs, self._limits[over])

    def _exceeds(self, name: str, before: int) -> bool:
        now, limit = len(self._tables[name]), self._limits.get(name)
        return limit is not None and now > limit and now > before

    def _put_service(self, service: ObjectKey, view: ServiceView, deltas: dict[str, Delta]) -> None:
        if view.ports:
            self._views[service] = view
        else:
            self._views.pop(service, None)
        self._set_service(service, view)
        self._settle_frontends()
        self._settle_backends()
        self._flush(deltas)

    def resync(self, actual: Mapping[str, Mapping[bytes, bytes]]) -> Writes:
        """What brings the maps from any content (an interrupted write's, say) to the desired."""
        deltas = {n: difference(actual.get(n, {}), self._tables[n]) for n in SERVICE_MAPS}
        return service_writes(self._family, deltas)

    def table(self, name: str) -> Mapping[bytes, bytes]:
        """What a map should hold."""
        return self._tables[name]

    def limit(self, limits: Mapping[str, int]) -> None:
        """How many entries each map can hold; from now on none is asked to hold more."""
        self._limits = dict(limits)

    @property
    def refused(self) -> Mapping[ObjectKey, Refusal]:
        """Services that are not served, or not as they are now, for lack of room."""
        return self._refused

    @property
    def services(self) -> int:
        """Number of service ports."""
        return len(self._ports)

    @property
    def backends(self) -> int:
        """Number of distinct backends."""
        return len(self._backends)

    # -- one service ----------------------------------------------------------------------

    def _set_service(self, service: ObjectKey, view: ServiceView) -> None:
        if service == API_SERVER and not view.ports:
            return
        ports = {port.key: port for port in view.ports}
        for key in self._ports_of.pop(service, ()):
            if key not in ports:
                self._remove_port(key)
        for port in ports.values():
            self._set_port(self._never_empty(port) if service == API_SERVER else port)
        if ports:
            self._ports_of[service] = tuple(ports)
        self._set_address(service, view.cluster_ip)

    def _never_empty(self, port: ServicePort) -> ServicePort:
        """The API server's service keeps its last known backends when it has none."""
        if port.cluster:
            return port
        if port.key in self._ports:
            last = self._ports[port.key].wanted
            return msgspec.structs.replace(port, cluster=last.cluster, local=last.local)
        adopted = self._adopted.services.get(self._frontend_key(port, 0), 0)
        lists = {k: tuple(sorted(self._adopted.backends_of(adopted * 2 + k))) for k in ListKind}
        return msgspec.structs.replace(
            port, cluster=lists[ListKind.CLUSTER], local=lists[ListKind.LOCAL]
        )

    def _set_address(self, service: ObjectKey, address: bytes) -> None:
        """The ClusterIP as a whole: port 0 marks an allocated address, whose other ports REJECT."""
        claimant = ServicePortKey(*service, "", 0)
        old = self._addresses.pop(service, b"")
        if old and old != address:
            self._unclaim(FRONTEND_KEY.pack(self._family, addr=old), claimant)
        if address:
            self._addresses[service] = address
            value = FRONTEND.pack(self._family, flags=FrontendFlag.CLUSTER_IP)
            key = FRONTEND_KEY.pack(self._family, addr=address)
            self._claim(key, _Claim(0, "", claimant, value))

    def _set_port(self, wanted: ServicePort) -> None:
        port = self._ports.get(wanted.key)
        if port is None:
            port = self._ports[wanted.key] = self._new_port(wanted)
        elif port.wanted == wanted:
            return
        old = port.wanted
        port.wanted = wanted
        backends = {_place(b): b for b in _used(wanted)}
        for place, backend in backends.items():
            self._use(place, wanted.key, backend)
        self._set_list(port, ListKind.CLUSTER, wanted.cluster, old)
        self._set_list(port, ListKind.LOCAL, wanted.local, old)
        for backend in _used(old):
            if _place(backend) not in backends:
                self._release(_place(backend), wanted.key)
        self._set_ranges(port.id, old.source_ranges, wanted.source_ranges)
        self._set_frontends(port, old)

    def _new_port(self, wanted: ServicePort) -> _Port:
        """A port with nothing written yet, with the id that pinned maps know it by."""
        port_id = self._adopt_id(wanted) or self._service_ids.take()
        return _Port(port_id, _nothing(wanted), {kind: [] for kind in ListKind})

    def _adopt_id(self, wanted: ServicePort) -> int:
        keys = (self._frontend_key(wanted, n) for n in range(len(wanted.frontends)))
        return next(filter(None, map(self._adopted.service_id, keys)), 0)

    def _remove_port(self, key: ServicePortKey) -> None:
        port = self._ports.pop(key)
        empty = _nothing(port.wanted)
        old = port.wanted
        self._set_list(port, ListKind.CLUSTER, (), old)
        self._set_list(port, ListKind.LOCAL, (), old)
        for place in {_place(b) for b in _used(old)}:
            self._release(place, key)
        self._set_ranges(port.id, old.source_ranges, ())
        port.wanted = empty
        self._set_frontends(port, old)
        self._service_ids.free(port.id)

    # -- its parts ------------------------------------------------------------------------

    def _set_list(
        self, port: _Port, kind: ListKind, wanted: tuple[Backend, ...], old: ServicePort
    ) -> None:
        """Slots keep their backends where they can: one endpoint more or less moves one slot."""
        list_id = port.id * 2 + kind
        written = port.lists[kind]
        pinned = [_place(b) for b in self._adopted.backends_of(list_id)]
        backends = [self._backends[_place(b)] for b in wanted]
        after = _rearranged(written or pinned, [b.place for b in backends])
        for slot, place in enumerate(after):
            if slot >= len(written) or written[slot] != place:
                # a slot's value is the backend's key
                self._want("slots", self._slot_key(list_id, slot), self._backends[place].key)
        for slot in range(len(after), len(written)):
            self._want("slots", self._slot_key(list_id, slot), None)
        self._set_members(
            list_id,
            set(written) if old.affinity_seconds else set(),
            set(after) if port.wanted.affinity_seconds else set(),
        )
        self._set_lookup_table(list_id, after)
        port.lists[kind] = after

    def _has_room_for_table(self, key: bytes) -> bool:
        """Without a table the hash alone chooses: no reason to refuse a service."""
        tables = self._tables["maglev"]
        held = len(tables) + len(self._pending.get("maglev", ()))
        return key in tables or held < self._limits.get("maglev", held + 1)

    def use_maglev(self, wanted: bool) -> None:
        """Whether lists have Maglev tables; the next update or start writes what that changes."""
        if wanted != self._maglev:
            self._maglev = wanted
            for port in self._ports.values():
                for kind, backends in port.lists.items():
                    self._set_lookup_table(port.id * 2 + kind, backends)

    def _set_lookup_table(self, list_id: int, backends: list[Place]) -> None:
        key = LIST_KEY.pack(self._family, list=list_id)
        if self._maglev and 1 < len(backends) <= LARGEST and self._has_room_for_table(key):
            table = MAGLEV.pack(self._family, slots=lookup_table(backends))
            self._want("maglev", key, table)
        elif key in self._tables["maglev"]:
            self._want("maglev", key, None)

    def _set_members(self, list_id: int, old: set[Place], new: set[Place]) -> None:
        """What affinity may still choose; written only for services with affinity."""
        for place in old - new:
            self._want("members", self._member_key(list_id, place), None)
        for place in new - old:
            self._want("members", self._member_key(list_id, place), _PRESENT)

    def _set_ranges(
        self,
        port_id: int,
        old: tuple[tuple[int, bytes], ...],
        new: tuple[tuple[int, bytes], ...],
    ) -> None:
        for network in set(old) - set(new):
            self._want("source_ranges", self._range_key(port_id, network), None)
        for network in set(new) - set(old):
            self._want("source_ranges", self._range_key(port_id, network), _PRESENT)

    def _set_frontends(self, port: _Port, old: ServicePort) -> None:
        wanted = port.wanted
        keys = set()
        for position, frontend in enumerate(wanted.frontends):
            key = self._frontend_key(wanted, position)
            value = FRONTEND.pack(
                self._family,
                service=port.id,
                cluster_count=len(wanted.cluster),
                local_count=len(wanted.local),
                affinity_seconds=wanted.affinity_seconds,
                flags=frontend.flags,
            )
            keys.add(key)
            self._claim(key, _Claim(frontend.rank, wanted.created, wanted.key, value))
        for position in range(len(old.frontends)):
            key = self._frontend_key(old, position)
            if key not in keys:
                self._unclaim(key, wanted.key)

    def _claim(self, key: bytes, claim: _Claim) -> None:
        self._claims.setdefault(key, {})[claim.claimant] = claim
        self._touched_claims.add(key)

    def _unclaim(self, key: bytes, claimant: ServicePortKey) -> None:
        claims = self._claims[key]
        claims.pop(claimant, None)
        if not claims:
            del self._claims[key]
        self._touched_claims.add(key)

    def _use(self, place: Place, user: ServicePortKey, backend: Backend) -> None:
        shared = self._backends.get(place)
        if shared is None:
            taken = self._adopted.backends.get(place) or self._backend_ids.take()
            key = INDEX.pack(self._family, index=taken)
            shared = self._backends[place] = _Shared(taken, place, key)
        if shared.known.get(user) != backend:
            shared.known[user] = backend
            self._touched_places.add(place)

    def _release(self, place: Place, user: ServicePortKey) -> None:
        self._backends[place].known.pop(user, None)
        self._touched_places.add(place)

    # -- the end of a batch ---------------------------------------------------------------

    def _settle_frontends(self) -> None:
        for key in self._touched_claims:
            claims = self._claims.get(key)
            self._want("frontends", key, min(claims.values()).value if claims else None)
        self._touched_claims.clear()

    def _settle_backends(self) -> None:
        for place in self._touched_places:
            shared = self._backends[place]
            key = shared.key
            if shared.known:
                # where services disagree (one slice names the node, another does not): the fuller
                self._want("backends", key, self._backend_value(max(shared.known.values())))
            else:
                self._want("backends", key, None)
                self._backend_ids.free(shared.id)
                del self._backends[place]
        self._touched_places.clear()

    def _want(self, name: str, key: bytes, value: bytes | None) -> None:
        self._pending.setdefault(name, {})[key] = value

    def _flush(self, deltas: dict[str, Delta]) -> None:
        """What is pending, less what is there already, to `deltas`; from now on it is there."""
        for name, entries in self._pending.items():
            table, delta = self._tables[name], deltas[name]
            for key, value in entries.items():
                if value is None:
                    if table.pop(key, None) is not None:
                        _lose(delta, key)
                elif (before := table.get(key)) != value:
                    if before is None and key not in delta.deletes:
                        delta.fresh.add(key)
                    table[key] = delta.puts[key] = value
                    delta.deletes.discard(key)
        self._pending = {}

    # -- bytes ----------------------------------------------------------------------------

    def _frontend_key(self, port: ServicePort, position: int) -> bytes:
        frontend = port.frontends[position]
        return FRONTEND_KEY.pack(
            self._family, addr=frontend.address, port=frontend.port, proto=frontend.protocol
        )

    def _slot_key(self, list_id: int, slot: int) -> bytes:
        return SLOT_KEY.pack(self._family, list=list_id, slot=slot)

    def _member_key(self, list_id: int, place: Place) -> bytes:
        return MEMBER_KEY.pack(self._family, list=list_id, backend=self._backends[place].id)

    def _range_key(self, port_id: int, network: tuple[int, bytes]) -> bytes:
        length, address = network
        return SOURCE_RANGE_KEY.pack(
            self._family, prefixlen=32 + length, service=port_id, addr=address
        )

    def _backend_value(self, backend: Backend) -> bytes:
        return BACKEND.pack(
            self._family,
            addr=backend.address,
            port=backend.port,
            flags=backend.flags,
            node=backend.node or bytes(16),
        )


def _place(backend: Backend) -> Place:
    return backend.address, backend.port


def _lose(delta: Delta, key: bytes) -> None:
    """A key goes; what came within the same batch was never in the map."""
    delta.puts.pop(key, None)
    if key in delta.fresh:
        delta.fresh.discard(key)
    else:
        delta.deletes.add(key)


def _used(port: ServicePort) -> tuple[Backend, ...]:
    return (*port.cluster, *port.local, *port.kept)


def _nothing(port: ServicePort) -> ServicePort:
    return ServicePort(port.key, (), (), (), 0, (), "")


def _rearranged(before: list[Place], wanted: list[Place]) -> list[Place]:
    """The wanted places, each in its old slot where that still exists, no gaps, no duplicates."""
    fresh = dict.fromkeys(wanted)
    after: list[Place | None] = []
    for place in before:
        kept = place in fresh
        after.append(place if kept else None)
        if kept:
            del fresh[place]
    new = list(reversed(fresh))
    slot = 0
    while slot < len(after):
        if after[-1] is None and not new:
            after.pop()
            continue
        if after[slot] is None:
            after[slot] = new.pop() if new else after.pop()
        slot += 1
    return [place for place in after if place is not None] + new[::-1]


def _read_pinned(family: int, actual: Mapping[str, Mapping[bytes, bytes]]) -> _Adopted:
    adopted = _Adopted()
    for key, value in actual.get("frontends", {}).items():
        service = FRONTEND.unpack(family, value)["service"]
        if service:
            adopted.services[key] = service
    for key, value in actual.get("backends", {}).items():
        raw, index = BACKEND.unpack(family, value), INDEX.unpack(family, key)["index"]
        node = raw["node"] if any(raw["node"]) else b""
        backend = Backend(raw["addr"], raw["port"], BackendFlag(raw["flags"]), node)
        if _place(backend) not in adopted.backends:
            adopted.backends[_place(backend)] = index
            adopted.known[index] = backend
    for key, value in actual.get("slots", {}).items():
        slot = SLOT_KEY.unpack(family, key)
        lists = adopted.lists.setdefault(slot["list"], {})
        lists[slot["slot"]] = U32.unpack(family, value)["value"]
    return adopted

# SPDX-License-Identifier: Apache-2.0
"""Who an address is: the `identities` map, and what policies may know of an identity.

An identity is a namespace, labels and named ports; pods that agree in these share it. Its id is
a hash of them, so that a restarted agent gives equal ids; of two that collide the later one takes
the next free id.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import msgspec

from bpfdp_agent.diff.tables import Delta, MapWrites, Writes, difference
from bpfdp_agent.layouts import ADDRESS_KEY, FAMILIES, IDENTITY, IdentityFlag
from bpfdp_agent.model.addresses import family_of
from bpfdp_agent.model.pods import NamedPort, named_ports

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from bpfdp_agent.model.cluster import ClusterView
    from bpfdp_agent.watch.wire import Pod

_MAP = "identities"


class Identity(msgspec.Struct, frozen=True):
    """What pods of one identity have in common; labels and ports are sorted."""

    namespace: str
    labels: tuple[tuple[str, str], ...]
    ports: tuple[NamedPort, ...]


def identity_of(pod: Pod) -> Identity:
    """A pod's identity."""
    labels = tuple(sorted(pod.metadata.labels.items()))
    return Identity(pod.metadata.namespace, labels, named_ports(pod))


class IdentityChange(msgspec.Struct, frozen=True):
    """The order is: tell policies of `new`, do `writes`, then let policies forget `gone`."""

    new: Mapping[int, Identity]
    writes: Writes
    gone: Mapping[int, Identity]


class IdentityTables:
    """The identities map of both families, kept up to date address by address."""

    def __init__(self) -> None:
        self._ids: dict[Identity, int] = {}
        self._identities: dict[int, Identity] = {}
        self._users: dict[int, int] = {}
        self._at: dict[bytes, int] = {}
        self._tables: dict[int, dict[bytes, bytes]] = {family: {} for family in FAMILIES}

    def id_of(self, pod: Pod) -> int:
        """The id of a pod's identity; 0 while no address maps to it."""
        return self._ids.get(identity_of(pod), 0)

    def identities(self) -> Mapping[int, Identity]:
        """Every identity in use, by id."""
        return self._identities

    def table(self, family: int) -> Mapping[bytes, bytes]:
        """What the map should hold."""
        return self._tables[family]

    def start(
        self, view: ClusterView, actual: Mapping[int, Mapping[bytes, bytes]]
    ) -> IdentityChange:
        """Take every address at once; `actual` is the pinned maps' content by family."""
        change = self.update(view, view.addresses())
        return msgspec.structs.replace(change, writes=self.resync(actual))

    def update(self, view: ClusterView, addresses: Iterable[bytes]) -> IdentityChange:
        """Look again at these addresses (`Changes.addresses`)."""
        deltas = {family: Delta() for family in FAMILIES}
        fresh: set[int] = set()
        released: set[int] = set()
        for address in addresses:
            family = family_of(address)
            key = ADDRESS_KEY.pack(family, addr=address)
            value = self._entry(view, address, fresh, released)
            table = self._tables[family]
            if value is None:
                if table.pop(key, None) is not None:
                    deltas[family].deletes.add(key)
            elif table.get(key) != value:
                table[key] = deltas[family].puts[key] = value
        gone = {i: self._forget(i) for i in released if not self._users[i]}
        return IdentityChange(
            new={i: self._identities[i] for i in fresh - gone.keys()},
            writes=_writes(deltas),
            gone={i: identity for i, identity in gone.items() if i not in fresh},
        )

    def resync(self, actual: Mapping[int, Mapping[bytes, bytes]]) -> Writes:
        """What brings the maps from any content to the desired."""
        return _writes({f: difference(actual.get(f, {}), self._tables[f]) for f in FAMILIES})

    def _entry(
        self, view: ClusterView, address: bytes, fresh: set[int], released: set[int]
    ) -> bytes | None:
        """An address's value; a node's own addresses are never a pod's."""
        family = family_of(address)
        node = view.nodes.at(address)
        pod = None if node else view.pod_at(address)
        old = self._at.pop(address, 0)
        new = 0
        if pod:
            new = self._take(identity_of(pod), fresh)
            self._at[address] = new
            self._users[new] += 1
        if old:
            self._users[old] -= 1
            released.add(old)
        if node:
            local = IdentityFlag.LOCAL if node.name == view.nodes.own else IdentityFlag(0)
            return IDENTITY.pack(family, flags=IdentityFlag.NODE | local)
        if pod:
            here = pod.spec.node_name == view.nodes.own
            local = IdentityFlag.LOCAL if here else IdentityFlag(0)
            return IDENTITY.pack(family, id=new, flags=IdentityFlag.POD | local)
        return None

    def _take(self, identity: Identity, fresh: set[int]) -> int:
        found = self._ids.get(identity)
        if found is None:
            found = _hash(identity)
            while found in self._identities:
                found = found % 0xFFFFFFFF + 1
            self._ids[identity] = found
            self._identities[found] = identity
            self._users[found] = 0
            fresh.add(found)
        return found

    def _forget(self, identity_id: int) -> Identity:
        identity = self._identities.pop(identity_id)
        del self._users[identity_id]
        del self._ids[identity]
        return identity


def _writes(deltas: Mapping[int, Delta]) -> Writes:
    return Writes(
        tuple(
            MapWrites(_MAP, family, delta.puts, tuple(sorted(delta.deletes)))
            for family, delta in deltas.items()
            if delta.puts or delta.deletes
        )
    )


def _hash(identity: Identity) -> int:
    """1 to 2**32 - 1: 0 means no identity."""
    digest = hashlib.blake2b(msgspec.json.encode(identity), digest_size=4).digest()
    return int.from_bytes(digest) or 1

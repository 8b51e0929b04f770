# SPDX-License-Identifier: Apache-2.0
"""What the service maps answer, read as bpf_templates/include/service.h and new_flow.h read them."""

from __future__ import annotations

from collections.abc import Mapping

from bpfdp_agent.layouts import (
    BACKEND,
    FRONTEND,
    FRONTEND_KEY,
    INDEX,
    SLOT_KEY,
    SOURCE_RANGE_KEY,
    U32,
    FrontendFlag,
    ListKind,
)
from bpfdp_agent.model.addresses import contains

Tables = Mapping[str, Mapping[bytes, bytes]]
ANY = {4: bytes(4), 6: bytes(16)}


class Lookup:
    """One family's maps. `own`: this node's addresses; `service_range`: prefix and network."""

    def __init__(
        self, family: int, tables: Tables, own: set[bytes], service_range: tuple[int, bytes]
    ) -> None:
        self._family = family
        self._tables = tables
        self._own = own
        self._service_range = service_range

    def answer(
        self, client: bytes, address: bytes, port: int, proto: int, *, internal: bool
    ) -> frozenset[bytes] | str:
        """The backends' addresses, or the verdict, for a client inside or outside the cluster."""
        entry = self._frontend(address, port, proto)
        if entry is None and address in self._own:
            entry = self._frontend(ANY[self._family], port, proto)
        if entry is None:
            entry = self._frontend(address, 0, 0)
        if entry is None:
            return "drop" if contains(self._service_range, address) else "untouched"
        flags = FrontendFlag(entry["flags"])
        if FrontendFlag.SOURCE_RANGES in flags and not self._allowed(entry["service"], client):
            return "drop"
        return self._choice(entry, flags, internal=internal)

    def _choice(
        self, entry: Mapping[str, int], flags: FrontendFlag, *, internal: bool
    ) -> frozenset[bytes] | str:
        local = FrontendFlag.INTERNAL_LOCAL if internal else FrontendFlag.EXTERNAL_LOCAL
        silent = FrontendFlag.INTERNAL_DROP if internal else FrontendFlag.EXTERNAL_DROP
        kind = ListKind.LOCAL if local in flags else ListKind.CLUSTER
        size = entry["local_count" if kind == ListKind.LOCAL else "cluster_count"]
        if not size:
            return "drop" if silent in flags else "reject"
        list_id = entry["service"] * 2 + kind
        return frozenset(self._backend(list_id, slot) for slot in range(size))

    def _frontend(self, address: bytes, port: int, proto: int) -> dict[str, int] | None:
        key = FRONTEND_KEY.pack(self._family, addr=address, port=port, proto=proto)
        value = self._tables["frontends"].get(key)
        return FRONTEND.unpack(self._family, value) if value else None

    def _allowed(self, service: int, client: bytes) -> bool:
        ranges = (SOURCE_RANGE_KEY.unpack(self._family, k) for k in self._tables["source_ranges"])
        return any(
            contains((each["prefixlen"] - 32, each["addr"]), client)
            for each in ranges
            if each["service"] == service
        )

    def _backend(self, list_id: int, slot: int) -> bytes:
        found = self._tables["slots"][SLOT_KEY.pack(self._family, list=list_id, slot=slot)]
        index = U32.unpack(self._family, found)["value"]
        entry = self._tables["backends"][INDEX.pack(self._family, index=index)]
        address = BACKEND.unpack(self._family, entry)["addr"]
        assert isinstance(address, bytes)
        return address

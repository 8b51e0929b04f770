# SPDX-License-Identifier: Apache-2.0
"""The connection table as the control plane sees it: ageing, purging, counting.

A flow is a pair of entries, one per direction, and lives or dies as one: an entry's partner has
the key of the packets that answer (addresses and ports after NAT, turned round; ICMP echo keeps
its id in `sport`). Times are CLOCK_MONOTONIC, as BPF writes them.
"""

from __future__ import annotations

import asyncio
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bpfdp_agent.bpf import syscall
from bpfdp_agent.layouts import ADDRESS_KEY, CT, CT_KEY, Struct, TcpFlag

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from bpfdp_agent.dataplane.maps import OpenMap

TCP, UDP = 6, 17
ICMP = (1, 58)
PAGE = 1024
_SECOND = 1_000_000_000
_LAST_SEEN = struct.Struct("=Q")


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds of silence after which a flow is forgotten."""

    tcp_established: float = 86400.0
    tcp_half_closed: float = 3600.0
    tcp_opening: float = 60.0
    tcp_closed: float = 30.0
    udp: float = 120.0
    icmp: float = 30.0
    other: float = 600.0


@dataclass(slots=True)
class Collected:
    """What one pass saw: entries, those removed, and live entries by protocol."""

    entries: int = 0
    removed: int = 0
    tcp: int = 0
    udp: int = 0
    other: int = 0


def partner_key(family: int, proto: int, value: dict[str, Any]) -> bytes:
    """Key of the entry of the other direction (`reply_key` in include/conntrack.h)."""
    sport, dport = value["new_dport"], value["new_sport"]
    if proto in ICMP:
        sport, dport = value["new_sport"], 0
    return CT_KEY.pack(
        family, src=value["new_dst"], dst=value["new_src"], sport=sport, dport=dport, proto=proto
    )


def timeout(proto: int, mine: int, partners: int, timeouts: Timeouts) -> float:
    """Seconds a flow may be silent, by what its two directions have sent (`ct.tcp`)."""
    if proto == UDP:
        return timeouts.udp
    if proto in ICMP:
        return timeouts.icmp
    return tcp_timeout(mine, partners, timeouts) if proto == TCP else timeouts.other


def tcp_timeout(mine: int, partners: int, timeouts: Timeouts) -> float:
    """The same for TCP: how far the handshake or the closing has come."""
    either = mine | partners
    if either & TcpFlag.RST or mine & partners & TcpFlag.FIN:
        return timeouts.tcp_closed
    if either & TcpFlag.FIN:
        return timeouts.tcp_half_closed
    if either & TcpFlag.SYN and not either & TcpFlag.ACK:
        return timeouts.tcp_opening
    return timeouts.tcp_established


def shortest(proto: int, timeouts: Timeouts) -> float:
    """Entries younger than this need no look at their partner."""
    if proto == TCP:
        return min(timeouts.tcp_closed, timeouts.tcp_opening)
    return timeout(proto, 0, 0, timeouts)


async def collect(
    table: OpenMap, timeouts: Timeouts | None = None, now_ns: int | None = None
) -> Collected:
    """One pass over a family's table: forget what has been silent too long, count the rest."""
    limits = timeouts or Timeouts()
    seen = Collected()
    young = [int(shortest(proto, limits) * _SECOND) for proto in range(256)]
    # Most entries are young: only these two fields of them are decoded.
    proto_at, seen_at = (
        _offset(CT_KEY, "proto", table.family),
        _offset(CT, "last_seen", table.family),
    )
    for page in syscall.map_lookup_batches(table.descriptor, table.info, PAGE):
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) if now_ns is None else now_ns
        doomed: set[bytes] = set()
        for raw_key, raw_value in page:
            proto = raw_key[proto_at]
            (last_seen,) = _LAST_SEEN.unpack_from(raw_value, seen_at)
            pair: set[bytes] = set()
            if now - last_seen >= young[proto]:
                pair = _expired(table, raw_key, raw_value, now, limits)
                doomed |= pair
            if not pair:
                _count(seen, proto)
        seen.entries += len(page)
        syscall.map_delete_all(table.descriptor, doomed)
        seen.removed += len(doomed)
        await asyncio.sleep(0)
    return seen


async def purge_udp(table: OpenMap, backends: Collection[int]) -> int:
    """Forget UDP flows to backends (ids) that are gone, so that their next packet chooses anew."""
    dead = frozenset(backends)
    removed = 0
    if not dead:
        return removed
    family = table.family
    for page in syscall.map_lookup_batches(table.descriptor, table.info, PAGE):
        doomed: set[bytes] = set()
        for raw_key, raw_value in page:
            key = CT_KEY.unpack(family, raw_key)
            if key["proto"] != UDP:
                continue
            value = CT.unpack(family, raw_value)
            if value["backend"] in dead:
                doomed |= {raw_key, partner_key(family, key["proto"], value)}
        syscall.map_delete_all(table.descriptor, doomed)
        removed += len(doomed)
        await asyncio.sleep(0)
    return removed


async def purge_addresses(table: OpenMap, addresses: Collection[bytes]) -> int:
    """Forget every flow of these addresses: whose they were is gone, or is elsewhere.

    Either entry of a flow names all its addresses, before or after NAT, so each is found itself.
    """
    gone = frozenset(addresses)
    removed = 0
    if not gone:
        return removed
    key_fields = _fields(CT_KEY, ("src", "dst"), table.family)
    value_fields = _fields(CT, ("new_src", "new_dst"), table.family)
    for page in syscall.map_lookup_batches(table.descriptor, table.info, PAGE):
        doomed = {
            raw_key
            for raw_key, raw_value in page
            if any(raw_key[field] in gone for field in key_fields)
            or any(raw_value[field] in gone for field in value_fields)
        }
        syscall.map_delete_all(table.descriptor, doomed)
        removed += len(doomed)
        await asyncio.sleep(0)
    return removed


def _expired(
    table: OpenMap, raw_key: bytes, raw_value: bytes, now: int, limits: Timeouts
) -> set[bytes]:
    """Keys of the pair when it has been silent too long, else nothing."""
    family = table.family
    key, value = CT_KEY.unpack(family, raw_key), CT.unpack(family, raw_value)
    silent = now - value["last_seen"]
    partner = partner_key(family, key["proto"], value)
    raw_partner = table.lookup(partner)
    flags = 0
    if raw_partner is not None:
        other = CT.unpack(family, raw_partner)
        silent, flags = min(silent, now - other["last_seen"]), other["tcp"]
    if silent < timeout(key["proto"], value["tcp"], flags, limits) * _SECOND:
        return set()
    return {raw_key, partner} if raw_partner is not None else {raw_key}


def _offset(described: Struct, name: str, family: int) -> int:
    names = [field.name for field in described.fields]
    return sum(field.size(family) for field in described.fields[: names.index(name)])


def _fields(described: Struct, names: Iterable[str], family: int) -> list[slice]:
    """Where the named addresses are in the packed struct."""
    starts = [_offset(described, name, family) for name in names]
    return [slice(start, start + ADDRESS_KEY.size(family)) for start in starts]


def _count(seen: Collected, proto: int) -> None:
    if proto == TCP:
        seen.tcp += 1
    elif proto == UDP:
        seen.udp += 1
    else:
        seen.other += 1

# SPDX-License-Identifier: Apache-2.0
"""Pairs of entries and how long they live."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from bpfdp_agent.dataplane import conntrack
from bpfdp_agent.dataplane.conntrack import ICMP, TCP, UDP, Timeouts, partner_key, timeout
from bpfdp_agent.layouts import CT, CT_KEY, TcpFlag

CLIENT, BACKEND = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
NODE = bytes([192, 0, 2, 1])
LIMITS = Timeouts()
SYN, ACK, FIN, RST = TcpFlag.SYN, TcpFlag.ACK, TcpFlag.FIN, TcpFlag.RST


def partner(proto, **value):
    raw = partner_key(4, proto, CT.unpack(4, CT.pack(4, **value)))
    return CT_KEY.unpack(4, raw)


def test_the_partner_answers_from_the_backend_to_the_client():
    found = partner(TCP, new_src=CLIENT, new_dst=BACKEND, new_sport=1000, new_dport=8080)
    assert (found["src"], found["sport"]) == (BACKEND, 8080)
    assert (found["dst"], found["dport"]) == (CLIENT, 1000)
    assert found["proto"] == TCP


def test_icmp_echo_keeps_its_id_in_place():
    found = partner(1, new_src=CLIENT, new_dst=BACKEND, new_sport=77)
    assert (found["src"], found["sport"], found["dport"]) == (BACKEND, 77, 0)


@pytest.mark.parametrize(
    ("mine", "partners", "expected"),
    [
        (SYN, 0, LIMITS.tcp_opening),
        (SYN, SYN | ACK, LIMITS.tcp_established),
        (0, 0, LIMITS.tcp_established),  # adopted in mid-flow
        (SYN | FIN, SYN | ACK, LIMITS.tcp_half_closed),
        (SYN | FIN, SYN | ACK | FIN, LIMITS.tcp_closed),
        (SYN, SYN | ACK | RST, LIMITS.tcp_closed),
    ],
)
def test_tcp_lives_by_what_both_directions_sent(mine, partners, expected):
    assert timeout(TCP, mine, partners, LIMITS) == expected
    assert timeout(TCP, partners, mine, LIMITS) == expected


def test_the_other_protocols():
    assert timeout(UDP, 0, 0, LIMITS) == LIMITS.udp
    assert timeout(ICMP[1], 0, 0, LIMITS) == LIMITS.icmp
    assert timeout(132, 0, 0, LIMITS) == LIMITS.other


@pytest.mark.parametrize("gone", [CLIENT, BACKEND, NODE], ids=["client", "backend", "own source"])
async def test_both_entries_of_a_flow_go_with_any_of_its_addresses(monkeypatch, gone):
    service = bytes([10, 96, 0, 1])
    value = CT.pack(4, new_src=NODE, new_dst=BACKEND, new_sport=40000, new_dport=8080)
    there = CT_KEY.pack(4, src=CLIENT, dst=service, sport=1000, dport=80, proto=TCP)
    back = partner_key(4, TCP, CT.unpack(4, value))
    answer = CT.pack(4, new_src=service, new_dst=CLIENT, new_sport=80, new_dport=1000)
    other = CT_KEY.pack(4, src=bytes([10, 0, 0, 8]), dst=bytes([10, 0, 0, 9]), proto=UDP)
    untouched = CT.pack(4, new_src=bytes([10, 0, 0, 8]), new_dst=bytes([10, 0, 0, 9]))
    deleted: set[bytes] = set()
    kernel = SimpleNamespace(
        map_lookup_batches=lambda *_: [[(there, value)], [(back, answer), (other, untouched)]],
        map_delete_all=lambda _, keys: deleted.update(keys),
    )
    monkeypatch.setattr(conntrack, "syscall", kernel)
    table = SimpleNamespace(descriptor=0, info=None, family=4)
    assert await conntrack.purge_addresses(table, {gone}) == 2
    assert deleted == {there, back}

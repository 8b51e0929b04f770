# SPDX-License-Identifier: Apache-2.0
"""The policy program's C in ten lines of Python: runs a spec on the contents of its maps."""

from __future__ import annotations

import ipaddress
import struct

from bpfdp_agent.desired.programspec import Peers, ProgramSpec


def permits(spec: ProgramSpec, value: bytes | None, address: str, protocol: int, port: int) -> bool:
    """Whether the program lets a packet pass; `value` is the peer's in the identity map."""
    peer = ipaddress.ip_address(address)
    value = value or bytes(spec.identity_value_size)
    mask = list(struct.unpack_from(f"={spec.words}Q", value))
    names = struct.unpack_from(f"={spec.name_count}H", value, spec.words * 8)
    for word, bits in enumerate(_longest_prefix(spec, peer)):
        mask[word] |= bits

    def allowed(peers: Peers) -> bool:
        return peers.anything or any(mask[word] & bits for word, bits in peers.mask)

    return (
        (spec.every_port is not None and allowed(spec.every_port))
        or any(
            r.lo <= port <= r.hi and allowed(r.peers)
            for p in spec.protocols
            if p.protocol == protocol
            for r in p.ranges
        )
        or any(
            n.protocol == protocol and names[n.index] == port != 0 and allowed(n.peers)
            for n in spec.names
        )
    )


def _longest_prefix(
    spec: ProgramSpec, peer: ipaddress.IPv4Address | ipaddress.IPv6Address
) -> tuple[int, ...]:
    best = (-1, bytes(spec.words * 8))
    for key, value in spec.cidr_entries(peer.version).items():
        (length,) = struct.unpack_from("=I", key)
        if peer in ipaddress.ip_network((key[4:], length)):
            best = max(best, (length, value))
    return struct.unpack(f"={spec.words}Q", best[1])

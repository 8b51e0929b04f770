# SPDX-License-Identifier: Apache-2.0
"""Frames for packet stories: made and read back with every checksum, in either address family.

Independent of the BPF programs on purpose: checksums are computed from scratch here.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass, field, replace

TCP, UDP, ICMP4, ICMP6, SCTP = 6, 17, 1, 58, 132
FIN, SYN, RST, ACK = 1, 2, 4, 16
HOST_MAC, PEER_MAC = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")


def checksum(data: bytes) -> int:
    """RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def raw(address: str) -> bytes:
    """An address's bytes."""
    return ipaddress.ip_address(address).packed


@dataclass(frozen=True)
class Frame:
    """A packet. `options` of IPv4 (multiple of 4 bytes); `extensions` of IPv6: (type, bytes).

    `fragment`: (offset in 8-byte units, more, id). An ICMP packet has `icmp` = (type, code, word)
    and no ports.
    """

    src: str
    dst: str
    proto: int = TCP
    sport: int = 40000
    dport: int = 80
    flags: int = SYN
    ttl: int = 64
    payload: bytes = b"hello"
    icmp: tuple[int, int, int] = (0, 0, 0)
    options: bytes = b""
    extensions: tuple[tuple[int, bytes], ...] = ()
    fragment: tuple[int, bool, int] | None = None
    seq: int = 1000
    udp_checksum: bool = True
    dont_fragment: bool = False
    macs: tuple[bytes, bytes] = (HOST_MAC, PEER_MAC)
    valid: bool = field(default=True, compare=False)

    def __post_init__(self) -> None:
        if self.proto != TCP:
            object.__setattr__(self, "flags", 0)
            object.__setattr__(self, "seq", 0)
        if self.proto not in (TCP, UDP, SCTP):
            object.__setattr__(self, "sport", 0)
            object.__setattr__(self, "dport", 0)

    @property
    def family(self) -> int:
        """4 or 6."""
        return ipaddress.ip_address(self.src).version

    def but(self, **changes: object) -> Frame:
        """The same, changed."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def reply(self, **changes: object) -> Frame:
        """What the receiver of this packet would answer."""
        flags = SYN | ACK if self.flags == SYN else ACK
        back = replace(
            self,
            src=self.dst,
            dst=self.src,
            sport=self.dport,
            dport=self.sport,
            flags=flags,
            ttl=64,
        )
        return replace(back, **changes)  # type: ignore[arg-type]

    def transport(self) -> bytes:
        """Transport header and payload."""
        pseudo = raw(self.src) + raw(self.dst)
        if self.proto == TCP:
            body = struct.pack(
                ">HHIIBBHHH", self.sport, self.dport, self.seq, 0, 0x50, self.flags, 1000, 0, 0
            )
            at = 16
        elif self.proto == UDP:
            body = struct.pack(">HHHH", self.sport, self.dport, 8 + len(self.payload), 0)
            at = 6
        elif self.proto in (ICMP4, ICMP6):
            kind, code, word = self.icmp
            body = struct.pack(">BBHI", kind, code, 0, word)
            at = 2
        elif self.proto == SCTP:  # a tag, and a checksum that nobody may touch
            return struct.pack(">HHII", self.sport, self.dport, 7, 0x12345678) + self.payload
        else:
            return self.payload
        body += self.payload
        tail = struct.pack(">I3xB", len(body), self.proto)
        value = checksum(body if self.proto == ICMP4 else pseudo + tail + body)
        if self.proto == UDP:
            value = (value or 0xFFFF) if self.udp_checksum else 0
        return body[:at] + struct.pack(">H", value) + body[at + 2 :]

    def network(self) -> bytes:
        """The whole packet from the network header on. Of fragments `payload` is all of the data."""
        later = self.fragment is not None and self.fragment[0] > 0
        body = self.payload if later else self.transport()
        if self.family == 4:
            offset, more, number = self.fragment or (0, False, 0)
            header = (
                struct.pack(
                    ">BBHHHBBH4s4s",
                    0x45 + len(self.options) // 4,
                    0,
                    20 + len(self.options) + len(body),
                    number,
                    (0x4000 if self.dont_fragment else 0) | (0x2000 if more else 0) | offset,
                    self.ttl,
                    self.proto,
                    0,
                    raw(self.src),
                    raw(self.dst),
                )
                + self.options
            )
            return header[:10] + struct.pack(">H", checksum(header)) + header[12:] + body
        chain = list(self.extensions)
        if self.fragment is not None:
            offset, more, number = self.fragment
            chain.append((44, struct.pack(">BBHI", 0, 0, offset << 3 | more, number)))
        kinds = [kind for kind, _ in chain] + [self.proto]
        extensions = b"".join(bytes([kinds[i + 1]]) + data[1:] for i, (_, data) in enumerate(chain))
        size = len(extensions) + len(body)
        return (
            struct.pack(
                ">IHBB16s16s", 6 << 28, size, kinds[0], self.ttl, raw(self.src), raw(self.dst)
            )
            + extensions
            + body
        )

    def __bytes__(self) -> bytes:
        """The Ethernet frame."""
        return (
            self.macs[0]
            + self.macs[1]
            + (b"\x08\x00" if self.family == 4 else b"\x86\xdd")
            + self.network()
        )


def read(frame: bytes) -> Frame:
    """The frame's packet; `valid` says whether every checksum in it is right."""
    return read_network(frame[14:], macs=(frame[:6], frame[6:12]))


def read_network(packet: bytes, macs: tuple[bytes, bytes] = (HOST_MAC, PEER_MAC)) -> Frame:
    """The same from the network header on (what ICMP errors quote may be cut short)."""
    valid, options, fragment, extensions = True, b"", None, []
    if packet[0] >> 4 == 4:
        size = (packet[0] & 15) * 4
        header, proto, ttl = packet[:size], packet[9], packet[8]
        src, dst = ipaddress.ip_address(packet[12:16]), ipaddress.ip_address(packet[16:20])
        valid = checksum(header) == 0
        options = header[20:]
        (place,) = struct.unpack(">H", header[6:8])
        if place & 0x3FFF:
            fragment = (place & 0x1FFF, bool(place & 0x2000), int.from_bytes(header[4:6], "big"))
        (total,) = struct.unpack(">H", header[2:4])
        body = packet[size:total]
    else:
        proto, ttl = packet[6], packet[7]
        src, dst = ipaddress.ip_address(packet[8:24]), ipaddress.ip_address(packet[24:40])
        size = 40
        while proto in (0, 43, 44, 60):
            length = 8 if proto == 44 else (packet[size + 1] + 1) * 8
            if proto == 44:
                place = int.from_bytes(packet[size + 2 : size + 4], "big")
                fragment = (
                    place >> 3,
                    bool(place & 1),
                    int.from_bytes(packet[size + 4 : size + 8], "big"),
                )
            else:
                extensions.append((proto, packet[size : size + length]))
            proto, size = packet[size], size + length
        body = packet[size:]
    found = Frame(
        str(src),
        str(dst),
        proto,
        0,
        0,
        0,
        ttl,
        body,
        options=options,
        fragment=fragment,
        macs=macs,
        valid=valid,
        extensions=tuple(extensions),
    )
    if fragment is not None and fragment[0] > 0:
        return found
    return _read_transport(found, body, src.packed + dst.packed)


def _read_transport(found: Frame, body: bytes, pseudo: bytes) -> Frame:
    proto = found.proto
    whole = (
        checksum(body if proto == ICMP4 else pseudo + struct.pack(">I3xB", len(body), proto) + body)
        == 0
    )
    if proto == TCP and len(body) >= 20:
        sport, dport, seq, _, offset, flags = struct.unpack(">HHIIBB", body[:14])
        return found.but(
            sport=sport,
            dport=dport,
            flags=flags,
            seq=seq,
            payload=body[(offset >> 4) * 4 :],
            valid=found.valid and whole,
        )
    if proto == UDP and len(body) >= 8:
        sport, dport, _, value = struct.unpack(">HHHH", body[:8])
        return found.but(
            sport=sport,
            dport=dport,
            payload=body[8:],
            udp_checksum=value != 0,
            valid=found.valid and (whole or value == 0),
        )
    if proto in (ICMP4, ICMP6) and len(body) >= 8:
        kind, code, _, word = struct.unpack(">BBHI", body[:8])
        return found.but(icmp=(kind, code, word), payload=body[8:], valid=found.valid and whole)
    if proto == SCTP and len(body) >= 12:
        sport, dport, _, crc = struct.unpack(">HHII", body[:12])
        whole = crc == 0x12345678
        return found.but(sport=sport, dport=dport, payload=body[12:], valid=found.valid and whole)
    if proto in (TCP, UDP) and len(body) >= 4:
        sport, dport = struct.unpack(">HH", body[:4])
        return found.but(sport=sport, dport=dport)
    return found

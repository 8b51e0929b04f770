# SPDX-License-Identifier: Apache-2.0
"""Addresses as the API server writes them, turned into the bytes the maps hold."""

from __future__ import annotations

import socket

_MAPPED = bytes(10) + b"\xff\xff"


def packed(text: str) -> bytes | None:
    """4 or 16 bytes in network order; None when it is no address.

    As Kubernetes does: leading zeros in IPv4 are decimal, an IPv4-mapped IPv6 address is IPv4.
    """
    try:
        if ":" not in text:
            return socket.inet_pton(socket.AF_INET, text)
        address = socket.inet_pton(socket.AF_INET6, text)
    except (OSError, ValueError):
        return _zero_padded(text)
    return address[12:] if address.startswith(_MAPPED) else address


def _zero_padded(text: str) -> bytes | None:
    parts = text.split(".")
    if len(parts) != 4 or not all(p.isascii() and p.isdigit() and int(p) < 256 for p in parts):
        return None
    return bytes(int(p) for p in parts)


def cidr(text: str) -> tuple[int, bytes] | None:
    """Prefix length and masked network address; None when it is no CIDR."""
    address, slash, length = text.strip().partition("/")
    network = packed(address)
    if network is None or not slash or not (length.isascii() and length.isdigit()):
        return None
    bits = len(network) * 8
    if int(length) > bits:
        return None
    mask = (1 << bits) - (1 << (bits - int(length)))
    masked = int.from_bytes(network) & mask
    return int(length), masked.to_bytes(len(network))


def contains(network: tuple[int, bytes], address: bytes) -> bool:
    """Whether the address lies in the network; never across families."""
    length, prefix = network
    if len(prefix) != len(address):
        return False
    shift = len(address) * 8 - length
    return int.from_bytes(address) >> shift == int.from_bytes(prefix) >> shift


def mapped(address: bytes) -> bytes:
    """Always 16 bytes, IPv4 as ::ffff:a.b.c.d."""
    return _MAPPED + address if len(address) == 4 else address


def family_of(address: bytes) -> int:
    """4 or 6."""
    return 4 if len(address) == 4 else 6

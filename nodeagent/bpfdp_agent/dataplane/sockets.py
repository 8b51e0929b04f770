# SPDX-License-Identifier: Apache-2.0
"""Closing UDP sockets that are connected to backends that are gone, of the node and of its pods.

A connected UDP socket was translated once, at connect(): nothing would ever tell its owner that
the backend is gone. SOCK_DESTROY disconnects it: its next call fails, and it connects again.
Netlink messages: uapi/linux/inet_diag.h.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from bpfdp_agent.bpf.errors import SyscallFailed
from bpfdp_agent.bpf.netns import in_netns
from bpfdp_agent.dataplane.pods import NETNS_DIR

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY, _SOCK_DESTROY = 20, 21
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_HEADER = struct.Struct("=IHHII")
_REQUEST_HEAD = struct.Struct("=BBBBI")  # family, protocol, extensions, pad, states
_ID_OFFSET, _ID_SIZE = 4, 48  # of struct inet_diag_sockid in struct inet_diag_msg
_PEER_PORT_OFFSET, _PEER_OFFSET, _COOKIE_OFFSET = 2, 20, 40  # in struct inet_diag_sockid
_CONNECTED = 1 << 1  # TCP_ESTABLISHED, which UDP uses for connected sockets
_ALREADY_GONE = (errno.ENOENT, errno.ESTALE)

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
Backend = tuple[IPAddress, int]
Translated = Callable[[bytes, Backend], bool]
"""Whether a socket (its SO_COOKIE, 8 bytes) was connected to the backend through a service."""


def close_in_pods(
    namespaces: Iterable[str], backends: Collection[Backend], translated: Translated
) -> int:
    """The same in the pods' namespaces (names under /run/netns); one that is gone has no socket."""
    closed = 0
    for name in namespaces:
        try:
            descriptor = os.open(NETNS_DIR / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            closed += in_netns(descriptor, lambda: close_connected_udp(backends, translated))
        finally:
            os.close(descriptor)
    return closed


def close_connected_udp(backends: Collection[Backend], translated: Translated) -> int:
    """Close this namespace's UDP sockets connected to any of the (address, port); how many.

    Only those that asked for a service: one that was connected to the address itself stays.
    """
    if not backends:
        return 0
    wanted = frozenset(backends)
    closed = 0
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as diag:
        for family in (socket.AF_INET, socket.AF_INET6):
            connected = list(_connected_udp(diag, family))
            for peer, sockid in connected:
                cookie = sockid[_COOKIE_OFFSET : _COOKIE_OFFSET + 8]
                if peer in wanted and translated(cookie, peer):
                    closed += _destroy(diag, family, sockid)
    return closed


def _connected_udp(diag: socket.socket, family: int) -> Iterator[tuple[Backend, bytes]]:
    """(peer, the kernel's name of the socket) of each connected UDP socket."""
    head = _REQUEST_HEAD.pack(family, socket.IPPROTO_UDP, 0, 0, _CONNECTED)
    _send(diag, _SOCK_DIAG_BY_FAMILY, _REQUEST | _DUMP, head + bytes(_ID_SIZE))
    for body in _answers(diag):
        sockid = body[_ID_OFFSET : _ID_OFFSET + _ID_SIZE]
        (port,) = struct.unpack_from(">H", sockid, _PEER_PORT_OFFSET)
        yield (_address(family, sockid[_PEER_OFFSET : _PEER_OFFSET + 16]), port), sockid


def _address(family: int, raw: bytes) -> IPAddress:
    """IPv4 also where an IPv6 socket talks IPv4."""
    if family == socket.AF_INET:
        return ipaddress.IPv4Address(raw[:4])
    address = ipaddress.IPv6Address(raw)
    return address.ipv4_mapped or address


def _destroy(diag: socket.socket, family: int, sockid: bytes) -> int:
    head = _REQUEST_HEAD.pack(family, socket.IPPROTO_UDP, 0, 0, _CONNECTED)
    _send(diag, _SOCK_DESTROY, _REQUEST | _ACK, head + sockid)
    try:
        list(_answers(diag))
    except SyscallFailed as error:
        if error.errno in _ALREADY_GONE:
            return 0
        raise
    return 1


def _send(diag: socket.socket, kind: int, flags: int, body: bytes) -> None:
    diag.send(_HEADER.pack(_HEADER.size + len(body), kind, flags, 1, 0) + body)


def _answers(diag: socket.socket) -> Iterator[bytes]:
    """Bodies up to the end of the dump or the acknowledgement. Raises SyscallFailed."""
    while True:
        data = diag.recv(1 << 16)
        position = 0
        while position < len(data):
            size, kind, *_ = _HEADER.unpack_from(data, position)
            body = data[position + _HEADER.size : position + size]
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                (code,) = struct.unpack_from("=i", body)
                if code:
                    raise SyscallFailed("sock_diag", -code)
                return
            yield body
            position += (size + 3) & ~3

# SPDX-License-Identifier: Apache-2.0
"""What the process that plays the node does with its sockets; imported by that process."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import subprocess
from pathlib import Path
from typing import Any

SO_NETNS_COOKIE = 71


def be_the_node(cgroup: str) -> int:
    """Runs in the process: enter the cgroup and a new namespace; the namespace's cookie."""
    (Path(cgroup) / "cgroup.procs").write_text(str(os.getpid()))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x40000000) == 0
    for command in (
        "link set lo up",
        "addr add 10.0.0.1/32 dev lo",
        "-6 addr add fd00::1/128 dev lo nodad",
    ):
        subprocess.run(["ip", *command.split()], check=True)
    with socket.socket() as any_socket:
        cookie = any_socket.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
    return int(struct.unpack("=Q", cookie)[0])


def kind_of(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def tcp_exchange(
    address: str, port: int, listen: tuple[str, int], inet6: bool = False
) -> tuple[Any, bytes]:
    """Connect to an address while `listen` answers: (peer's name as shown, answer)."""
    family = socket.AF_INET6 if inet6 else kind_of(address)
    with socket.socket(kind_of(listen[0])) as server, socket.socket(family) as client:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(listen)
        server.listen()
        client.settimeout(2)
        client.connect((address, port))
        with server.accept()[0] as accepted:
            accepted.sendall(b"hello")
        return client.getpeername()[:2], client.recv(5)


def connect_error(kind: int, address: str, port: int) -> str:
    with socket.socket(kind_of(address), kind) as client:
        client.settimeout(2)
        try:
            client.connect((address, port))
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error))
    return ""


def answer_what_came(servers: list[socket.socket], names: list[tuple[str, int]]) -> None:
    """Each server that was asked answers with its port."""
    for server, name in zip(servers, names, strict=True):
        try:
            _, sender = server.recvfrom(10)
        except BlockingIOError:
            continue
        server.sendto(str(name[1]).encode(), sender)


def udp_exchange(
    address: str, port: int, listen: list[tuple[str, int]], rounds: int = 1, connected: bool = False
) -> list[tuple[Any, bytes]]:
    """Ask `address` by UDP: (sender's name as shown, answer), each answer naming its server."""
    servers = [socket.socket(kind_of(name[0]), socket.SOCK_DGRAM) for name in listen]
    answers = []
    with socket.socket(kind_of(address), socket.SOCK_DGRAM) as client:
        client.settimeout(2)
        for server, name in zip(servers, listen, strict=True):
            server.bind(name)
            server.setblocking(False)
        if connected:
            client.connect((address, port))
        for _ in range(rounds):
            if connected:
                client.send(b"?")
            else:
                client.sendto(b"?", (address, port))
            answer_what_came(servers, listen)
            answer, seen = client.recvfrom(10)
            answers.append((seen[:2], answer))
    for server in servers:
        server.close()
    return answers


def reach_everywhere() -> None:
    """Give every address of the cast a route, so that a socket may be connected to it."""
    for route in ("10.0.0.0/8", "192.0.2.0/24", "198.51.100.0/24", "fd00::/8", "2001:db8::/32"):
        subprocess.run(["ip", "route", "replace", route, "dev", "lo"], check=True)


def connect_once(kind: int, address: str, port: int) -> int:
    """Begin to connect; the error at once, 0 where there is none."""
    with socket.socket(kind_of(address), kind) as client:
        client.setblocking(False)
        error = client.connect_ex((address, port))
    return 0 if error == errno.EINPROGRESS else error


_held: dict[str, socket.socket] = {}


def hold_udp(address: str, port: int) -> Any:
    """Connect a UDP socket and keep it; its peer's name as shown."""
    held = _held["udp"] = socket.socket(kind_of(address), socket.SOCK_DGRAM)
    held.settimeout(2)
    held.connect((address, port))
    return held.getpeername()[:2]


def held_send() -> str:
    """Send by the kept socket: the error's name, empty where there is none."""
    try:
        _held["udp"].send(b"?")
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return ""


def hold_unconnected() -> None:
    """Keep an unconnected UDP socket."""
    for family in (socket.AF_INET, socket.AF_INET6):
        held = socket.socket(family, socket.SOCK_DGRAM)
        held.settimeout(2)
        _held[f"unconnected {int(family)}"] = held


def held_ask(address: str, port: int, listen: list[tuple[str, int]]) -> tuple[Any, bytes] | str:
    """Ask by the kept unconnected socket: (sender as shown, the port of who answered), or error."""
    client = _held[f"unconnected {int(kind_of(address))}"]
    servers = [socket.socket(kind_of(name[0]), socket.SOCK_DGRAM) for name in listen]
    try:
        for server, name in zip(servers, listen, strict=True):
            server.bind(name)
            server.setblocking(False)
        client.sendto(b"?", (address, port))
        answer_what_came(servers, listen)
        answer, seen = client.recvfrom(10)
        return seen[:2], answer
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    finally:
        for server in servers:
            server.close()

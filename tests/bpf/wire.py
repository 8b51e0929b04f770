# SPDX-License-Identifier: Apache-2.0
"""Two nodes, their pods and an outside client in namespaces of their own, with real devices.

The nodes' FORWARD chain drops everything, so what arrives went past the stack. Reverse path
filtering is strict. The client's gateway address is on the nodes' link; its own is behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bpf.frames import raw
from bpf.nodes import CAST, Node
from bpfdp_agent.bpf import syscall
from bpfdp_agent.bpf.netns import in_netns
from bpfdp_agent.bpf.objects import Function
from bpfdp_agent.bpf.syscall import AttachType
from bpfdp_agent.dataplane import tunnel

PREFIX = f"bpfdp{os.getpid()}"
FOUR, SIX = CAST[4], CAST[6]


class Place:
    """A network namespace."""

    def __init__(self, name: str) -> None:
        self.name = f"{PREFIX}-{name}"
        _shell(f"ip netns add {self.name}")
        self._file = os.open(f"/run/netns/{self.name}", os.O_RDONLY)
        self.shell("ip link set lo up")

    def run(self, work: Callable[[], Any]) -> Any:
        return in_netns(self._file, work)

    def shell(self, command: str) -> str:
        """Output of a command in this namespace."""
        return str(self.run(lambda: _shell(command)))

    def sysctl(self, **settings: int) -> None:
        for name, value in settings.items():
            path = Path("/proc/sys/net", name.replace("__", "/"))
            self.run(lambda path=path, value=value: path.write_text(str(value)))

    def close(self) -> None:
        os.close(self._file)
        subprocess.run(["ip", "netns", "del", self.name], check=False)


class WireNode(Place):
    """A node: devices by the names that Node knows them by."""

    def __init__(self, name: str, number: int, switch: Place) -> None:
        super().__init__(name)
        self.number = number
        self.ifindex: dict[str, int] = {}
        cable(self, "data0", switch, f"port{number}")
        switch.shell(f"ip link set port{number} master br0 up")
        self.sysctl(ipv4__conf__all__forwarding=1, ipv6__conf__all__forwarding=1)
        self.sysctl(ipv4__conf__all__rp_filter=1, ipv4__conf__data0__rp_filter=1)
        self.shell(f"ip addr add 10.0.0.{number}/24 dev data0")
        self.shell(f"ip -6 addr add fd00::{number}/64 dev data0 nodad")
        self.shell("ip route add default via 10.0.0.254")
        self.shell("ip -6 route add default via fd00::fe")
        other = 3 - number
        self.shell(f"ip route add 10.1.{other}.0/24 via 10.0.0.{other}")
        self.shell(f"ip -6 route add fd01:{other}::/64 via fd00::{other}")
        self.shell("iptables -P FORWARD DROP")
        self.shell("ip6tables -P FORWARD DROP")
        self.run(lambda: asyncio.run(tunnel.ensure(4789, 1400)))
        self.find("data0")
        self.ifindex["vxlan0"] = self.run(lambda: socket.if_nametoindex(tunnel.DEVICE))

    def find(self, device: str) -> None:
        self.ifindex[device] = self.run(lambda: socket.if_nametoindex(device))

    def pod(self, device: str, four: str, six: str) -> Place:
        """A pod as the ptp CNI plugin makes one."""
        pod = Place(f"{self.name[-1]}{device}")
        cable(self, device, pod, "eth0")
        n = self.number
        self.shell(f"ip addr add 10.1.{n}.1/32 dev {device}")
        self.shell(f"ip -6 addr add fd01:{n}::1/128 dev {device} nodad")
        self.shell(f"ip route add {four} dev {device}")
        self.shell(f"ip -6 route add {six} dev {device}")
        pod.shell(f"ip addr add {four}/32 dev eth0")
        pod.shell(f"ip -6 addr add {six}/128 dev eth0 nodad")
        pod.shell(f"ip route add 10.1.{n}.1 dev eth0")
        pod.shell(f"ip -6 route add fd01:{n}::1 dev eth0")
        pod.shell(f"ip route add default via 10.1.{n}.1")
        pod.shell(f"ip -6 route add default via fd01:{n}::1")
        self.find(device)
        return pod


class Wire:
    """All of it. `a`, `b`: programs and maps of one family on each node, attached."""

    def __init__(self) -> None:
        self.switch = Place("sw")
        self.switch.shell("ip link add br0 type bridge")
        self.switch.shell("ip link set br0 up")
        self.node_a, self.node_b = WireNode("a", 1, self.switch), WireNode("b", 2, self.switch)
        self.client = Place("client")
        cable(self.client, "eth0", self.switch, "port9")
        self.switch.shell("ip link set port9 master br0 up")
        for command in (
            "ip addr add 10.0.0.254/24 dev eth0",
            "ip -6 addr add fd00::fe/64 dev eth0 nodad",
            f"ip addr add {FOUR.client}/32 dev lo",
            f"ip -6 addr add {SIX.client}/128 dev lo nodad",
            f"ip route add {FOUR.external} via 10.0.0.1",
            f"ip -6 route add {SIX.external} via fd00::1",
        ):
            self.client.shell(command)
        self.pod_x = self.node_a.pod("podx", FOUR.pod_x, SIX.pod_x)
        self.pod_y = self.node_a.pod("pody", FOUR.pod_y, SIX.pod_y)
        self.pod_z = self.node_b.pod("podx", FOUR.pod_z, SIX.pod_z)
        self._links: list[int] = []
        self.nodes: dict[int, tuple[Node, Node]] = {}

    def attach(
        self, family: int, functions: dict[str, Function], arrive: dict[str, Function]
    ) -> None:
        a = Node(family, self.node_a, functions, arrive)
        b = Node(family, self.node_b, functions, arrive)
        self.nodes[family] = a, b
        for node, place, devices in (
            (a, self.node_a, ("podx", "pody")),
            (b, self.node_b, ("podx",)),
        ):
            for device in devices:
                self._link(place, node, device, "from_pod", AttachType.TCX_INGRESS)
                self._link(place, node, device, "to_pod", AttachType.TCX_EGRESS)
            self._link(place, node, "data0", "from_net", AttachType.TCX_INGRESS)
            self._link(place, node, "data0", "to_net", AttachType.TCX_EGRESS)
            self._link(place, node, "vxlan0", "from_tunnel", AttachType.TCX_INGRESS)

    def _link(
        self, place: WireNode, node: Node, device: str, program: str, kind: AttachType
    ) -> None:
        ifindex = place.ifindex[device]
        link = place.run(lambda: syscall.link_create(node.program(program), ifindex, kind))
        self._links.append(link)

    def close(self) -> None:
        for link in self._links:
            os.close(link)
        for pair in self.nodes.values():
            for node in pair:
                node.close()
        for place in (
            *(self.pod_x, self.pod_y, self.pod_z),
            *(self.client, self.node_a, self.node_b, self.switch),
        ):
            place.close()


def cable(left: Place, left_name: str, right: Place, right_name: str) -> None:
    """A veth pair between two namespaces, up."""
    left.shell(f"ip link add {left_name} type veth peer name {right_name} netns {right.name}")
    left.shell(f"ip link set {left_name} up")
    right.shell(f"ip link set {right_name} up")


def _shell(command: str) -> str:
    done = subprocess.run(command.split(), check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


@contextlib.contextmanager
def serving(place: Place, address: str, port: int) -> Iterator[None]:
    """TCP and UDP on a port: answers with the peer's address and the number of bytes it got.

    TCP reads to the end of the stream first.
    """
    kind = socket.AF_INET6 if ":" in address else socket.AF_INET
    stream, datagram = place.run(
        lambda: (socket.socket(kind, socket.SOCK_STREAM), socket.socket(kind, socket.SOCK_DGRAM))
    )
    for each in (stream, datagram):
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        each.bind((address, port))
        each.settimeout(0.2)
    stream.listen(64)
    stop = threading.Event()

    def streams() -> None:
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                accepted, peer = stream.accept()
                with accepted:
                    accepted.settimeout(5)
                    size = 0
                    while data := accepted.recv(1 << 16):
                        size += len(data)
                    accepted.sendall(f"{peer[0]} {size}".encode() + bytes(size))

    def datagrams() -> None:
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                data, peer = datagram.recvfrom(1 << 16)
                datagram.sendto(f"{peer[0]} {len(data)}".encode(), peer)

    threads = [threading.Thread(target=work, daemon=True) for work in (streams, datagrams)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        stream.close()
        datagram.close()


@contextlib.contextmanager
def echoing(place: Place, address: str, port: int, kind: socket.SocketKind) -> Iterator[None]:
    """Sends back what comes: one TCP connection's bytes as they come, or datagrams."""
    with open_socket(place, address, kind, None) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        if kind == socket.SOCK_STREAM:
            server.listen(1)
        thread = threading.Thread(target=_echo, args=(server, kind), daemon=True)
        thread.start()
        yield
        server.settimeout(0.1)
    thread.join()


def _echo(server: socket.socket, kind: socket.SocketKind) -> None:
    with contextlib.suppress(OSError):
        if kind == socket.SOCK_DGRAM:
            while True:
                data, peer = server.recvfrom(100)
                server.sendto(data, peer)
        accepted, _ = server.accept()
        with accepted:
            accepted.settimeout(3)
            while data := accepted.recv(100):
                accepted.sendall(data)


def ask_tcp(
    place: Place, address: str, port: int, *, source: str | None = None, size: int = 10
) -> str:
    """Send `size` bytes; the server's words. OSError when there is no connection."""
    with open_socket(place, address, socket.SOCK_STREAM, source) as client:
        client.connect((address, port))
        client.sendall(bytes(size))
        client.shutdown(socket.SHUT_WR)
        answer = b""
        while data := client.recv(1 << 16):
            answer += data
    words = answer.rstrip(b"\0").decode()
    assert len(answer) == len(words) + size
    return words


def ask_udp(
    place: Place, address: str, port: int, *, source: str | None = None, size: int = 10
) -> str:
    """The same with a datagram."""
    with open_socket(place, address, socket.SOCK_DGRAM, source) as client:
        client.connect((address, port))
        client.send(bytes(size))
        return client.recv(1000).decode()


def open_socket(place: Place, address: str, kind: int, source: str | None) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made: socket.socket = place.run(lambda: socket.socket(family, kind))
    made.settimeout(3)
    if source:
        made.bind((source, 0))
    return made


__all__ = ["Place", "Wire", "ask_tcp", "ask_udp", "echoing", "open_socket", "raw", "serving"]

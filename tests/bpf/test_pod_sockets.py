# SPDX-License-Identifier: Apache-2.0
"""Pods' sockets at connect time: which are translated in which mode, and who is the client.

The process of test_node_sockets plays a pod here. It has no route to a service's address, so a
socket that is left to the packet path is told that the network is unreachable.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path

import pytest
from bpf.frames import raw
from bpf.node_process import (
    connect_error,
    held_ask,
    held_send,
    hold_udp,
    hold_unconnected,
    tcp_exchange,
    udp_exchange,
)
from bpf.test_node_sockets import (  # noqa: F401
    LOOPBACK,
    NODE,
    SERVICE,
    Sockets,
    attached,
    node_process,
    sockets,
)
from bpfdp_agent import layouts
from bpfdp_agent.bpf import syscall
from bpfdp_agent.dataplane import sockets as closing
from bpfdp_agent.layouts import SettingsFlag, SocketKind
from bpfdp_agent.reconcile.connections import _service_key

POD = {4: "10.0.0.77", 6: "fd00::77"}
STREAM, DATAGRAM = int(socket.SOCK_STREAM), int(socket.SOCK_DGRAM)
TCP, UDP = 6, 17
PER_PACKET = "ENETUNREACH"
MODES = {
    "TCP": SettingsFlag.CONNECT_TCP,
    "Enabled": SettingsFlag.CONNECT_TCP | SettingsFlag.CONNECT_UDP | SettingsFlag.CONNECT_UDP_USED,
    "Disabled": SettingsFlag(0),
    "TCP after Enabled": SettingsFlag.CONNECT_TCP | SettingsFlag.CONNECT_UDP_USED,
}


def kept(each: Sockets) -> list[bytes]:
    """Keys of both maps of sockets."""
    return [key for name in ("sockets", "tcp_sockets") for key in each.maps[name].read()]


def mode(each: Sockets, name: str) -> None:
    """The node is another namespace, and the mode."""
    own = {f"node{each.family}": raw(NODE[each.family])}
    each.put("settings", {"index": 0}, host_netns_cookie=each.cookie + 1, flags=MODES[name], **own)


@pytest.fixture
def pod(attached: dict[int, Sockets], sockets: Sockets) -> Sockets:  # noqa: F811
    """The process is a pod, in mode Enabled; nothing of earlier tests' sockets is known."""
    for each in attached.values():
        mode(each, "Enabled")
        each.put("pod_namespaces", {"cookie": each.cookie}, addr=raw(POD[each.family]))
    return sockets


@pytest.mark.parametrize(
    ("name", "tcp", "udp"),
    [
        ("TCP", "", PER_PACKET),
        ("Enabled", "", ""),
        ("Disabled", PER_PACKET, PER_PACKET),
        ("TCP after Enabled", "", PER_PACKET),
    ],
)
def test_what_a_mode_translates(pod: Sockets, name: str, tcp: str, udp: str) -> None:
    family = pod.family
    mode(pod, name)
    pod.service(SERVICE[family], 53, [(NODE[family], 5300)], proto=UDP)
    assert pod.run(connect_error, DATAGRAM, SERVICE[family], 53) == udp
    pod.service(SERVICE[family], 80, [(NODE[family], 9)], proto=TCP)
    found = pod.run(connect_error, STREAM, SERVICE[family], 80)
    assert found == (tcp or "ECONNREFUSED"), "nobody listens at the backend"


def test_the_service_is_shown(attached: dict[int, Sockets], pod: Sockets) -> None:  # noqa: F811
    family = pod.family
    pod.service(SERVICE[family], 80, [(NODE[family], 8080)], proto=TCP)
    shown, answer = pod.run(tcp_exchange, SERVICE[family], 80, (NODE[family], 8080))
    assert (shown, answer) == ((SERVICE[family], 80), b"hello")
    four, mapped = attached[4], f"::ffff:{SERVICE[4]}"
    four.service(SERVICE[4], 80, [(NODE[4], 8080)], proto=TCP)
    shown, answer = four.run(tcp_exchange, mapped, 80, (NODE[4], 8080), True)
    assert (shown, answer) == ((mapped, 80), b"hello")


@pytest.mark.parametrize("connected", [False, True])
def test_udp_shows_the_service(pod: Sockets, connected: bool) -> None:
    family = pod.family
    servers = [(NODE[family], 5300 + i) for i in range(8)]
    pod.service(SERVICE[family], 53, servers, proto=UDP)
    got = pod.run(udp_exchange, SERVICE[family], 53, servers, 12, connected)
    assert {shown for shown, _ in got} == {(SERVICE[family], 53)}
    assert len({answer for _, answer in got}) == 1


def test_a_namespace_that_no_pod_is_known_to_have(pod: Sockets) -> None:
    family = pod.family
    syscall.map_delete_all(
        pod.maps["pod_namespaces"].descriptor, list(pod.maps["pod_namespaces"].read())
    )
    pod.service(SERVICE[family], 80, [(NODE[family], 8080)], proto=TCP)
    assert pod.run(connect_error, STREAM, SERVICE[family], 80) == PER_PACKET
    pod.service(SERVICE[family], 53, [(NODE[family], 5300)], proto=UDP)
    assert pod.run(connect_error, DATAGRAM, SERVICE[family], 53) == PER_PACKET


def test_affinity_is_by_the_pods_own_address(pod: Sockets) -> None:
    family = pod.family
    pod.service(SERVICE[family], 80, [(NODE[family], 8080)], proto=TCP)
    frontend = {"addr": raw(SERVICE[family]), "port": 80, "proto": TCP}
    pod.put("frontends", frontend, service=7, cluster_count=1, affinity_seconds=60)
    pod.run(tcp_exchange, SERVICE[family], 80, (NODE[family], 8080))
    keys = [layouts.AFFINITY_KEY.unpack(family, key) for key in pod.maps["affinity"].read()]
    assert keys == [{"client": raw(POD[family]), "service": 7}]


@pytest.mark.parametrize("allowed", [True, False])
def test_source_ranges_are_about_the_pods_own_address(pod: Sockets, allowed: bool) -> None:
    """One that is refused is left to the packet path, which drops."""
    family = pod.family
    flags = int(layouts.FrontendFlag.SOURCE_RANGES)
    pod.service(SERVICE[family], 80, [(NODE[family], 9)], proto=TCP, flags=flags)
    client = raw(POD[family] if allowed else NODE[family])
    length = 32 + 8 * len(client)
    pod.put("source_ranges", {"prefixlen": length, "service": 7, "addr": client}, value=1)
    found = pod.run(connect_error, STREAM, SERVICE[family], 80)
    assert found == ("ECONNREFUSED" if allowed else PER_PACKET)


def test_its_own_backend_is_left_to_the_packet_path(pod: Sockets) -> None:
    family = pod.family
    pod.service(SERVICE[family], 80, [(POD[family], 8080)], proto=TCP)
    assert pod.run(connect_error, STREAM, SERVICE[family], 80) == PER_PACKET
    pod.service(SERVICE[family], 53, [(POD[family], 5300)], proto=UDP)
    assert pod.run(connect_error, DATAGRAM, SERVICE[family], 53) == PER_PACKET
    pod.run(hold_unconnected)
    assert pod.run(held_ask, SERVICE[family], 53, []) == PER_PACKET


@pytest.mark.parametrize("flags", [0, layouts.FrontendFlag.INTERNAL_DROP])
def test_no_endpoint_is_left_to_the_packet_path(pod: Sockets, flags: int) -> None:
    """It answers or drops; later datagrams of the socket find the backends that come."""
    family = pod.family
    for kind, proto in ((STREAM, TCP), (DATAGRAM, UDP)):
        pod.service(SERVICE[family], 80, [], proto=proto, flags=flags)
        assert pod.run(connect_error, kind, SERVICE[family], 80) == PER_PACKET


def test_an_address_that_no_service_has_is_not_refused_here(pod: Sockets) -> None:
    family = pod.family
    bits = 8 * len(raw(SERVICE[family]))
    pod.put("service_ranges", {"prefixlen": bits, "addr": raw(SERVICE[family])}, value=1)
    assert pod.run(connect_error, STREAM, SERVICE[family], 80) == PER_PACKET


def test_a_node_port_but_not_on_the_pods_loopback(pod: Sockets) -> None:
    family = pod.family
    pod.service(None, 30080, [(NODE[family], 8080)], proto=TCP)
    shown, answer = pod.run(tcp_exchange, NODE[family], 30080, (NODE[family], 8080))
    assert (shown, answer) == ((NODE[family], 30080), b"hello")
    shown, _ = pod.run(tcp_exchange, LOOPBACK[family], 30080, (LOOPBACK[family], 30080))
    assert shown == (LOOPBACK[family], 30080)
    services = [layouts.SOCKET_KEY.unpack(family, key) for key in kept(pod)]
    assert not [k for k in services if k["addr"] == raw(LOOPBACK[family])]


def test_an_unconnected_socket_leaves_a_backend_that_is_gone(pod: Sockets) -> None:
    """And comes to one that is new, after none."""
    family = pod.family
    servers = [(NODE[family], 5300 + i) for i in range(2)]
    pod.run(hold_unconnected)
    pod.service(SERVICE[family], 53, servers[:1], proto=UDP)
    assert pod.run(held_ask, SERVICE[family], 53, servers) == ((SERVICE[family], 53), b"5300")
    pod.service(SERVICE[family], 53, [], proto=UDP)
    syscall.map_delete(pod.maps["backends"].descriptor, layouts.INDEX.pack(family, index=100))
    assert pod.run(held_ask, SERVICE[family], 53, servers) == PER_PACKET
    pod.service(SERVICE[family], 53, servers[1:], proto=UDP)
    assert pod.run(held_ask, SERVICE[family], 53, servers) == ((SERVICE[family], 53), b"5301")


def test_another_mode_leaves_an_unconnected_socket_with_its_backend(pod: Sockets) -> None:
    family = pod.family
    servers = [(NODE[family], 5300 + i) for i in range(8)]
    pod.run(hold_unconnected)
    pod.service(SERVICE[family], 53, servers, proto=UDP)
    first = pod.run(held_ask, SERVICE[family], 53, servers)
    assert first[0] == (SERVICE[family], 53)
    mode(pod, "TCP after Enabled")
    for _ in range(8):
        assert pod.run(held_ask, SERVICE[family], 53, servers) == first


def close_to_gone(pod: Sockets, monkeypatch: pytest.MonkeyPatch, port: int) -> int:
    """What the agent does when the backend NODE:port goes."""
    monkeypatch.setattr(closing, "NETNS_DIR", Path(f"/proc/{pod.run(os.getpid)}/ns"))
    table = pod.maps["sockets"]

    def translated(cookie: bytes, backend: closing.Backend) -> bool:
        return table.lookup(_service_key(pod.family, cookie, backend)) is not None

    gone = [(ipaddress.ip_address(NODE[pod.family]), port)]
    return closing.close_in_pods(["net", "no-such"], gone, translated)


def test_a_connected_socket_learns_at_once_that_its_backend_is_gone(
    pod: Sockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = pod.family
    pod.service(SERVICE[family], 53, [(NODE[family], 5300)], proto=UDP)
    assert pod.run(hold_udp, SERVICE[family], 53) == (SERVICE[family], 53)
    assert pod.run(held_send) == ""
    pod.service(SERVICE[family], 53, [(NODE[family], 5301)], proto=UDP)
    assert close_to_gone(pod, monkeypatch, 5300) == 1
    assert pod.run(held_send) != "", "an error, not a datagram to nowhere"
    pod.run(hold_udp, SERVICE[family], 53)
    assert close_to_gone(pod, monkeypatch, 5300) == 0, "it is on the new backend"


def test_a_socket_connected_to_the_address_itself_stays(
    pod: Sockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = pod.family
    pod.service(SERVICE[family], 53, [(NODE[family], 5300)], proto=UDP)
    pod.run(hold_udp, NODE[family], 5300)
    assert close_to_gone(pod, monkeypatch, 5300) == 0


def test_what_is_remembered_of_a_socket(pod: Sockets) -> None:
    family = pod.family
    pod.service(SERVICE[family], 53, [(NODE[family], 5300)], proto=UDP)
    pod.run(hold_udp, SERVICE[family], 53)
    kinds = [layouts.SOCKET_KEY.unpack(family, key)["kind"] for key in kept(pod)]
    assert kinds == [SocketKind.SERVICE]

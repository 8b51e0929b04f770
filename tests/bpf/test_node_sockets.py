# SPDX-License-Identifier: Apache-2.0
"""The node's own sockets: cgroup programs have no test run, so these are real sockets.

A process in a cgroup and a network namespace of its own plays the node; the programs are attached
to that cgroup only.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from bpf.frames import raw
from bpf.node_process import be_the_node, connect_error, tcp_exchange, udp_exchange
from bpf.nodes import MAP_SIZE, compile_template, node_bytes
from bpfdp_agent import catalog, layouts
from bpfdp_agent.bpf import syscall
from bpfdp_agent.bpf.mounts import cgroup2_root
from bpfdp_agent.bpf.syscall import AttachType, ProgramType
from bpfdp_agent.dataplane.maps import OpenMap, create_map
from bpfdp_agent.dataplane.programs import load

SERVICE = {4: "10.96.0.10", 6: "fd96::10"}
NODE = {4: "10.0.0.1", 6: "fd00::1"}
CLEARED = (layouts.MapType.HASH, layouts.MapType.LRU_HASH, layouts.MapType.LPM_TRIE)
OTHER_NODE = {4: "10.0.0.2", 6: "fd00::2"}
LOOPBACK = {4: "127.0.0.1", 6: "::1"}


@dataclass
class Sockets:
    """One family's maps with the programs attached, and the process on the node."""

    family: int
    maps: dict[str, OpenMap]
    cookie: int
    run: Callable[..., Any]

    def put(self, name: str, key: dict[str, Any], **value: Any) -> None:
        layout = self.maps[name].layout
        syscall.map_update(
            self.maps[name].descriptor,
            layout.key.pack(self.family, **key),
            layout.value.pack(self.family, **value),
        )

    def settings(self, cookie: int) -> None:
        own = {f"node{self.family}": raw(NODE[self.family])}
        self.put("settings", {"index": 0}, host_netns_cookie=cookie, **own)

    def service(
        self,
        address: str | None,
        port: int,
        backends: list[tuple[str, int]],
        proto: int,
        flags: int = 0,
    ) -> None:
        zero = bytes(4 if self.family == 4 else 16)
        for index, (backend, backend_port) in enumerate(backends):
            self.put("backends", {"index": 100 + index}, addr=raw(backend), port=backend_port)
            self.put("slots", {"list": 14, "slot": index}, value=100 + index)
        self.put(
            "frontends",
            {"addr": raw(address) if address else zero, "port": port, "proto": proto},
            service=7,
            cluster_count=len(backends),
            flags=flags,
        )


def _attach(family: int, maps: dict[str, OpenMap], cgroup: int) -> list[int]:
    functions = compile_template(catalog.SOCKETS, family)
    descriptors = {name: each.descriptor for name, each in maps.items()}
    open_files = []
    for program in catalog.PROGRAMS:
        if program.family == family and program.template == catalog.SOCKETS:
            attach_type = AttachType(program.expected_attach_type)
            function = functions[program.name]
            loaded = load(function, descriptors, ProgramType.CGROUP_SOCK_ADDR, attach_type)
            link = syscall.link_create(loaded.descriptor, cgroup, attach_type)
            open_files += [link, loaded.descriptor]
    return open_files


@pytest.fixture(scope="module")
def node_process() -> Iterator[tuple[int, int, Callable[..., Any]]]:
    """(cgroup's descriptor, namespace's cookie, run a function in the process)."""
    root = cgroup2_root()
    assert root is not None, "no cgroup2 mounted: mount -t cgroup2 none /sys/fs/cgroup/unified"
    folder = root / f"bpfdp-test-{os.getpid()}"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        cookie = pool.submit(be_the_node, str(folder)).result(timeout=20)
        yield descriptor, cookie, lambda f, *args, **kw: pool.submit(f, *args, **kw).result(20)
    os.close(descriptor)
    folder.rmdir()


@pytest.fixture(scope="module")
def attached(node_process: tuple[int, int, Callable[..., Any]]) -> Iterator[dict[int, Sockets]]:
    cgroup, cookie, run = node_process
    open_files: list[int] = []
    both = {}
    for family in layouts.FAMILIES:
        maps = {
            each.name: create_map(each, family, max_entries=min(each.max_entries, MAP_SIZE))
            for each in layouts.MAPS
        }
        both[family] = Sockets(family, maps, cookie, run)
        open_files += _attach(family, maps, cgroup)
    yield both
    for descriptor in open_files:
        os.close(descriptor)
    for sockets in both.values():
        for each in sockets.maps.values():
            each.close()


@pytest.fixture
def sockets(attached: dict[int, Sockets], family: int) -> Sockets:
    """The family's, with empty maps. Both families' settings are those of the node."""
    for each in attached.values():
        for table in each.maps.values():
            if table.layout.type in CLEARED:
                for key in table.read():
                    syscall.map_delete(table.descriptor, key)
        each.settings(each.cookie)
        each.put("own_addresses", {"addr": raw(NODE[each.family])}, value=1)
        each.put("nodes", {"addr": node_bytes(NODE[each.family])}, value=1)
    return attached[family]


def test_tcp_to_a_service_shows_the_service(sockets: Sockets) -> None:
    family = sockets.family
    sockets.service(SERVICE[family], 80, [(NODE[family], 8080)], proto=6)
    shown, answer = sockets.run(tcp_exchange, SERVICE[family], 80, (NODE[family], 8080))
    assert (shown, answer) == ((SERVICE[family], 80), b"hello")


def test_an_ipv6_socket_that_speaks_ipv4(attached: dict[int, Sockets], sockets: Sockets) -> None:
    four = attached[4]
    four.service(SERVICE[4], 80, [(NODE[4], 8080)], proto=6)
    mapped = f"::ffff:{SERVICE[4]}"
    shown, answer = four.run(tcp_exchange, mapped, 80, (NODE[4], 8080), True)
    assert (shown, answer) == ((mapped, 80), b"hello")


@pytest.mark.parametrize("connected", [False, True])
def test_udp_to_a_service_stays_with_one_backend(sockets: Sockets, connected: bool) -> None:
    family = sockets.family
    servers = [(NODE[family], 5300 + i) for i in range(8)]
    sockets.service(SERVICE[family], 53, servers, proto=17)
    got = sockets.run(udp_exchange, SERVICE[family], 53, servers, 12, connected)
    assert {shown for shown, _ in got} == {(SERVICE[family], 53)}
    assert len({answer for _, answer in got}) == 1


def test_udp_leaves_a_backend_that_is_gone(sockets: Sockets) -> None:
    family = sockets.family
    servers = [(NODE[family], 5300)]
    sockets.service(SERVICE[family], 53, servers, proto=17)
    assert sockets.run(udp_exchange, SERVICE[family], 53, servers)[0][1] == b"5300"
    sockets.service(SERVICE[family], 53, [(NODE[family], 5301)], proto=17)
    got = sockets.run(udp_exchange, SERVICE[family], 53, [(NODE[family], 5301)])
    assert got[0][1] == b"5301"


def test_a_nodes_own_node_port(sockets: Sockets) -> None:
    family = sockets.family
    sockets.service(None, 30080, [(NODE[family], 8080)], proto=6)
    for address in (NODE[family], LOOPBACK[family]):
        shown, answer = sockets.run(tcp_exchange, address, 30080, (NODE[family], 8080))
        assert (shown, answer) == ((address, 30080), b"hello")


def test_another_nodes_node_port(sockets: Sockets) -> None:
    family = sockets.family
    served = int(layouts.NodeFlag.KNOWN | layouts.NodeFlag.PORTS)
    sockets.put("nodes", {"addr": node_bytes(OTHER_NODE[family])}, value=served)
    sockets.service(None, 30080, [(NODE[family], 8080)], proto=6)
    shown, answer = sockets.run(tcp_exchange, OTHER_NODE[family], 30080, (NODE[family], 8080))
    assert (shown, answer) == ((OTHER_NODE[family], 30080), b"hello")


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_no_endpoint_is_refused_at_once(sockets: Sockets, kind: int) -> None:
    family = sockets.family
    proto = 6 if kind == socket.SOCK_STREAM else 17
    sockets.service(SERVICE[family], 80, [], proto=proto)
    assert sockets.run(connect_error, kind, SERVICE[family], 80) == "ECONNREFUSED"
    sockets.service(SERVICE[family], 80, [], proto=proto, flags=layouts.FrontendFlag.INTERNAL_DROP)
    assert sockets.run(connect_error, kind, SERVICE[family], 80) == "EHOSTUNREACH"


def test_an_address_that_no_service_has(sockets: Sockets) -> None:
    family = sockets.family
    bits = 8 * len(raw(SERVICE[family]))
    sockets.put("service_ranges", {"prefixlen": bits, "addr": raw(SERVICE[family])}, value=1)
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        assert sockets.run(connect_error, kind, SERVICE[family], 80) == "EHOSTUNREACH"


def test_undefined_port_of_a_cluster_ip(sockets: Sockets) -> None:
    family = sockets.family
    sockets.put(
        "frontends",
        {"addr": raw(SERVICE[family]), "port": 0, "proto": 0},
        flags=layouts.FrontendFlag.CLUSTER_IP,
    )
    refused = sockets.run(connect_error, socket.SOCK_STREAM, SERVICE[family], 81)
    assert refused == "ECONNREFUSED"


def test_sockets_of_other_namespaces_are_left_alone(sockets: Sockets) -> None:
    family = sockets.family
    sockets.settings(sockets.cookie + 1)
    sockets.service(SERVICE[family], 80, [(NODE[family], 8080)], proto=6)
    assert sockets.run(connect_error, socket.SOCK_STREAM, SERVICE[family], 80) == "ENETUNREACH"

# SPDX-License-Identifier: Apache-2.0
"""The contract (tests/contract) for the node's own processes and its pods, by the cgroup programs."""

from __future__ import annotations

import errno
import socket

import pytest
from bpf.frames import raw
from bpf.node_process import connect_once, reach_everywhere
from bpf.nodes import CAST, node_bytes
from bpf.test_contract import PROTOCOLS, planned_for, target
from bpf.test_node_sockets import Sockets, attached, node_process, sockets  # noqa: F401
from bpf.test_pod_sockets import mode
from bpfdp_agent import layouts
from bpfdp_agent.bpf import syscall
from contract.vectors import Flow, Vector, vectors

TRIES = 24
WITH_NODE = [v for v in vectors() if any(f.from_ == "node" for f in v.flows)]
WITH_POD = [v for v in vectors() if any(f.from_ == "pod" for f in v.flows)]
REFUSED = {errno.ECONNREFUSED: "reject", errno.EHOSTUNREACH: "drop"}


def outcome(each: Sockets, address: str, port: int, kind: int) -> str:
    """Which backend the socket connects to, or the hook's refusal."""
    tables = [each.maps[name] for name in ("sockets", "tcp_sockets")]
    for table in tables:
        syscall.map_delete_all(table.descriptor, list(table.read()))
    error = each.run(connect_once, kind, address, port)
    if error in REFUSED:
        return REFUSED[error]
    cast = CAST[each.family]
    names = {raw(cast.pod_y): "y", raw(cast.pod_z): "z"}
    for key in [key for table in tables for key in table.read()]:
        found = layouts.SOCKET_KEY.unpack(each.family, key)
        if found["kind"] == layouts.SocketKind.SERVICE:
            return names[found["addr"]]
    return "untouched"


def prepare(each: Sockets, vector: Vector, protocol: str) -> int:
    """The vector's maps; the kind of socket that asks."""
    cast = CAST[each.family]
    each.run(reach_everywhere)
    bits = 8 * len(raw(cast.service)) - 8
    each.put("service_ranges", {"prefixlen": bits, "addr": raw(cast.service)}, value=1)
    each.put("nodes", {"addr": node_bytes(cast.node_b)}, value=3)
    for step in planned_for(cast).apply(vector, protocol):
        syscall.map_update_all(each.maps[step.map].descriptor, step.puts)
    return socket.SOCK_STREAM if protocol == "TCP" else socket.SOCK_DGRAM


def seen_by(each: Sockets, flow: Flow, kind: int) -> set[str]:
    """What comes of many sockets."""
    address, port = target(flow, CAST[each.family])
    return {outcome(each, address, port, kind) for _ in range(TRIES)}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("vector", WITH_NODE, ids=lambda v: v.name)
def test_a_service(sockets: Sockets, vector: Vector, protocol: str) -> None:  # noqa: F811
    kind = prepare(sockets, vector, protocol)
    for flow in vector.flows:
        if flow.from_ != "node":
            continue
        expected = {flow.expected} if isinstance(flow.expected, str) else flow.expected
        seen = seen_by(sockets, flow, kind)
        assert seen == expected, f"IPv{sockets.family} node → {flow.to}"


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("vector", WITH_POD, ids=lambda v: v.name)
def test_a_service_for_a_pod(sockets: Sockets, vector: Vector, protocol: str) -> None:  # noqa: F811
    """What has no backend is left to the packet path, which refuses or drops (test_contract.py)."""
    kind = prepare(sockets, vector, protocol)
    mode(sockets, "Enabled")
    client = raw(CAST[sockets.family].pod_x)
    sockets.put("pod_namespaces", {"cookie": sockets.cookie}, addr=client)
    for flow in vector.flows:
        if flow.from_ != "pod":
            continue
        expected = {"untouched"} if isinstance(flow.expected, str) else flow.expected
        seen = seen_by(sockets, flow, kind)
        assert seen == expected, f"IPv{sockets.family} pod → {flow.to}"

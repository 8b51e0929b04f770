# SPDX-License-Identifier: Apache-2.0
"""Packets over real devices: what test runs cannot show, redirects and the tunnel."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator

import pytest
from bpf.nodes import Addresses, Node, compile_template
from bpf.wire import Wire, ask_tcp, ask_udp, echoing, open_socket, serving
from bpfdp_agent import catalog, layouts
from bpfdp_agent.bpf.objects import Function
from bpfdp_agent.layouts import POLICY_SLOT_DENY, SettingsFlag

Ask = Callable[..., str]
NODEPORT = 30080
MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def all_of_it(arrive: dict[str, Function]) -> Iterator[Wire]:
    made = Wire()
    try:
        for family in layouts.FAMILIES:
            made.attach(family, compile_template(catalog.DATAPATH, family), arrive)
        yield made
    finally:
        made.close()


@pytest.fixture
def wire(all_of_it: Wire, family: int, cast: Addresses) -> Wire:
    """Maps as after start: nodes and pods known, no services."""
    for each in all_of_it.nodes.values():
        for node, name in zip(each, ("A", "B"), strict=True):
            node.reset()
            node.configure(name)
    a, b = all_of_it.nodes[family]
    a.pod(cast.pod_x, "podx")
    a.pod(cast.pod_y, "pody")
    b.pod(cast.pod_z, "podx")
    return all_of_it


@pytest.fixture
def wa(wire: Wire, family: int) -> Node:
    return wire.nodes[family][0]


@pytest.fixture
def wb(wire: Wire, family: int) -> Node:
    return wire.nodes[family][1]


@pytest.fixture(params=[(ask_tcp, 6), (ask_udp, 17)], ids=["tcp", "udp"])
def asking(request: pytest.FixtureRequest) -> tuple[Ask, int]:
    ask, proto = request.param
    return ask, proto


def test_pods(wire: Wire, cast: Addresses, asking: tuple[Ask, int]) -> None:
    ask, _ = asking
    with serving(wire.pod_y, cast.pod_y, 8080), serving(wire.pod_z, cast.pod_z, 8080):
        assert ask(wire.pod_x, cast.pod_y, 8080) == f"{cast.pod_x} 10"
        assert ask(wire.pod_x, cast.pod_z, 8080) == f"{cast.pod_x} 10"


def test_much_data(wire: Wire, wa: Node, cast: Addresses) -> None:
    wa.service([(cast.service, 80)], [(cast.pod_z, 8080, cast.node_b)])
    with serving(wire.pod_z, cast.pod_z, 8080):
        words = ask_tcp(wire.pod_x, cast.service, 80, size=8 * MEBIBYTE)
        assert words == f"{cast.pod_x} {8 * MEBIBYTE}"


def test_cluster_ip(wire: Wire, wa: Node, cast: Addresses, asking: tuple[Ask, int]) -> None:
    ask, proto = asking
    backends = [(cast.pod_y, 8080, None), (cast.pod_z, 8080, cast.node_b)]
    wa.service([(cast.service, 80)], backends, proto=proto)
    with serving(wire.pod_y, cast.pod_y, 8080), serving(wire.pod_z, cast.pod_z, 8080):
        for _ in range(8):
            assert ask(wire.pod_x, cast.service, 80) == f"{cast.pod_x} 10"


def test_hairpin(wire: Wire, wa: Node, cast: Addresses, asking: tuple[Ask, int]) -> None:
    ask, proto = asking
    wa.service([(cast.service, 80)], [(cast.pod_x, 8080, None)], proto=proto)
    with serving(wire.pod_x, cast.pod_x, 8080):
        assert ask(wire.pod_x, cast.service, 80) == f"{cast.node_a} 10"


@pytest.mark.parametrize("where", ["here", "there", "on the node here", "on the node there"])
@pytest.mark.parametrize("flags", [0, SettingsFlag.DSR], ids=["tunnel", "dsr"])
def test_node_port(
    wire: Wire, cast: Addresses, asking: tuple[Ask, int], where: str, flags: int
) -> None:
    ask, proto = asking
    wa, wb = wire.nodes[cast.family]
    address, place, node = {
        "here": (cast.pod_x, wire.pod_x, None),
        "there": (cast.pod_z, wire.pod_z, cast.node_b),
        "on the node here": (cast.node_a, wire.node_a, None),
        "on the node there": (cast.node_b, wire.node_b, cast.node_b),
    }[where]
    wa.configure("A", flags=flags)
    wb.configure("B", flags=flags)
    wa.service([(None, NODEPORT)], [(address, 8080, node)], proto=proto)
    wb.service([(None, NODEPORT)], [(address, 8080, None)], proto=proto)
    size = MEBIBYTE if ask is ask_tcp else 1000
    with serving(place, address, 8080):
        words = ask(wire.client, cast.node_a, NODEPORT, source=cast.client, size=size)
    assert words == f"{cast.client} {size}"


def test_a_datagram_in_fragments(wire: Wire, wa: Node, wb: Node, cast: Addresses) -> None:
    wa.service([(cast.service, 80)], [(cast.pod_y, 8080, None)], proto=17)
    with serving(wire.pod_y, cast.pod_y, 8080):
        assert ask_udp(wire.pod_x, cast.service, 80, size=6000) == f"{cast.pod_x} 6000"
    wa.service([(None, NODEPORT)], [(cast.pod_z, 8080, cast.node_b)], proto=17)
    wb.service([(None, NODEPORT)], [(cast.pod_z, 8080, None)], proto=17)
    with serving(wire.pod_z, cast.pod_z, 8080):
        if cast.family == 6:  # the first one only learns the tunnel's MTU
            with contextlib.suppress(TimeoutError):
                ask_udp(wire.client, cast.node_a, NODEPORT, source=cast.client, size=6000)
        words = ask_udp(wire.client, cast.node_a, NODEPORT, source=cast.client, size=6000)
        assert words == f"{cast.client} 6000"


@pytest.mark.parametrize("where", ["there", "on the node here"])
def test_a_datagram_in_fragments_elsewhere(
    wire: Wire, wa: Node, cast: Addresses, where: str
) -> None:
    address, place, node = {
        "there": (cast.pod_z, wire.pod_z, cast.node_b),
        "on the node here": (cast.node_a, wire.node_a, None),
    }[where]
    wa.service([(cast.service, 80)], [(address, 8080, node)], proto=17)
    with serving(place, address, 8080):
        assert ask_udp(wire.pod_x, cast.service, 80, size=6000) == f"{cast.pod_x} 6000"


def test_a_datagram_in_fragments_to_a_node_port_here(wire: Wire, wa: Node, cast: Addresses) -> None:
    wa.service([(None, NODEPORT)], [(cast.pod_x, 8080, None)], proto=17)
    with serving(wire.pod_x, cast.pod_x, 8080):
        words = ask_udp(wire.client, cast.node_a, NODEPORT, source=cast.client, size=6000)
    assert words == f"{cast.client} 6000"


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
def test_changes_of_the_external_mode_cut_no_flow(
    wire: Wire, cast: Addresses, kind: socket.SocketKind
) -> None:
    wa, wb = wire.nodes[cast.family]
    proto = 6 if kind == socket.SOCK_STREAM else 17
    wa.service([(None, NODEPORT)], [(cast.pod_z, 8080, cast.node_b)], proto=proto)
    wb.service([(None, NODEPORT)], [(cast.pod_z, 8080, None)], proto=proto)
    with (
        echoing(wire.pod_z, cast.pod_z, 8080, kind),
        open_socket(wire.client, cast.node_a, kind, cast.client) as client,
    ):
        client.connect((cast.node_a, NODEPORT))
        for turn in range(8):
            for node, name in ((wa, "A"), (wb, "B")):
                node.configure(name, flags=SettingsFlag.DSR if turn % 2 else 0)
            client.send(b"%d" % turn)
            assert client.recv(100) == b"%d" % turn


@pytest.mark.parametrize("who", ["pod", "outside"])
def test_no_endpoint_is_refused_at_once(
    wire: Wire, wa: Node, cast: Addresses, asking: tuple[Ask, int], who: str
) -> None:
    ask, proto = asking
    wa.service([(cast.external, 80)], [], proto=proto)
    place, source = (wire.pod_x, None) if who == "pod" else (wire.client, cast.client)
    with pytest.raises(ConnectionRefusedError):
        ask(place, cast.external, 80, source=source)


def test_a_closed_port_of_a_backend_is_refused_by_the_service(
    wire: Wire, wa: Node, cast: Addresses, asking: tuple[Ask, int]
) -> None:
    ask, proto = asking
    wa.service([(cast.service, 80)], [(cast.pod_z, 9999, cast.node_b)], proto=proto)
    with pytest.raises(ConnectionRefusedError):
        ask(wire.pod_x, cast.service, 80)


def test_the_node_reaches_its_isolated_pods(wire: Wire, wa: Node, cast: Addresses) -> None:
    wa.pod(cast.pod_x, "podx", ingress=POLICY_SLOT_DENY, egress=POLICY_SLOT_DENY)
    with serving(wire.pod_x, cast.pod_x, 8080):
        assert ask_tcp(wire.node_a, cast.pod_x, 8080).endswith(" 10")
        with pytest.raises(TimeoutError):
            ask_tcp(wire.node_b, cast.pod_x, 8080)


def test_a_pod_reaches_node_processes(wire: Wire, cast: Addresses, asking: tuple[Ask, int]) -> None:
    ask, _ = asking
    with serving(wire.node_a, cast.node_a, 9000), serving(wire.node_b, cast.node_b, 9000):
        assert ask(wire.pod_x, cast.node_a, 9000) == f"{cast.pod_x} 10"

# SPDX-License-Identifier: Apache-2.0
"""How policies are called: egress of the source, ingress of the destination, and never skipped."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import jinja2
import pytest
from bpf.frames import ACK, ICMP4, ICMP6, UDP, Frame, raw
from bpf.nodes import ROOT, Addresses, Node, compile_sources
from bpfdp_agent.bpf.objects import Source
from bpfdp_agent.bpf.render import Renderer
from bpfdp_agent.dataplane.programs import set_slot
from bpfdp_agent.layouts import POLICY_SLOT_DENY, SettingsFlag

ALLOW = 2
MISSING = 3


@pytest.fixture(scope="module")
def load_policy() -> Callable[[Node, str, int], None]:
    """Puts "this peer on this port" into slot ALLOW of a node."""

    def load(node: Node, peer: str, port: int) -> None:
        renderer = Renderer(ROOT / "bpf_templates")
        environment = renderer._environment
        environment.loader = jinja2.ChoiceLoader(
            [environment.loader, jinja2.FileSystemLoader(Path(__file__).parent)]
        )
        words = ", ".join(
            f"{word:#x}" for word in struct.unpack(f"={len(raw(peer)) // 4}I", raw(peer))
        )
        text = renderer.render(
            "allow_port.c.j2", family=node.family, peer=f"{{{words}}}", port=port
        )
        functions = compile_sources([Source("allow_port", text)])[0]
        set_slot(node.maps["policy"].descriptor, ALLOW, node.load(functions["allow_port"]))

    return load


def test_a_denied_flow_leaves_nothing_behind(a: Node, cast: Addresses) -> None:
    a.pod(cast.pod_y, "pody", ingress=POLICY_SLOT_DENY)
    result = a.from_pod(Frame(cast.pod_x, cast.pod_y), "podx")
    assert (result.verdict, result.action) == ("DROP", "NONE")
    assert a.counters() == {"DROP_POLICY": 1}


@pytest.mark.parametrize("side", ["egress", "ingress"])
def test_a_missing_program_denies(a: Node, cast: Addresses, side: str) -> None:
    if side == "egress":
        a.pod(cast.pod_x, "podx", egress=MISSING)
    else:
        a.pod(cast.pod_y, "pody", ingress=MISSING)
    assert a.from_pod(Frame(cast.pod_x, cast.pod_y), "podx").verdict == "DROP"
    assert a.counters() == {"DROP_POLICY_MISSING": 1}


def test_egress_sees_the_backend_and_ingress_the_client(
    a: Node, cast: Addresses, load_policy
) -> None:
    a.service([(cast.service, 80)], [(cast.pod_y, 8080, None)])
    load_policy(a, cast.pod_y, 8080)
    a.pod(cast.pod_x, "podx", egress=ALLOW)
    assert a.from_pod(Frame(cast.pod_x, cast.service), "podx").verdict == "REDIRECT"
    assert a.from_pod(Frame(cast.pod_x, cast.pod_y, dport=8081), "podx").verdict == "DROP"
    assert a.from_pod(Frame(cast.pod_x, cast.pod_z, dport=8080), "podx").verdict == "DROP"

    a.pod(cast.pod_y, "pody", ingress=POLICY_SLOT_DENY)  # both must agree
    assert a.from_pod(Frame(cast.pod_x, cast.service, sport=41000), "podx").verdict == "DROP"


def test_ingress_judges_the_outside_client(a: Node, b: Node, cast: Addresses, load_policy) -> None:
    a.service([(None, 30080)], [(cast.pod_z, 8080, cast.node_b)])
    b.service([(None, 30080)], [(cast.pod_z, 8080, None)])
    load_policy(b, cast.client, 8080)
    b.pod(cast.pod_z, "podx", ingress=ALLOW)
    first = Frame(cast.client, cast.node_a, dport=30080)
    assert b.from_tunnel(a.from_net(first).frame, cast.node_a).verdict == "REDIRECT"
    other = first.but(src=cast.gateway)
    assert b.from_tunnel(a.from_net(other).frame, cast.node_a).verdict == "DROP"


def test_replies_need_no_policy(a: Node, cast: Addresses) -> None:
    a.pod(cast.pod_x, "podx", ingress=POLICY_SLOT_DENY)
    a.pod(cast.pod_y, "pody", egress=POLICY_SLOT_DENY)
    first = Frame(cast.pod_x, cast.pod_y)
    assert a.from_pod(first, "podx").verdict == "REDIRECT"
    assert a.from_pod(first.reply(), "pody").verdict == "REDIRECT"
    assert a.from_pod(Frame(cast.pod_y, cast.pod_x), "pody").verdict == "DROP"


def test_replies_from_outside_need_no_policy(a: Node, cast: Addresses) -> None:
    a.pod(cast.pod_x, "podx", ingress=POLICY_SLOT_DENY)
    query = Frame(cast.pod_x, cast.client, UDP, dport=53)
    a.from_pod(query, "podx")
    assert a.to_pod(query.reply(), "podx").verdict == "STACK"
    assert a.to_pod(Frame(cast.client, cast.pod_x, UDP, dport=53), "podx").verdict == "DROP"


def test_the_node_always_reaches_its_pods(a: Node, cast: Addresses) -> None:
    a.pod(cast.pod_x, "podx", ingress=POLICY_SLOT_DENY, egress=POLICY_SLOT_DENY)
    probe = Frame(cast.node_a, cast.pod_x)
    assert a.to_pod(probe, "podx", ingress=None).verdict == "STACK"
    assert a.from_pod(probe.reply(), "podx").verdict == "STACK"
    assert a.to_pod(probe.but(sport=1), "podx", ingress="data0").verdict == "DROP"  # a forged one


def test_tcp_in_the_middle_is_judged_at_the_pod(a: Node, cast: Addresses) -> None:
    a.pod(cast.pod_x, "podx", ingress=POLICY_SLOT_DENY)
    middle = Frame(cast.client, cast.pod_x, flags=ACK)
    assert a.from_net(middle).verdict == "STACK"
    assert a.to_pod(middle, "podx").verdict == "DROP"
    assert a.to_pod(middle.but(dst=cast.pod_y), "pody").verdict == "STACK"


def test_ping_is_judged(a: Node, cast: Addresses) -> None:
    a.pod(cast.pod_y, "pody", ingress=POLICY_SLOT_DENY)
    ping = Frame(
        cast.pod_x,
        cast.pod_y,
        ICMP4 if cast.family == 4 else ICMP6,
        icmp=(8 if cast.family == 4 else 128, 0, 0x10001),
    )
    assert a.from_pod(ping, "podx").verdict == "DROP"


def test_policy_can_be_disabled(a: Node, cast: Addresses) -> None:
    a.pod(cast.pod_y, "pody", ingress=POLICY_SLOT_DENY)
    a.configure("A", flags=SettingsFlag.POLICY_DISABLED)
    assert a.from_pod(Frame(cast.pod_x, cast.pod_y), "podx").verdict == "REDIRECT"

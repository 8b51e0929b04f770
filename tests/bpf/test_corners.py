# SPDX-License-Identifier: Apache-2.0
"""Fragments, options, extension headers, damaged packets, ICMP errors, neighbour discovery."""

from __future__ import annotations

import pytest
from bpf.frames import ACK, ICMP4, ICMP6, TCP, UDP, Frame, checksum, read_network
from bpf.nodes import VERDICTS, Addresses, Node
from bpfdp_agent.layouts import POLICY_SLOT_DENY


def fragments(cast: Addresses, src: str, dst: str) -> tuple[Frame, Frame]:
    """A datagram in two: 32 bytes of transport header and data, then the rest."""
    first = Frame(src, dst, UDP, dport=53, payload=b"x" * 24, fragment=(0, True, 77))
    return first, Frame(src, dst, UDP, payload=b"y" * 16, fragment=(4, False, 77))


def error(cast: Addresses, src: str, dst: str, quoted: Frame, kind: str = "unreachable") -> Frame:
    """An ICMP error quoting the start of a packet."""
    types = {"unreachable": ((3, 3, 0), (1, 4, 0)), "too big": ((3, 4, 1400), (2, 0, 1400))}
    size = 28 if cast.family == 4 else 48
    icmp = types[kind][0 if cast.family == 4 else 1]
    return Frame(
        src, dst, ICMP4 if cast.family == 4 else ICMP6, icmp=icmp, payload=quoted.network()[:size]
    )


def test_later_fragments_follow_the_first(a: Node, cast: Addresses) -> None:
    a.service([(cast.service, 53)], [(cast.pod_y, 5353, None)], proto=UDP)
    first, second = fragments(cast, cast.pod_x, cast.service)
    one = a.from_pod(first, "podx")
    assert (one.verdict, one.frame.dst, one.frame.dport) == ("REDIRECT", cast.pod_y, 5353)
    two = a.from_pod(second, "podx")
    assert (two.verdict, two.frame.dst, two.frame.payload) == ("REDIRECT", cast.pod_y, b"y" * 16)
    assert two.frame.valid


def test_a_lost_fragment_is_dropped_only_where_policy_judges(a: Node, cast: Addresses) -> None:
    _, second = fragments(cast, cast.pod_x, cast.pod_y)
    assert a.from_pod(second, "podx").verdict == "STACK"
    assert a.to_pod(second, "pody").verdict == "STACK"
    assert a.from_pod(second.but(src=cast.pod_z), "podx").verdict == "DROP"
    a.pod(cast.pod_x, "podx", egress=POLICY_SLOT_DENY)
    a.pod(cast.pod_y, "pody", ingress=POLICY_SLOT_DENY)
    assert a.from_pod(second, "podx").verdict == "DROP"
    assert a.from_net(second.but(src=cast.client)).verdict == "DROP"
    assert a.to_pod(second, "pody").verdict == "DROP"
    assert a.counters() == {"DROP_SPOOFED": 1, "DROP_FRAGMENT": 3}


def test_options_and_extension_headers_are_walked(a: Node, cast: Addresses) -> None:
    a.service([(cast.service, 80)], [(cast.pod_y, 8080, None)])
    if cast.family == 4:
        packet = Frame(cast.pod_x, cast.service, options=b"\x94\x04\x00\x00")
    else:
        packet = Frame(
            cast.pod_x, cast.service, extensions=((0, bytes(8)), (60, b"\0\1" + bytes(14)))
        )
    out = a.from_pod(packet, "podx")
    assert (out.verdict, out.frame.dst, out.frame.dport, out.frame.valid) == (
        "REDIRECT",
        cast.pod_y,
        8080,
        True,
    )


@pytest.mark.parametrize("family", [6], indirect=True)
def test_too_many_extension_headers_are_not_believed(a: Node, cast: Addresses) -> None:
    packet = Frame(cast.pod_x, cast.pod_y, extensions=((60, bytes(8)),) * 7)
    assert a.from_pod(packet, "podx").verdict == "DROP"
    assert a.from_pod(packet.but(extensions=((60, bytes(8)),) * 6), "podx").verdict == "REDIRECT"


@pytest.mark.parametrize("proto", [TCP, UDP])
def test_truncated_packets_are_dropped(a: Node, cast: Addresses, proto: int) -> None:
    packet = bytes(Frame(cast.pod_x, cast.pod_y, proto, payload=b""))
    network = 14 + (20 if cast.family == 4 else 40)
    for size in range(network + 1, len(packet)):
        run = a.run("from_pod", packet[:size], "podx")
        assert VERDICTS[run.retval] == "DROP"
    assert (
        a.from_pod(Frame(cast.pod_x, cast.pod_y, proto, payload=b""), "podx").verdict == "REDIRECT"
    )


@pytest.mark.parametrize("kind", ["unreachable", "too big"])
def test_an_error_about_a_translated_packet_reaches_the_client(
    a: Node, cast: Addresses, kind: str
) -> None:
    a.service([(cast.service, 80)], [(cast.pod_z, 8080, cast.node_b)], proto=UDP)
    sent = a.from_pod(Frame(cast.pod_x, cast.service, UDP), "podx").frame
    source = cast.pod_z if kind == "unreachable" else cast.gateway
    got = a.from_net(error(cast, source, cast.pod_x, sent, kind))
    assert (got.verdict, got.frame.dst) == ("REDIRECT", cast.pod_x)
    assert got.frame.src == (cast.service if kind == "unreachable" else cast.gateway)
    assert got.frame.valid
    quoted = read_network(got.frame.payload)
    assert (quoted.src, quoted.dst, quoted.sport, quoted.dport) == (
        cast.pod_x,
        cast.service,
        40000,
        80,
    )
    assert cast.family == 6 or checksum(got.frame.payload[:20]) == 0
    assert a.counters()["ICMP_TRANSLATED"] == 1


def test_an_error_about_a_local_backend(a: Node, cast: Addresses) -> None:
    a.service([(cast.service, 80)], [(cast.pod_y, 8080, None)], proto=UDP)
    sent = a.from_pod(Frame(cast.pod_x, cast.service, UDP), "podx").frame
    got = a.from_pod(error(cast, cast.pod_y, cast.pod_x, sent), "pody")
    assert (got.verdict, got.frame.src, got.frame.valid) == ("REDIRECT", cast.service, True)
    assert read_network(got.frame.payload).dst == cast.service


def test_an_error_about_a_reply_goes_through_the_tunnel(a: Node, b: Node, cast: Addresses) -> None:
    a.service([(None, 30080)], [(cast.pod_z, 8080, cast.node_b)])
    b.service([(None, 30080)], [(cast.pod_z, 8080, None)])
    into = b.from_tunnel(
        a.from_net(Frame(cast.client, cast.node_a, dport=30080)).frame, cast.node_a
    )
    reply = a.from_tunnel(b.from_pod(into.frame.reply(), "podx").frame, cast.node_b).frame
    tunnelled = a.from_net(error(cast, cast.gateway, cast.node_a, reply, "too big"))
    assert tunnelled.verdict == "REDIRECT"
    assert tunnelled.frame.dst == cast.node_a
    got = b.from_tunnel(tunnelled.frame, cast.node_a)
    assert (got.verdict, got.frame.src, got.frame.dst) == ("REDIRECT", cast.gateway, cast.pod_z)
    assert got.frame.valid
    quoted = read_network(got.frame.payload)
    assert (quoted.src, quoted.sport, quoted.dst) == (cast.pod_z, 8080, cast.client)


def test_the_nodes_own_error_reaches_the_pod_translated(a: Node, cast: Addresses) -> None:
    a.service([(cast.service, 80)], [(cast.pod_z, 8080, cast.node_b)], proto=UDP)
    a.pod(cast.pod_x, "podx", ingress=POLICY_SLOT_DENY)
    sent = a.from_pod(Frame(cast.pod_x, cast.service, UDP), "podx").frame
    got = a.to_pod(error(cast, cast.node_a, cast.pod_x, sent, "too big"), "podx", ingress=None)
    assert (got.verdict, read_network(got.frame.payload).dst) == ("STACK", cast.service)
    assert got.frame.valid


def test_an_invented_error_is_no_way_around_policy(a: Node, cast: Addresses) -> None:
    invented = Frame(cast.pod_x, cast.client, UDP)
    a.pod(cast.pod_x, "podx", egress=POLICY_SLOT_DENY, ingress=POLICY_SLOT_DENY)
    assert (
        a.from_pod(error(cast, cast.pod_x, cast.client, invented.reply()), "podx").verdict == "DROP"
    )
    assert a.to_pod(error(cast, cast.client, cast.pod_x, invented), "podx").verdict == "DROP"
    assert a.from_pod(error(cast, cast.pod_y, cast.client, invented), "podx").verdict == "DROP"
    assert a.counters() == {"DROP_ICMP_ERROR": 2, "DROP_SPOOFED": 1}


@pytest.mark.parametrize("family", [6], indirect=True)
def test_neighbour_discovery_passes_only_on_the_link(a: Node, cast: Addresses) -> None:
    a.pod(cast.pod_x, "podx", egress=POLICY_SLOT_DENY, ingress=POLICY_SLOT_DENY)
    solicitation = Frame("fe80::1", "ff02::1:ff00:1", ICMP6, icmp=(135, 0, 0), ttl=255)
    assert a.from_pod(solicitation, "podx").verdict == "STACK"
    assert a.to_pod(solicitation, "podx").verdict == "STACK"
    assert a.from_pod(solicitation.but(ttl=64), "podx").verdict == "DROP"
    assert a.from_pod(Frame("fe80::1", cast.client, TCP), "podx").verdict == "DROP"


def test_protocols_without_ports_are_followed(a: Node, cast: Addresses) -> None:
    packet = Frame(cast.pod_x, cast.pod_z, 47, payload=b"\0\0\x08\0" + bytes(20))
    assert a.from_pod(packet, "podx").verdict == "REDIRECT"
    assert a.from_net(packet.reply()).action == "PEER"


def test_flags_are_only_read_where_there_are_flags(a: Node, cast: Addresses) -> None:
    packet = Frame(cast.pod_x, cast.pod_y, UDP, payload=b"\xff" * 20)
    a.from_pod(packet, "podx")
    assert a.from_pod(packet, "podx").entry["tcp"] == 0
    assert a.from_pod(Frame(cast.pod_x, cast.pod_z, flags=ACK), "podx").verdict == "REDIRECT"

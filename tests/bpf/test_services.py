# SPDX-License-Identifier: Apache-2.0
"""Services: ClusterIP, NodePort, local and remote backends, tunnel and DSR, refusals, affinity."""

from __future__ import annotations

import pytest
from bpf.frames import ACK, FIN, ICMP4, ICMP6, RST, SYN, UDP, Frame, raw, read_network
from bpf.nodes import Addresses, Node
from bpfdp_agent.layouts import CtFlag, FrontendFlag, SettingsFlag

NODEPORT = 30080


@pytest.mark.parametrize("proto", [6, 17])
def test_cluster_ip_with_a_backend_on_this_node(a: Node, cast: Addresses, proto: int) -> None:
    a.service([(cast.service, 80)], [(cast.pod_y, 8080, None)], proto=proto)
    first = Frame(cast.pod_x, cast.service, proto)
    out = a.from_pod(first, "podx")
    assert (out.verdict, out.action) == ("REDIRECT", "PEER")
    assert out.frame == first.but(dst=cast.pod_y, dport=8080, ttl=63)
    assert out.frame.valid
    back = a.from_pod(out.frame.reply(), "pody")
    assert (back.verdict, back.action) == ("REDIRECT", "PEER")
    assert (back.frame.src, back.frame.sport, back.frame.dst) == (cast.service, 80, cast.pod_x)
    assert back.frame.valid


@pytest.mark.parametrize("proto", [6, 17])
def test_cluster_ip_with_a_backend_on_another_node(
    a: Node, b: Node, cast: Addresses, proto: int
) -> None:
    a.service([(cast.service, 80)], [(cast.pod_z, 8080, cast.node_b)], proto=proto)
    out = a.from_pod(Frame(cast.pod_x, cast.service, proto), "podx")
    assert (out.verdict, out.action) == ("REDIRECT", "NEIGH")
    into = b.from_net(out.frame)
    assert (into.verdict, into.action) == ("REDIRECT", "PEER")
    assert into.frame.src == cast.pod_x
    reply = b.from_pod(into.frame.reply(), "podx")
    home = a.from_net(reply.frame)
    assert (home.verdict, home.action) == ("REDIRECT", "PEER")
    assert (home.frame.src, home.frame.sport) == (cast.service, 80)
    assert home.frame.valid
    more = a.from_pod(Frame(cast.pod_x, cast.service, proto, flags=ACK), "podx")
    assert (more.frame.dst, more.frame.valid) == (cast.pod_z, True)


def test_udp_without_a_checksum_stays_without(a: Node, cast: Addresses) -> None:
    a.service([(cast.service, 53)], [(cast.pod_y, 5353, None)], proto=UDP)
    out = a.from_pod(Frame(cast.pod_x, cast.service, UDP, dport=53, udp_checksum=False), "podx")
    assert (out.frame.dst, out.frame.udp_checksum) == (cast.pod_y, False)


def test_hairpin_comes_back_from_the_node(a: Node, cast: Addresses) -> None:
    a.service([(cast.service, 80)], [(cast.pod_x, 8080, None)])
    out = a.from_pod(Frame(cast.pod_x, cast.service), "podx")
    assert (out.verdict, out.action) == ("REDIRECT", "PEER")
    assert (out.frame.src, out.frame.dst, out.frame.dport) == (cast.node_a, cast.pod_x, 8080)
    back = a.from_pod(out.frame.reply(), "podx")
    assert (back.verdict, back.frame.src, back.frame.dst) == ("REDIRECT", cast.service, cast.pod_x)
    assert back.frame.dport == 40000
    assert back.frame.valid


def test_backend_in_the_nodes_own_network(a: Node, cast: Addresses) -> None:
    a.service([(cast.service, 443)], [(cast.node_a, 6443, None)])
    out = a.from_pod(Frame(cast.pod_x, cast.service, dport=443), "podx")
    assert (out.verdict, out.action) == ("STACK", "STACK")
    assert (out.frame.dst, out.frame.dport) == (cast.node_a, 6443)
    back = a.to_pod(out.frame.reply(), "podx", ingress=None)
    assert (back.verdict, back.frame.src, back.frame.sport) == ("STACK", cast.service, 443)
    assert back.frame.valid


def test_backend_outside_the_cluster_goes_through_the_stack(a: Node, cast: Addresses) -> None:
    a.service([(cast.service, 443)], [(cast.client, 443, None)], local=[])
    out = a.from_pod(Frame(cast.pod_x, cast.service, dport=443), "podx")
    assert (out.verdict, out.frame.dst) == ("STACK", cast.client)
    back = a.to_pod(out.frame.reply(), "podx")
    assert (back.verdict, back.frame.src) == ("STACK", cast.service)


@pytest.mark.parametrize("proto", [6, 17])
def test_node_port_with_a_backend_on_this_node(a: Node, cast: Addresses, proto: int) -> None:
    a.service(
        [(None, NODEPORT)], [(cast.pod_x, 8080, None)], proto=proto, flags=FrontendFlag.EXTERNAL
    )
    out = a.from_net(Frame(cast.client, cast.node_a, proto, dport=NODEPORT))
    assert (out.verdict, out.action) == ("REDIRECT", "PEER")
    assert (out.frame.src, out.frame.dst, out.frame.dport) == (cast.client, cast.pod_x, 8080)
    back = a.from_pod(out.frame.reply(), "podx")
    assert (back.verdict, back.action) == ("REDIRECT", "NEIGH")
    assert (back.frame.src, back.frame.sport, back.frame.dst) == (
        cast.node_a,
        NODEPORT,
        cast.client,
    )
    assert back.entry["ifindex"] == a.netns.ifindex["data0"]
    assert back.frame.valid


@pytest.mark.parametrize("proto", [6, 17])
@pytest.mark.parametrize("where", ["node port", "external address"])
def test_remote_backend_through_the_tunnel_and_back(
    a: Node, b: Node, cast: Addresses, proto: int, where: str
) -> None:
    frontend = (None, NODEPORT) if where == "node port" else (cast.external, 80)
    a.service(
        [frontend], [(cast.pod_z, 8080, cast.node_b)], proto=proto, flags=FrontendFlag.EXTERNAL
    )
    b.service([frontend], [(cast.pod_z, 8080, None)], proto=proto, flags=FrontendFlag.EXTERNAL)
    first = Frame(
        cast.client,
        cast.node_a if where == "node port" else cast.external,
        proto,
        dport=frontend[1],
    )

    out = a.from_net(first)
    assert (out.verdict, out.action) == ("REDIRECT", "TUNNEL")
    assert out.frame == first.but(ttl=63)
    into = b.from_tunnel(out.frame, cast.node_a)
    assert (into.verdict, into.entry and into.entry["action"]) == ("REDIRECT", 1)
    assert (into.frame.src, into.frame.dst, into.frame.dport) == (cast.client, cast.pod_z, 8080)
    assert into.frame.valid

    reply = b.from_pod(into.frame.reply(), "podx")
    assert (reply.verdict, reply.action) == ("REDIRECT", "TUNNEL")
    assert reply.entry["nexthop"][-4:] == raw(cast.node_a)[-4:]
    home = a.from_tunnel(reply.frame, cast.node_b)
    assert (home.verdict, home.action) == ("REDIRECT", "NEIGH")
    assert (home.frame.src, home.frame.sport, home.frame.dst) == (
        first.dst,
        first.dport,
        cast.client,
    )
    assert home.frame.valid
    second = a.from_net(first.but(flags=ACK))
    assert b.from_tunnel(second.frame, cast.node_a).frame.dst == cast.pod_z


def test_direct_return(a: Node, b: Node, cast: Addresses) -> None:
    a.service([(None, NODEPORT)], [(cast.pod_z, 8080, cast.node_b)])
    b.configure("B", flags=SettingsFlag.DSR)
    b.service([(None, NODEPORT)], [(cast.pod_z, 8080, None)])
    first = Frame(cast.client, cast.node_a, dport=NODEPORT)
    into = b.from_tunnel(a.from_net(first).frame, cast.node_a)
    reply = b.from_pod(into.frame.reply(), "podx")
    assert (reply.verdict, reply.action) == ("REDIRECT", "NEIGH")
    assert (reply.frame.src, reply.frame.dst) == (cast.node_a, cast.client)

    b.put("dsr_optout", {"prefixlen": 8, "addr": raw(cast.client)}, value=1)
    other = first.but(sport=40001)
    into = b.from_tunnel(a.from_net(other).frame, cast.node_a)
    assert b.from_pod(into.frame.reply(), "podx").action == "TUNNEL"


def test_remote_backend_in_the_other_nodes_own_network(a: Node, b: Node, cast: Addresses) -> None:
    a.service([(None, NODEPORT)], [(cast.node_b, 8080, cast.node_b)])
    b.service([(None, NODEPORT)], [(cast.node_b, 8080, None)])
    out = a.from_net(Frame(cast.client, cast.node_a, dport=NODEPORT))
    into = b.from_tunnel(out.frame, cast.node_a)
    assert (into.verdict, into.entry and into.entry["action"]) == ("REDIRECT", 4)
    assert into.frame.dst == cast.node_b
    arrived = b.from_net(into.frame, mark=into.mark)
    assert (arrived.verdict, arrived.mark) == ("STACK", 0)
    reply = b.to_net(into.frame.reply())
    assert (reply.verdict, reply.action) == ("REDIRECT", "TUNNEL")
    assert (reply.frame.src, reply.frame.sport) == (cast.node_a, NODEPORT)
    assert reply.frame.valid
    assert a.from_tunnel(reply.frame, cast.node_b).action == "NEIGH"


def test_node_port_of_the_nodes_own_process(a: Node, cast: Addresses) -> None:
    a.service([(None, NODEPORT)], [(cast.node_a, 8080, None)])
    out = a.from_net(Frame(cast.client, cast.node_a, dport=NODEPORT))
    assert (out.verdict, out.frame.dport) == ("STACK", 8080)
    back = a.to_net(out.frame.reply())
    assert (back.verdict, back.frame.sport, back.frame.valid) == ("STACK", NODEPORT, True)


def test_the_tunnel_is_believed_only_from_nodes(b: Node, cast: Addresses) -> None:
    b.service([(None, NODEPORT)], [(cast.pod_z, 8080, None)])
    packet = Frame(cast.client, cast.node_a, dport=NODEPORT)
    assert b.from_tunnel(packet, cast.gateway).verdict == "DROP"
    assert b.from_tunnel(Frame(cast.client, cast.pod_z), cast.node_a).verdict == "DROP"
    assert b.counters() == {"DROP_TUNNEL_SOURCE": 1, "DROP_TUNNEL_UNKNOWN": 1}


def test_pod_to_its_own_nodes_node_port(a: Node, cast: Addresses) -> None:
    a.service(
        [(None, NODEPORT)], [(cast.pod_z, 8080, cast.node_b)], flags=FrontendFlag.EXTERNAL_LOCAL
    )
    out = a.from_pod(Frame(cast.pod_x, cast.node_a, dport=NODEPORT), "podx")
    assert (out.verdict, out.frame.dst) == ("REDIRECT", cast.pod_z)
    other = a.from_pod(Frame(cast.pod_x, cast.node_b, dport=NODEPORT), "podx")
    assert (other.verdict, other.frame.dst) == ("STACK", cast.node_b)


@pytest.mark.parametrize("proto", [6, 17])
@pytest.mark.parametrize("hook", ["from_pod", "from_net"])
def test_no_endpoint_is_refused(a: Node, cast: Addresses, proto: int, hook: str) -> None:
    a.service([(cast.external, 80)], [], proto=proto)
    client, device = (cast.pod_x, "podx") if hook == "from_pod" else (cast.client, "data0")
    packet = Frame(client, cast.external, proto)
    answer = a.send(hook, packet, device)
    assert (answer.verdict, answer.action) == ("REDIRECT", "NONE")
    assert (answer.frame.src, answer.frame.dst) == (cast.external, client)
    assert answer.frame.macs == packet.macs[::-1]
    assert answer.frame.valid
    if proto == 6:
        assert (answer.frame.flags, answer.frame.sport, answer.frame.dport) == (
            RST | ACK,
            80,
            40000,
        )
    else:
        kind = (ICMP4, (3, 3, 0)) if cast.family == 4 else (ICMP6, (1, 4, 0))
        assert (answer.frame.proto, answer.frame.icmp) == kind
        quoted = read_network(answer.frame.payload)
        assert (quoted.src, quoted.dst, quoted.sport, quoted.dport) == (
            client,
            cast.external,
            40000,
            80,
        )


def test_no_local_endpoint_is_silent(a: Node, cast: Addresses) -> None:
    flags = (
        FrontendFlag.EXTERNAL_LOCAL
        | FrontendFlag.EXTERNAL_DROP
        | FrontendFlag.INTERNAL_LOCAL
        | FrontendFlag.INTERNAL_DROP
    )
    a.service([(cast.external, 80)], [(cast.pod_z, 8080, cast.node_b)], flags=flags)
    assert a.from_net(Frame(cast.client, cast.external)).verdict == "DROP"
    assert a.from_pod(Frame(cast.pod_x, cast.external), "podx").verdict == "DROP"
    assert a.counters() == {"DROP_NO_BACKEND": 2}


def test_undefined_port_of_a_cluster_ip_is_refused_and_of_others_untouched(
    a: Node, cast: Addresses
) -> None:
    a.service([(cast.service, 80), (cast.external, 80)], [(cast.pod_y, 8080, None)])
    a.put(
        "frontends",
        {"addr": raw(cast.service), "port": 0, "proto": 0},
        flags=FrontendFlag.CLUSTER_IP,
    )
    refused = a.from_pod(Frame(cast.pod_x, cast.service, dport=81), "podx")
    assert (refused.verdict, refused.frame.flags) == ("REDIRECT", RST | ACK)
    assert a.from_net(Frame(cast.client, cast.external, dport=81)).verdict == "STACK"
    assert a.from_net(Frame(cast.client, cast.node_a, dport=31000)).verdict == "STACK"


def test_source_ranges(a: Node, cast: Addresses) -> None:
    a.service([(cast.external, 80)], [(cast.pod_y, 8080, None)], flags=FrontendFlag.SOURCE_RANGES)
    assert a.from_net(Frame(cast.client, cast.external)).verdict == "DROP"
    assert a.from_pod(Frame(cast.pod_x, cast.external), "podx").verdict == "DROP"
    bits = 32 + (24 if cast.family == 4 else 64)
    a.put("source_ranges", {"prefixlen": bits, "service": 7, "addr": raw(cast.client)}, value=1)
    assert a.from_net(Frame(cast.client, cast.external)).verdict == "REDIRECT"


def test_affinity_holds_while_the_backend_is_a_member(a: Node, cast: Addresses) -> None:
    backends = [(cast.pod_x, 8000 + i, None) for i in range(32)]
    a.service([(cast.external, 80), (None, NODEPORT)], backends, affinity=100)
    chosen = {
        a.from_net(Frame(cast.client, cast.external, sport=1000 + i)).frame.dport for i in range(20)
    }
    chosen |= {
        a.from_net(Frame(cast.client, cast.node_a, sport=1000 + i, dport=NODEPORT)).frame.dport
        for i in range(20)
    }
    assert len(chosen) == 1
    gone = chosen.pop() - 8000
    a.put("slots", {"list": 14, "slot": gone}, value=100 + (gone + 1) % 32)
    a.delete("members", list=14, backend=100 + gone)
    again = {
        a.from_net(Frame(cast.client, cast.external, sport=2000 + i)).frame.dport for i in range(20)
    }
    assert len(again) == 1


def test_affinity_holds_through_the_tunnel(a: Node, b: Node, cast: Addresses) -> None:
    """The second node chooses among its own, and stays with its choice for the client too."""
    ports = range(8000, 8032)
    for node, where in ((a, cast.node_b), (b, None)):
        node.service(
            [(None, NODEPORT)],
            [(cast.pod_z, port, where) for port in ports],
            affinity=100,
            flags=FrontendFlag.EXTERNAL,
        )
    chosen = set()
    for i in range(10):
        out = a.from_net(Frame(cast.client, cast.node_a, sport=1000 + i, dport=NODEPORT))
        chosen.add(b.from_tunnel(out.frame, cast.node_a).frame.dport)
    direct = b.from_net(Frame(cast.client, cast.node_b, sport=3000, dport=NODEPORT))
    assert {direct.frame.dport} == chosen


def test_without_affinity_all_backends_are_used(a: Node, cast: Addresses) -> None:
    a.service([(cast.external, 80)], [(cast.pod_x, 8000 + i, None) for i in range(4)])
    chosen = {
        a.from_net(Frame(cast.client, cast.external, sport=1000 + i)).frame.dport
        for i in range(100)
    }
    assert chosen == {8000, 8001, 8002, 8003}


def test_a_shrinking_list_still_has_its_first_slot(a: Node, cast: Addresses) -> None:
    a.service([(cast.external, 80)], [(cast.pod_x, 8000 + i, None) for i in range(4)])
    for slot in (1, 2, 3):
        a.delete("slots", list=14, slot=slot)
    for i in range(20):
        assert a.from_net(Frame(cast.client, cast.external, sport=1000 + i)).frame.dport == 8000


def test_a_syn_chooses_anew_when_its_backend_is_gone(a: Node, cast: Addresses) -> None:
    a.service([(cast.service, 80)], [(cast.pod_y, 8080, None)])
    first = Frame(cast.pod_x, cast.service)
    a.from_pod(first, "podx")
    a.service([(cast.service, 80)], [(cast.pod_z, 9090, cast.node_b)])
    assert a.from_pod(first.but(flags=ACK), "podx").frame.dst == cast.pod_y
    assert a.from_pod(first, "podx").frame.dst == cast.pod_z


def test_a_repeated_syn_keeps_its_backend(a: Node, cast: Addresses) -> None:
    a.service([(cast.service, 80)], [(cast.pod_y, 8000 + i, None) for i in range(16)])
    first = Frame(cast.pod_x, cast.service)
    assert len({a.from_pod(first, "podx").frame.dport for _ in range(20)}) == 1


def test_udp_leaves_a_backend_that_is_gone(a: Node, cast: Addresses) -> None:
    a.service([(cast.service, 53)], [(cast.pod_y, 53, None)], proto=UDP)
    query = Frame(cast.pod_x, cast.service, UDP, dport=53)
    assert a.from_pod(query, "podx").frame.dst == cast.pod_y
    a.service([(cast.service, 53)], [(cast.pod_z, 53, cast.node_b)], proto=UDP)
    a.age(query)
    assert a.from_pod(query, "podx").frame.dst == cast.pod_z


def test_a_tunnelled_syn_chooses_anew_when_its_backend_is_gone(a: Node, cast: Addresses) -> None:
    a.service([(None, NODEPORT)], [(cast.pod_z, 8080, cast.node_b)])
    first = Frame(cast.client, cast.node_a, dport=NODEPORT)
    assert a.from_net(first).action == "TUNNEL"
    a.service([(None, NODEPORT)], [(cast.pod_x, 8080, None)])
    assert a.from_net(first).action == "PEER"


def test_two_flows_whose_replies_would_look_alike(a: Node, cast: Addresses) -> None:
    """One client port, two service addresses, one backend."""
    a.service([(cast.service, 80), (cast.external, 80)], [(cast.pod_y, 8080, None)])
    one = a.from_pod(Frame(cast.pod_x, cast.service), "podx").frame
    two = a.from_pod(Frame(cast.pod_x, cast.external), "podx").frame
    assert one.sport == 40000
    assert two.sport != 40000
    for there, service in ((one, cast.service), (two, cast.external)):
        back = a.from_pod(there.reply(), "pody").frame
        assert (back.src, back.dport, back.valid) == (service, 40000, True)


def test_closed_translated_flow_reopens_with_another_choice(a: Node, cast: Addresses) -> None:
    a.service([(cast.service, 80)], [(cast.pod_y, 8080, None)])
    first = Frame(cast.pod_x, cast.service)
    there = a.from_pod(first, "podx").frame
    a.from_pod(there.reply(flags=FIN | ACK), "pody")
    a.from_pod(first.but(flags=FIN | ACK), "podx")
    again = a.from_pod(first, "podx")
    assert again.entry["packets"] == 1
    assert again.frame.sport == 40000
    assert again.entry["flags"] & CtFlag.NAT
    assert again.entry["tcp"] == SYN


def test_too_big_for_the_tunnel_is_answered(a: Node, cast: Addresses) -> None:
    a.service([(None, NODEPORT)], [(cast.pod_z, 8080, cast.node_b)])
    first = Frame(cast.client, cast.node_a, dport=NODEPORT)
    limit, size = (1450, 1460) if cast.family == 4 else (1430, 1440)
    a.from_net(first)
    big = first.but(flags=ACK, payload=bytes(size), dont_fragment=True)
    answer = a.from_net(big)
    assert (answer.verdict, answer.entry["mtu"]) == ("REDIRECT", limit)
    assert (answer.frame.src, answer.frame.dst) == (cast.node_a, cast.client)
    assert answer.frame.icmp == ((3, 4, limit) if cast.family == 4 else (2, 0, limit))
    assert answer.frame.valid
    quoted = read_network(answer.frame.payload)
    assert (quoted.src, quoted.sport, quoted.dport) == (cast.client, 40000, NODEPORT)
    if cast.family == 4:
        assert a.from_net(big.but(dont_fragment=False)).frame.dst == cast.node_a


def test_a_reply_too_big_for_the_tunnel_is_answered(a: Node, cast: Addresses) -> None:
    a.service([(None, NODEPORT)], [(cast.pod_x, 8080, None)])
    first = Frame(cast.client, cast.node_b, dport=NODEPORT)
    into = a.from_tunnel(first, cast.node_b)
    limit, size = (1450, 1460) if cast.family == 4 else (1430, 1440)
    reply = into.frame.reply(flags=ACK, payload=bytes(size), dont_fragment=True)
    answer = a.from_pod(reply, "podx")
    assert (answer.frame.dst, answer.frame.icmp[2]) == (cast.pod_x, limit)
    assert read_network(answer.frame.payload).src == cast.pod_x


def test_a_node_server_that_answers_from_the_pods_gateway(a: Node, cast: Addresses) -> None:
    """It listens on every address, and the route to the pod prefers another than was asked."""
    a.service([(cast.service, 53)], [(cast.node_a, 5353, None)], proto=UDP)
    out = a.from_pod(Frame(cast.pod_x, cast.service, UDP, dport=53), "podx")
    answer = out.frame.reply(src=cast.gateway)
    back = a.to_pod(answer, "podx", ingress=None)
    assert (back.verdict, back.frame.src, back.frame.sport) == ("STACK", cast.service, 53)
    assert back.frame.valid
    elsewhere = a.to_pod(answer, "podx", ingress="data0")
    assert elsewhere.frame.src == cast.gateway


def test_another_nodes_node_port_is_served_here(a: Node, cast: Addresses) -> None:
    a.service([(None, NODEPORT)], [(cast.pod_y, 8080, None)], flags=FrontendFlag.EXTERNAL)
    first = Frame(cast.pod_x, cast.node_b, dport=NODEPORT)
    out = a.from_pod(first, "podx")
    assert (out.verdict, out.frame.dst, out.frame.src) == ("REDIRECT", cast.pod_y, cast.pod_x)
    back = a.from_pod(out.frame.reply(), "pody")
    assert (back.frame.src, back.frame.sport) == (cast.node_b, NODEPORT)


def test_another_nodes_choice_among_its_own_is_left_to_it(a: Node, cast: Addresses) -> None:
    flags = FrontendFlag.EXTERNAL | FrontendFlag.EXTERNAL_LOCAL
    a.service([(None, NODEPORT)], [(cast.pod_y, 8080, None)], flags=flags)
    out = a.from_pod(Frame(cast.pod_x, cast.node_b, dport=NODEPORT), "podx")
    assert (out.verdict, out.frame.dst) == ("STACK", cast.node_b)


@pytest.mark.parametrize("hook", ["from_pod", "from_net"])
def test_an_address_that_no_service_has_is_dropped(a: Node, cast: Addresses, hook: str) -> None:
    bits = 8 * len(raw(cast.service))
    a.put("service_ranges", {"prefixlen": bits - 8, "addr": raw(cast.service)}, value=1)
    frame = Frame(cast.pod_x if hook == "from_pod" else cast.client, cast.service)
    out = a.from_pod(frame, "podx") if hook == "from_pod" else a.from_net(frame)
    assert out.verdict == "DROP"
    assert a.counters() == {"DROP_NO_SERVICE": 1}
    a.service([(cast.service, 80)], [(cast.pod_y, 8080, None)])
    again = a.from_pod(frame, "podx") if hook == "from_pod" else a.from_net(frame)
    assert again.verdict == "REDIRECT"


def test_a_service_range_over_pods_cuts_none(a: Node, cast: Addresses) -> None:
    for address in (cast.pod_y, cast.pod_z, cast.node_a):
        bits = 8 * len(raw(address))
        a.put("service_ranges", {"prefixlen": bits, "addr": raw(address)}, value=1)
    assert a.from_pod(Frame(cast.pod_x, cast.pod_y), "podx").verdict == "REDIRECT"
    assert a.from_pod(Frame(cast.pod_x, cast.pod_z), "podx").verdict == "REDIRECT"
    assert a.from_pod(Frame(cast.pod_x, cast.node_a), "podx").verdict == "STACK"
    assert a.from_net(Frame(cast.client, cast.node_a)).verdict == "STACK"


@pytest.mark.parametrize("proto", [6, 17])
def test_checksums_where_an_address_grows_by_one_in_its_first_octet(
    a: Node, cast: Addresses, proto: int
) -> None:
    """Differences whose sum needs two carries; the source's word does not change."""
    service, backend = {
        4: ("10.96.0.10", "11.96.0.10"),
        6: ("fd00:10:96::1", "fd00:10:196::1"),
    }[a.family]
    a.service([(service, 80)], [(backend, 80, cast.node_b)], proto=proto)
    out = a.from_pod(Frame(cast.pod_x, service, proto, dport=80), "podx")
    assert out.frame.dst == backend
    assert out.frame.valid

# SPDX-License-Identifier: Apache-2.0
"""What the programs are told of this node and the others."""

from __future__ import annotations

import pytest
from bpfdp_agent.desired.node import (
    NODE_PORTS,
    OWN,
    NodeFacts,
    cidr_entries,
    node_entries,
    own_address_entries,
    packed_all,
    settings_entries,
    tunnel_mtu,
)
from bpfdp_agent.layouts import ADDRESS_KEY, CIDR_KEY, SETTINGS, U32, NodeFlag, SettingsFlag
from bpfdp_agent.model.addresses import mapped
from bpfdp_agent.model.nodes import NodeIndex, NodeInfo

V4, V6, OTHER = packed_all(["192.0.2.1", "2001:db8::1", "10.9.9.9"])


def test_settings_name_the_first_address_of_each_family():
    facts = NodeFacts(7, 2, 3, 4096, 4789, (V4, OTHER, V6), dsr=True)
    (value,) = settings_entries(facts).values()
    found = SETTINGS.unpack(4, value)
    assert found["node4"] == V4
    assert found["node6"] == V6
    assert found["flags"] == SettingsFlag.DSR
    assert (found["data_ifindex"], found["tunnel_ifindex"], found["tunnel_vni"]) == (2, 3, 4096)


def test_that_udp_was_translated_in_pods_is_not_forgotten():
    facts = NodeFacts(7, 2, 3, 4096, 4789, (), connect_tcp=True, connect_udp_used=True)
    (value,) = settings_entries(facts).values()
    expected = SettingsFlag.CONNECT_TCP | SettingsFlag.CONNECT_UDP_USED
    assert SETTINGS.unpack(4, value)["flags"] == expected
    facts = NodeFacts(7, 2, 3, 4096, 4789, (), connect_udp=True)
    (value,) = settings_entries(facts).values()
    expected = SettingsFlag.CONNECT_UDP | SettingsFlag.CONNECT_UDP_USED
    assert SETTINGS.unpack(4, value)["flags"] == expected


@pytest.mark.parametrize(
    ("networks", "values"),
    [((), (NODE_PORTS, NODE_PORTS)), (("192.0.2.0/24",), (NODE_PORTS, OWN))],
)
def test_node_ports_are_served_on_the_addresses_that_are_asked_for(networks, values):
    entries = own_address_entries((V4, OTHER, V6), 4, networks)
    assert entries == {
        ADDRESS_KEY.pack(4, addr=V4): U32.pack(4, value=values[0]),
        ADDRESS_KEY.pack(4, addr=OTHER): U32.pack(4, value=values[1]),
    }


def test_tunnel_packets_are_believed_from_other_nodes_only():
    nodes = NodeIndex("n1")
    nodes.put(NodeInfo("n1", (V4,), mapped(V4), ""))
    nodes.put(NodeInfo("n2", (OTHER, V6), mapped(OTHER), ""))
    assert set(node_entries(nodes, ())) == {mapped(OTHER), V6}


def test_other_nodes_serve_node_ports_on_the_addresses_that_are_asked_for():
    nodes = NodeIndex("n1")
    nodes.put(NodeInfo("n2", (OTHER, V6), mapped(OTHER), ""))
    known = {
        key: int.from_bytes(value, "little")
        for key, value in node_entries(nodes, ("::/0",)).items()
    }
    assert known == {mapped(OTHER): NodeFlag.KNOWN, V6: NodeFlag.KNOWN | NodeFlag.PORTS}


def test_optouts_are_kept_apart_by_family():
    (key,) = cidr_entries(("10.0.0.0/8", "fd00::/8"), 4)
    assert CIDR_KEY.unpack(4, key) == {"prefixlen": 8, "addr": bytes([10, 0, 0, 0])}
    assert len(cidr_entries(("10.0.0.0/8", "fd00::/8"), 6)) == 1


@pytest.mark.parametrize(
    ("wanted", "device", "address", "mtu"),
    [
        (0, 1500, mapped(V4), 1450),
        (0, 1500, V6, 1430),
        (1300, 1500, V6, 1300),
        (0, 0, V6, 0),
        (0, 1300, V6, 1280),
    ],
)
def test_the_tunnels_mtu_leaves_room_for_the_outer_headers(wanted, device, address, mtu):
    assert tunnel_mtu(wanted, device, address) == mtu

# SPDX-License-Identifier: Apache-2.0
"""Which devices of the CNI's are used as the way to other nodes' pods, and whose port is whose."""

from __future__ import annotations

import pytest
from bpfdp_agent.bpf.errors import DeviceFailed
from bpfdp_agent.dataplane.addresses import select
from bpfdp_agent.dataplane.links import Link
from bpfdp_agent.dataplane.tunnel import DEVICE, check_port
from bpfdp_agent.desired.node import NodeFacts, interface_entries, settings_entries
from bpfdp_agent.layouts import INDEX, SETTINGS, U32


def vxlan(ifindex, name, **more):
    fields = {"kind": "vxlan", "peer": 0, "peer_netns": None, "mac": "", "mtu": 1450, "up": True}
    return Link(ifindex=ifindex, name=name, **{**fields, "vxlan_port": 8472, **more})


def test_a_vxlan_that_routes_lead_to_is_an_overlay():
    eth0 = vxlan(2, "eth0", kind="", vxlan_port=0)
    found = select([eth0, vxlan(5, "flannel.1"), vxlan(9, DEVICE, external=True)], "")
    assert [link.name for link in found.data] == ["eth0"]
    assert [link.name for link in found.overlays] == ["flannel.1"]


@pytest.mark.parametrize("state", [{"up": False}, {"external": True}, {"enslaved": True}])
def test_down_told_per_packet_or_a_bridges_port_is_none(state):
    found = select([vxlan(5, "flannel.1", **state)], "")
    assert found.overlays == ()
    assert len(found.vxlans) == 1


def test_a_device_that_the_pattern_names_is_not_there_twice():
    found = select([vxlan(5, "eth7")], "^eth")
    assert len(found.data) == 1
    assert found.overlays == ()


@pytest.mark.parametrize("state", [{}, {"up": False}, {"external": True}])
def test_the_cnis_port_is_not_taken_from_it(state):
    with pytest.raises(DeviceFailed, match=r"8472.*vxlan\.calico.*spec\.tunnel\.port"):
        check_port(8472, [vxlan(5, "vxlan.calico", **state)])
    check_port(4789, [vxlan(5, "vxlan.calico", **state)])


def test_programs_are_told_of_interfaces_and_the_overlays_port():
    assert interface_entries([2, 5]) == {
        INDEX.pack(4, index=2): U32.pack(4, value=1),
        INDEX.pack(4, index=5): U32.pack(4, value=1),
    }
    (value,) = settings_entries(NodeFacts(7, 2, 3, 4096, 4789, (), overlay_port=8472)).values()
    assert SETTINGS.unpack(4, value)["overlay_port"] == 8472

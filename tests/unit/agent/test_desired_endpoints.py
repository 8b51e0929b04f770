# SPDX-License-Identifier: Apache-2.0
"""This node's pods: veth and policy slots by address, and pods whose address is not yet known."""

from __future__ import annotations

from bpfdp_agent.desired.endpoints import PolicySlots, endpoint_entries
from bpfdp_agent.layouts import ADDRESS_KEY, ENDPOINT, POLICY_SLOT_DENY
from bpfdp_agent.model.addresses import packed
from bpfdp_agent.model.cluster import ClusterView
from bpfdp_agent.model.pods import PodLink
from unit.agent.kube_objects import added, pod

LINK = PodLink((packed("10.0.0.1"), packed("fd00::1")), 7)


def entries(pods, slots=None, links=(LINK,), family=4):
    view = ClusterView("node1")
    for found in pods:
        view.apply(added(found))
    made = endpoint_entries(
        view, family, links, lambda p: (slots or {}).get(p.metadata.name, PolicySlots())
    )
    return {k: tuple(ENDPOINT.unpack(family, v).values())[:3] for k, v in made.items()}


def key(address="10.0.0.1", family=4):
    return ADDRESS_KEY.pack(family, addr=packed(address))


def test_both_families_of_a_known_pod():
    found = [pod("a", ("10.0.0.1", "fd00::1"))]
    slots = {"a": PolicySlots(5, 6)}
    assert entries(found, slots) == {key(): (7, 5, 6)}
    assert entries(found, slots, family=6) == {key("fd00::1", 6): (7, 5, 6)}


def test_an_address_of_nobody_gets_no_entry():
    assert entries([]) == {}
    assert (
        entries(
            [
                pod("elsewhere", (), node_name="node2"),
                pod("host", (), host_network=True),
                pod("ended", (), phase="Failed"),
            ]
        )
        == {}
    )


def test_an_address_not_yet_known_gets_what_the_waiting_pod_would():
    assert entries([pod("new", ())], {"new": PolicySlots(5, 0)}) == {key(): (7, 5, 0)}


def test_or_deny_where_the_waiting_pods_do_not_agree():
    slots = {"x": PolicySlots(5, 0), "y": PolicySlots(0, 0)}
    assert entries([pod("x", ()), pod("y", ())], slots) == {key(): (7, POLICY_SLOT_DENY, 0)}


def test_an_address_whose_last_holder_was_on_another_node_is_not_that_pods():
    slots = {"last": PolicySlots(9, 9), "new": PolicySlots(5, 0)}
    assert entries([pod("last", node_name="node2"), pod("new", ())], slots) == {key(): (7, 5, 0)}

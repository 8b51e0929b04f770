# SPDX-License-Identifier: Apache-2.0
"""This node's pods: veth and policy slots by address, and pods whose address is not yet known."""

from __future__ import annotations

import pytest
from bpfdp_agent.desired.endpoints import PolicySlots, endpoint_entries, namespace_entries
from bpfdp_agent.layouts import (
    ADDRESS_KEY,
    ENDPOINT,
    NAMESPACE,
    NAMESPACE_KEY,
    POLICY_SLOT_DENY,
)
from bpfdp_agent.model.addresses import packed
from bpfdp_agent.model.cluster import ClusterView
from bpfdp_agent.model.pods import PodLink
from unit.agent.kube_objects import added, pod

LINK = PodLink((packed("10.0.0.1"), packed("fd00::1")), 7)


def entries(pods, slots=None, links=(LINK,), family=4, had=None):
    view = ClusterView("node1")
    for found in pods:
        view.apply(added(found))
    actual = {k: ENDPOINT.pack(family, ifindex=ifindex) for k, ifindex in (had or {}).items()}
    made = endpoint_entries(
        view, family, links, lambda p: (slots or {}).get(p.metadata.name, PolicySlots()), actual
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
    last = pod("last", node_name="node2", deleting=True)
    assert entries([last, pod("new", ())], slots) == {key(): (7, 5, 0)}


# -- a pod that gives itself an address -------------------------------------------------------

A, B = pod("a", ("10.0.0.1", "fd00::1")), pod("b", ("10.0.0.2",))
LINK_B = PodLink((packed("10.0.0.2"),), 5)


def claiming(*addresses: str, ifindex: int = 7) -> PodLink:
    return PodLink((packed("10.0.0.1"), packed("fd00::1"), *map(packed, addresses)), ifindex)


@pytest.mark.parametrize("had", [None, {key("10.0.0.2"): 5}], ids=["at first", "later"])
@pytest.mark.parametrize("first", [True, False])
def test_it_does_not_get_another_pods(had, first):
    links = (claiming("10.0.0.2"), LINK_B)
    found = entries([A, B], links=links if first else links[::-1], had=had)
    assert found == {key(): (7, 0, 0), key("10.0.0.2"): (5, 0, 0)}


def test_not_even_when_it_drops_its_own():
    taken = PodLink((packed("10.0.0.2"),), 7)
    had = {key("10.0.0.2"): 5}
    assert entries([A, B], links=(LINK_B, taken), had=had) == {key("10.0.0.2"): (5, 0, 0)}


def test_or_names_the_other_first():
    link = PodLink((packed("10.0.0.2"), packed("10.0.0.1")), 7)
    assert entries([A, B], links=(link,), had={key(): 7}) == {key(): (7, 0, 0)}


@pytest.mark.parametrize("address", ["8.8.8.8", "10.0.0.3"], ids=["nobody's", "remote"])
def test_nor_while_others_wait_one_that_is_no_local_pods(address):
    others = [pod("new", ()), pod("remote", ("10.0.0.3",), node_name="node2")]
    assert entries([A, *others], links=(claiming(address),)) == {key(): (7, 0, 0)}
    assert entries([A, *others], links=(claiming(address),), family=6).keys() == {key("fd00::1", 6)}


def test_nor_while_it_waits_itself_a_remote_pods():
    others = [pod("a", ()), pod("remote", ("10.0.0.3",), node_name="node2")]
    assert entries(others, links=(claiming("10.0.0.3"),)) == {key(): (7, 0, 0)}


def test_of_two_veths_with_an_address_the_new_one_has_it_unless_one_had_it():
    links = (claiming(ifindex=9), claiming(ifindex=8))
    assert entries([A], links=links) == {key(): (9, 0, 0)}
    assert entries([A], links=links, had={key(): 8}) == {key(): (8, 0, 0)}
    assert entries([A], links=links, had={key(): 4}) == {key(): (9, 0, 0)}


# -- a pod by its network namespace -----------------------------------------------------------


def test_a_namespace_has_the_first_address_that_is_its_pods():
    claimed = PodLink((packed("10.0.0.2"), *LINK.addresses), 7, "cni-1", 99)
    other = PodLink((packed("10.0.0.2"),), 5, "cni-2", 98)
    endpoints = {
        ADDRESS_KEY.pack(4, addr=packed(address)): ENDPOINT.pack(4, ifindex=ifindex)
        for address, ifindex in (("10.0.0.1", 7), ("10.0.0.2", 5))
    }
    found = namespace_entries(4, [claimed, other], endpoints)
    assert found == {
        NAMESPACE_KEY.pack(4, cookie=99): NAMESPACE.pack(4, addr=packed("10.0.0.1")),
        NAMESPACE_KEY.pack(4, cookie=98): NAMESPACE.pack(4, addr=packed("10.0.0.2")),
    }
    assert namespace_entries(6, [claimed, other], {}) == {}

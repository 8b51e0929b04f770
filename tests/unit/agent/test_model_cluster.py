# SPDX-License-Identifier: Apache-2.0
"""The view: stores, indexes, and that a change marks what it touches and no more."""

from __future__ import annotations

from bpfdp_agent.model.addresses import packed
from bpfdp_agent.model.cluster import Changes, ClusterView
from bpfdp_agent.watch.wire import Added, Kind, Malformed, ObjectKey, Synced
from unit.agent.kube_objects import (
    added,
    decoded,
    deleted,
    endpoint,
    endpoint_slice,
    node,
    pod,
    service,
)

WEB = ObjectKey("ns", "web")


def view_of(*objects):
    view = ClusterView("node1")
    for found in objects:
        view.apply(added(found))
    view.take_changes()
    return view


def changes(view, *events):
    for event in events:
        view.apply(event)
    return view.take_changes()


def test_a_slice_is_its_services_change():
    view = view_of(service())
    slice_ = endpoint_slice([endpoint("10.0.0.1")])
    assert changes(view, added(slice_)) == Changes(services={WEB})
    assert view.slices_of(WEB) == [slice_]
    assert changes(view, added(slice_)) == Changes()
    assert changes(view, deleted(slice_)) == Changes(services={WEB})
    assert view.slices_of(WEB) == []


def test_a_slice_that_moves_to_another_service_changes_both():
    view = view_of(endpoint_slice([], "web", name="s"))
    assert changes(view, added(endpoint_slice([], "other", name="s"))).services == {
        WEB,
        ObjectKey("ns", "other"),
    }
    assert view.slices_of(WEB) == []


def test_a_pods_addresses_old_and_new():
    view = view_of(pod("a", ("10.0.0.1",)))
    assert changes(view, added(pod("a", ("10.0.0.2", "fd00::2")))).addresses == {
        packed(a) for a in ("10.0.0.1", "10.0.0.2", "fd00::2")
    }
    assert view.pod_at(packed("10.0.0.1")) is None
    assert view.pod_at(packed("fd00::2")).metadata.name == "a"
    assert changes(view, deleted(pod("a"))) == Changes(
        pods={ObjectKey("ns", "a")}, addresses={packed("10.0.0.2"), packed("fd00::2")}
    )
    assert view.pods_in("ns") == view.pods_on("node1") == []


def test_a_reused_address_belongs_to_the_living_and_the_newest():
    view = view_of(
        pod("old", created="2026-01-01T00:00:00Z"),
        pod("ended", phase="Succeeded", created="2026-01-05T00:00:00Z"),
        pod("new", created="2026-01-02T00:00:00Z"),
        pod("leaving", created="2026-01-03T00:00:00Z", deleting=True),
        pod("host", host_network=True, created="2026-01-04T00:00:00Z"),
    )
    address = packed("10.0.0.1")
    assert view.pod_at(address).metadata.name == "new"
    view.apply(deleted(pod("new")))
    assert view.pod_at(address).metadata.name == "old"
    view.apply(deleted(pod("old")))
    assert view.pod_at(address).metadata.name == "leaving"


def test_another_nodes_address_changes_the_services_with_endpoints_there_and_no_other():
    view = view_of(
        node("node1"),
        service("web"), endpoint_slice([endpoint("10.0.0.1", "node2")], "web"),
        service("api"), endpoint_slice([endpoint("192.168.0.9", None)], "api"),
        service("near"), endpoint_slice([endpoint("10.0.0.3", "node1")], "near"),
    )  # fmt: skip
    found = changes(view, added(node("node2", ("192.168.0.2",))))
    assert found.services == {WEB, ObjectKey("ns", "api")}
    assert (found.nodes, found.addresses) == ({"node2"}, {packed("192.168.0.2")})
    assert changes(view, added(node("node2", ("192.168.0.2",), zone="z"))).services == {
        WEB,
        ObjectKey("ns", "api"),
    }
    assert changes(view, deleted(node("node2"))).addresses == {packed("192.168.0.2")}


def test_this_nodes_zone_or_address_changes_all_services():
    view = view_of(node("node1"), service("web"), service("api"))
    assert changes(view, added(node("node1", zone="z"))).services == {WEB, ObjectKey("ns", "api")}


def test_a_node_whose_labels_change_moves_nothing():
    view = view_of(node("node1"), service("web"))
    labelled = decoded(
        Kind.NODE,
        {
            "metadata": {"name": "node1", "labels": {"x": "y"}},
            "status": {
                "addresses": [
                    {"type": "InternalIP", "address": a} for a in ("192.168.0.1", "fd00:1::1")
                ]
            },
        },
    )
    assert changes(view, Added(Kind.NODE, labelled)) == Changes(nodes={"node1"})


def test_malformed_leaves_the_last_good_version():
    view = view_of(service())
    assert not changes(view, Malformed(Kind.SERVICE, WEB, "no"))
    assert view.services[WEB] == service()


def test_synced_and_config():
    view = ClusterView("node1")
    assert not view.synced(Kind.SERVICE)
    config = decoded(Kind.CONFIG, {"metadata": {"name": "default"}, "spec": {"a": 1}})
    assert changes(view, Synced(Kind.SERVICE), Added(Kind.CONFIG, config)) == Changes(config=True)
    assert view.synced(Kind.SERVICE)
    assert not view.synced(Kind.SERVICE, Kind.POD)
    assert not changes(
        view,
        Added(
            Kind.CONFIG, decoded(Kind.CONFIG, {"metadata": {"name": "default"}, "spec": {"a": 1}})
        ),
    )


def test_namespaces_and_policies():
    view = ClusterView("node1")
    namespace = decoded(Kind.NAMESPACE, {"metadata": {"name": "ns", "labels": {"a": "b"}}})
    policy = decoded(
        Kind.NETWORK_POLICY,
        {"metadata": {"name": "p", "namespace": "ns"}, "spec": {"podSelector": {}}},
    )
    assert changes(
        view, Added(Kind.NAMESPACE, namespace), Added(Kind.NETWORK_POLICY, policy)
    ) == Changes(namespaces={"ns"}, policies={ObjectKey("ns", "p")})
    assert not changes(view, Added(Kind.NAMESPACE, namespace))

# SPDX-License-Identifier: Apache-2.0
"""Identities: stable ids, one address's change costs one entry, any history ends the same."""

from __future__ import annotations

import importlib

from bpfdp_agent.desired.identities import Identity, IdentityTables, identity_of
from bpfdp_agent.layouts import ADDRESS_KEY, IDENTITY, IdentityFlag
from bpfdp_agent.model.addresses import family_of, packed
from bpfdp_agent.model.cluster import ClusterView
from bpfdp_agent.model.pods import NamedPort
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.agent.kube_objects import added, deleted, node, pod

module = importlib.import_module("bpfdp_agent.desired.identities")


def started(*objects):
    view = ClusterView("node1")
    for found in objects:
        view.apply(added(found))
    view.take_changes()
    tables = IdentityTables()
    tables.start(view, {})
    return view, tables


def change(view, tables, *events):
    for event in events:
        view.apply(event)
    return tables.update(view, view.take_changes().addresses)


def entry(tables, address):
    raw = packed(address)
    value = tables.table(family_of(raw)).get(ADDRESS_KEY.pack(family_of(raw), addr=raw))
    return IDENTITY.unpack(4, value) if value else None


def test_pods_and_nodes_here_and_there():
    near, far = pod("a", ("10.0.0.1", "fd00::a")), pod("b", ("10.0.0.2",), node_name="node2")
    _, tables = started(node("node1"), node("node2", ("192.168.0.2",)), near, far)
    assert entry(tables, "10.0.0.1") == {
        "id": tables.id_of(near),
        "flags": IdentityFlag.POD | IdentityFlag.LOCAL,
    }
    assert entry(tables, "fd00::a") == entry(tables, "10.0.0.1")
    assert entry(tables, "10.0.0.2") == {"id": tables.id_of(far), "flags": IdentityFlag.POD}
    assert entry(tables, "192.168.0.1") == {
        "id": 0,
        "flags": IdentityFlag.NODE | IdentityFlag.LOCAL,
    }
    assert entry(tables, "192.168.0.2") == {"id": 0, "flags": IdentityFlag.NODE}


def test_host_network_and_ended_pods_have_none():
    _, tables = started(
        node("node1"), pod("h", ("192.168.0.1",), host_network=True), pod("e", phase="Failed")
    )
    assert entry(tables, "192.168.0.1")["flags"] & IdentityFlag.NODE
    assert entry(tables, "10.0.0.1") is None


def test_what_an_identity_is():
    found = identity_of(
        pod(
            labels={"b": "2", "a": "1"},
            ports=[
                {"name": "web", "containerPort": 80},
                {"containerPort": 81},
                {"name": "dns", "containerPort": 53, "protocol": "UDP"},
            ],
        )
    )
    assert found == Identity(
        "ns", (("a", "1"), ("b", "2")), (NamedPort("dns", 17, 53), NamedPort("web", 6, 80))
    )


def test_a_new_identity_is_announced_once_and_its_end_too():
    view, tables = started()
    change_ = change(
        view,
        tables,
        added(pod("a", labels={"x": "1"})),
        added(pod("b", ("10.0.0.2",), labels={"x": "1"})),
    )
    assert list(change_.new.values()) == [Identity("ns", (("x", "1"),), ())]
    assert (len(change_.writes), dict(change_.gone)) == (2, {})
    (identity_id,) = change_.new
    assert change(view, tables, deleted(pod("a"))).gone == {}
    change_ = change(view, tables, deleted(pod("b")))
    assert list(change_.gone) == [identity_id]
    assert (dict(tables.identities()), tables.table(4)) == ({}, {})


def test_a_relabelled_pod_changes_its_own_addresses_and_nothing_else():
    view, tables = started(pod("a", labels={"x": "1"}), pod("b", ("10.0.0.2",), labels={"x": "1"}))
    change_ = change(view, tables, added(pod("a", labels={"x": "2"})))
    assert (len(change_.new), len(change_.writes), len(change_.gone)) == (1, 1, 0)
    assert entry(tables, "10.0.0.1") != entry(tables, "10.0.0.2")


def test_a_status_change_writes_nothing():
    view, tables = started(pod("a", phase="Pending"))
    change_ = change(view, tables, added(pod("a", phase="Running")))
    assert (dict(change_.new), len(change_.writes), dict(change_.gone)) == ({}, 0, {})


def test_a_reused_address_goes_to_the_living_pod():
    view, tables = started(pod("old", labels={"x": "1"}))
    change(
        view,
        tables,
        added(pod("old", labels={"x": "1"}, deleting=True)),
        added(pod("new", labels={"x": "2"}, created="2026-02-01T00:00:00Z")),
    )
    assert entry(tables, "10.0.0.1")["id"] == tables.id_of(pod("new", labels={"x": "2"}))
    assert len(change(view, tables, deleted(pod("old"))).writes) == 0


def test_a_restart_gives_equal_ids_and_writes_the_difference():
    pods = [pod(f"p{n}", (f"10.0.0.{n}",), labels={"n": str(n)}) for n in range(1, 20)]
    _, before = started(*pods)
    view = ClusterView("node1")
    for found in reversed(pods):
        view.apply(added(found))
    after = IdentityTables()
    stale = ADDRESS_KEY.pack(4, addr=packed("10.9.9.9"))
    writes = after.start(view, {4: {**before.table(4), stale: bytes(8)}}).writes
    assert [(dict(s.puts), s.deletes) for s in writes] == [({}, (stale,))]


def test_colliding_hashes_get_ids_of_their_own(monkeypatch):
    monkeypatch.setattr(module, "_hash", lambda _: 0xFFFFFFFF)
    view, tables = started(
        *(pod(f"p{n}", (f"10.0.0.{n}",), labels={"n": str(n)}) for n in range(1, 4))
    )
    assert sorted(tables.identities()) == [1, 2, 0xFFFFFFFF]
    assert len({entry(tables, f"10.0.0.{n}")["id"] for n in range(1, 4)}) == 3
    assert view.pods


pods_ = st.builds(
    lambda name, ip, label, phase, deleting: pod(name, (ip, "fd00::1"), labels={"x": label}, phase=phase, deleting=deleting),
    st.sampled_from("abc"), st.sampled_from(["10.0.0.1", "10.0.0.2", "192.168.0.1"]), st.sampled_from("12"), st.sampled_from(["Running", "Succeeded"]), st.booleans(),
)  # fmt: skip
nodes_ = st.builds(
    lambda n, a: node(n, (f"192.168.0.{a}",)),
    st.sampled_from(["node1", "node2"]),
    st.integers(1, 2),
)
events_ = st.lists(
    st.tuples(st.sampled_from([added, added, deleted]), st.one_of(pods_, nodes_)), max_size=15
)


@settings(max_examples=150, deadline=None)
@given(st.lists(events_, max_size=4))
def test_any_history_ends_in_the_tables_of_a_fresh_start(history):
    view, tables = started()
    kernel, known = {4: {}, 6: {}}, {}
    for batch in history:
        change_ = change(view, tables, *(make(found) for make, found in batch))
        assert not known.keys() & change_.new.keys()
        known |= change_.new
        for step in change_.writes:
            kernel[step.family].update(step.puts)
            for key in step.deletes:
                del kernel[step.family][key]
        for gone in change_.gone:
            del known[gone]
        used = {IDENTITY.unpack(4, v)["id"] for f in kernel for v in kernel[f].values()} - {0}
        assert used == known.keys() == tables.identities().keys()
    fresh = IdentityTables()
    fresh.start(view, {})
    assert kernel == {f: fresh.table(f) for f in kernel}

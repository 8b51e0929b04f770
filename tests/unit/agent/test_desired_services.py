# SPDX-License-Identifier: Apache-2.0
"""The service maps: what a change costs, its order, and that any history ends in the same tables."""

from __future__ import annotations

import pytest
from bpfdp_agent.desired.services import API_SERVER, ServiceTables
from bpfdp_agent.diff.tables import SERVICE_MAPS, SERVICE_PHASES
from bpfdp_agent.layouts import (
    BACKEND,
    FRONTEND,
    FRONTEND_KEY,
    INDEX,
    SLOT_KEY,
    SOURCE_RANGE_KEY,
    U32,
    FrontendFlag,
)
from bpfdp_agent.model.addresses import packed
from bpfdp_agent.model.cluster import ClusterView
from bpfdp_agent.model.services import ServiceView, service_view
from bpfdp_agent.watch.wire import ObjectKey
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.agent.kube_objects import added, deleted, endpoint, endpoint_slice, node, service
from unit.agent.service_histories import batches, events
from unit.agent.service_meaning import meaning

WEB = ObjectKey("ns", "web")


class Kernel:
    """The maps of one family; checks at every step that no frontend leads nowhere."""

    def __init__(self, tables=None):
        self.tables = {name: dict((tables or {}).get(name, {})) for name in SERVICE_MAPS}

    def write(self, writes, stop_after=None, check=True):
        for number, step in enumerate(writes):
            if number == stop_after:
                return
            table = self.tables[step.map]
            table.update(step.puts)
            for key in step.deletes:
                table.pop(key, None)
            if check:
                self.check()

    def check(self):
        """Every count is backed by slots, and every slot by a backend."""
        family = 4
        backends = {INDEX.unpack(family, k)["index"] for k in self.tables["backends"]}
        slots = {
            tuple(SLOT_KEY.unpack(family, k).values()): U32.unpack(family, v)["value"]
            for k, v in self.tables["slots"].items()
        }
        for value in self.tables["frontends"].values():
            entry = FRONTEND.unpack(family, value)
            for kind, count in ((0, entry["cluster_count"]), (1, entry["local_count"])):
                for slot in range(count):
                    assert slots[entry["service"] * 2 + kind, slot] in backends

    def meaning(self):
        """What the maps say, without ids and slot order."""
        return meaning(4, self.tables)


def cluster(*objects):
    view = ClusterView("node1")
    for found in (node("node1"), node("node2", ("192.168.0.2",)), *objects):
        view.apply(added(found))
    return view


def views(view, keys=None):
    keys = view.services if keys is None else keys
    return {k: service_view(view.services.get(k), view.slices_of(k), 4, view.nodes) for k in keys}


def running(*objects):
    """A kernel and tables that know the objects."""
    view = cluster(*objects)
    view.take_changes()
    tables, kernel = ServiceTables(4), Kernel()
    kernel.write(tables.start(kernel.tables, views(view)))
    return view, tables, kernel


def change(view, tables, *events):
    for event in events:
        view.apply(event)
    return tables.update(views(view, view.take_changes().services))


def frontend(kernel, address, port, proto=6):
    key = FRONTEND_KEY.pack(4, addr=packed(address), port=port, proto=proto)
    value = kernel.tables["frontends"].get(key)
    return FRONTEND.unpack(4, value) if value else None


def targets(kernel, address, port, kind=0):
    """Backends of a frontend's list by slot, last octets."""
    entry = frontend(kernel, address, port)
    found = []
    for slot in range(entry["local_count" if kind else "cluster_count"]):
        index = kernel.tables["slots"][
            SLOT_KEY.pack(4, list=entry["service"] * 2 + kind, slot=slot)
        ]
        found.append(BACKEND.unpack(4, kernel.tables["backends"][index])["addr"][3])
    return found


def ends(*octets, node_name="node1"):
    return endpoint_slice([endpoint(f"10.0.0.{n}", node_name) for n in octets])


# -- cost -------------------------------------------------------------------------------------


def many(count):
    objects = []
    for n in range(count):
        ip = f"10.{100 + n // 65536}.{n // 256 % 256}.{n % 256}"
        objects += [
            service(f"s{n}", ip),
            endpoint_slice([endpoint(f"10.1.{n // 256}.{n % 256}")], f"s{n}"),
        ]
    return objects


def costs(count):
    """Writes of: a new service with 3 endpoints, one endpoint more, one less, none, nothing new, gone."""
    view, tables, kernel = running(*many(count))
    found = []
    steps = [
        (added(service()), added(ends(1, 2, 3))),
        (added(ends(1, 2, 3, 4)),),
        (added(ends(2, 3, 4)),),
        (added(ends()),),
        (added(service()), added(ends())),
        (deleted(service()), deleted(ends())),
    ]
    for happens in steps:
        writes = change(view, tables, *happens)
        kernel.write(writes, check=False)
        found.append(len(writes))
    assert tables.resync(kernel.tables).steps == ()
    return found


def test_a_change_costs_the_same_at_10_and_at_10000_services():
    """TestSyncProxyRulesRepeated. A new service: 2 frontends, 3 slots, 3 backends."""
    few = costs(10)
    assert few == [8, 3, 4, 7, 0, 2]
    assert costs(10_000) == few


def test_one_endpoint_of_a_thousand_moves_one_slot():
    full = [endpoint(f"10.0.{n // 250}.{n % 250}") for n in range(1000)]
    view, tables, _ = running(service(), endpoint_slice(full))
    writes = change(view, tables, added(endpoint_slice(full[1:])))
    assert [(s.map, len(s.puts), len(s.deletes)) for s in writes] == [
        ("slots", 1, 0),
        ("frontends", 1, 0),
        ("slots", 0, 1),
        ("backends", 0, 1),
    ]


def test_a_backend_is_shared_by_all_services():
    view, tables, kernel = running(
        service(),
        ends(1),
        service("other", "10.96.0.2"),
        endpoint_slice([endpoint("10.0.0.1")], "other"),
    )
    assert (tables.services, tables.backends) == (2, 1)
    kernel.write(change(view, tables, deleted(ends(1))))
    assert (tables.backends, targets(kernel, "10.96.0.2", 80)) == (1, [1])
    kernel.write(change(view, tables, deleted(endpoint_slice([], "other"))))
    assert kernel.tables["backends"] == {}


# -- content ----------------------------------------------------------------------------------


def test_a_cluster_ips_other_ports_are_marked_until_its_last_service_goes():
    view, tables, kernel = running(service(), ends(1))
    undefined = frontend(kernel, "10.96.0.1", 0, proto=0)
    assert undefined == {
        "service": 0,
        "cluster_count": 0,
        "local_count": 0,
        "affinity_seconds": 0,
        "flags": FrontendFlag.CLUSTER_IP,
    }
    # the address goes from one service to another: the new one may be seen first
    kernel.write(change(view, tables, added(service("heir"))))
    kernel.write(change(view, tables, deleted(service())))
    assert frontend(kernel, "10.96.0.1", 0, proto=0) == undefined
    kernel.write(change(view, tables, deleted(service("heir"))))
    assert kernel.tables["frontends"] == {}


def test_an_address_that_changes_hands_in_one_batch_is_never_missing():
    view, tables, kernel = running(service(), ends(1))
    writes = change(view, tables, deleted(service()), added(service("heir")))
    assert not any(step.deletes for step in writes if step.map == "frontends")
    kernel.write(writes)


def test_external_ips_cannot_take_what_was_allocated_or_is_older():
    old = {"creationTimestamp": "2026-01-01T00:00:00Z"}
    new = {"creationTimestamp": "2026-02-01T00:00:00Z"}
    victim = service(meta=new)
    thief = service("a", "10.96.0.2", meta=old, externalIPs=["10.96.0.1", "9.9.9.9"])
    second = service("b", "10.96.0.3", meta=new, externalIPs=["9.9.9.9"])
    view, tables, kernel = running(
        victim,
        thief,
        second,
        ends(1),
        endpoint_slice([endpoint("10.0.0.66")], "a"),
        endpoint_slice([endpoint("10.0.0.77")], "b"),
    )
    assert targets(kernel, "10.96.0.1", 80) == [1]
    assert targets(kernel, "9.9.9.9", 80) == [66]
    kernel.write(change(view, tables, deleted(thief)))
    assert targets(kernel, "9.9.9.9", 80) == [77]


def test_members_only_with_affinity():
    view, tables, kernel = running(service(), ends(1, 2))
    assert kernel.tables["members"] == {}
    kernel.write(change(view, tables, added(service(sessionAffinity="ClientIP"))))
    assert len(kernel.tables["members"]) == 2
    kernel.write(change(view, tables, added(ends(2, 3, 4))))
    assert len(kernel.tables["members"]) == 3
    assert frontend(kernel, "10.96.0.1", 80)["affinity_seconds"] == 10800
    kernel.write(change(view, tables, added(service())))
    assert kernel.tables["members"] == {}


def test_source_ranges_come_before_the_flag_and_go_after_it():
    def lb(ranges):
        return service(
            type="LoadBalancer",
            loadBalancerSourceRanges=ranges,
            status={"loadBalancer": {"ingress": [{"ip": "5.6.7.8"}]}},
        )

    view, tables, kernel = running(lb([]), ends(1))
    writes = change(view, tables, added(lb(["10.0.0.0/8", "11.0.0.0/8"])))
    assert [s.map for s in writes] == ["source_ranges", "frontends"]
    kernel.write(writes)
    keys = [SOURCE_RANGE_KEY.unpack(4, k) for k in kernel.tables["source_ranges"]]
    assert {(k["prefixlen"], k["addr"], k["service"]) for k in keys} == {
        (40, packed(a), frontend(kernel, "5.6.7.8", 80)["service"])
        for a in ("10.0.0.0", "11.0.0.0")
    }
    writes = change(view, tables, added(lb([])))
    assert [s.map for s in writes] == ["frontends", "source_ranges"]
    kernel.write(writes)
    assert kernel.tables["source_ranges"] == {}


def test_a_node_learnt_later_completes_its_backends_in_place():
    view, tables, kernel = running(service(), ends(1, node_name="node3"))
    ids = set(kernel.tables["backends"])
    writes = change(view, tables, added(node("node3", ("192.168.0.3",))))
    assert [(s.map, len(s.puts)) for s in writes] == [("backends", 1)]
    kernel.write(writes)
    assert set(kernel.tables["backends"]) == ids


# -- the API server's own service -------------------------------------------------------------


def api(*octets):
    ends_ = [endpoint(f"192.168.0.{n}", None) for n in octets]
    return service("kubernetes", "10.96.0.1", "default"), endpoint_slice(
        ends_, "kubernetes", namespace="default"
    )


def test_the_api_servers_service_keeps_its_last_backends():
    svc, slice_ = api(9)
    view, tables, kernel = running(svc, slice_)
    empty = api()[1]
    for event in (added(empty), deleted(empty), deleted(svc), added(svc)):
        kernel.write(change(view, tables, event))
        assert targets(kernel, "10.96.0.1", 80) == [9]
    kernel.write(change(view, tables, added(api(8)[1])))
    assert targets(kernel, "10.96.0.1", 80) == [8]
    assert tables.resync(kernel.tables).steps == ()


def test_and_keeps_them_over_a_restart():
    _, _, kernel = running(*api(8, 9))
    view = cluster(api()[0])
    tables = ServiceTables(4)
    writes = tables.start(kernel.tables, views(view))
    assert writes.steps == ()
    assert sorted(targets(kernel, "10.96.0.1", 80)) == [8, 9]
    assert API_SERVER in view.services


# -- restarts ---------------------------------------------------------------------------------


def test_a_restart_with_nothing_new_writes_nothing():
    view, _, kernel = running(*many(20), service(sessionAffinity="ClientIP"), ends(3, 1, 2))
    assert ServiceTables(4).start(kernel.tables, views(view)).steps == ()


def test_a_restart_keeps_ids_and_slots_and_removes_what_is_in_no_service():
    view, _, kernel = running(*many(5), service(), ends(1, 2, 3))
    before = frontend(kernel, "10.96.0.1", 80)["service"]
    for event in (added(ends(1, 3, 4)), deleted(service("s0")), deleted(endpoint_slice([], "s0"))):
        view.apply(event)
    restarted = ServiceTables(4)
    writes = restarted.start(kernel.tables, views(view))
    kernel.write(writes)
    assert frontend(kernel, "10.96.0.1", 80)["service"] == before
    assert targets(kernel, "10.96.0.1", 80) == [1, 4, 3]
    # s0: 2 frontends, 1 slot, 1 backend; web: backend 2 out, 4 in, one slot
    assert len(writes) == 4 + 3
    kernel.write(change(view, restarted, added(service("s0", "10.96.0.9"))))
    ids = {FRONTEND.unpack(4, v)["service"] for v in kernel.tables["frontends"].values()} - {0}
    assert len(ids) == restarted.services


def test_the_phases_name_every_map_once_for_each_side():
    assert sorted(SERVICE_PHASES) == sorted(
        (m, s) for m in SERVICE_MAPS for s in ("puts", "deletes")
    )


# -- properties -------------------------------------------------------------------------------


def expected(view):
    """The tables of a fresh start from the final state."""
    kernel = Kernel()
    kernel.write(ServiceTables(4).start({}, views(view)))
    return kernel.meaning()


@settings(max_examples=150, deadline=None)
@given(batches)
def test_any_history_ends_in_the_tables_of_a_fresh_start(history):
    view, tables, kernel = running()
    for batch in history:
        writes = change(view, tables, *batch)
        kernel.write(writes)
        kernel.check()
        assert {n: tables.table(n) for n in SERVICE_MAPS} == kernel.tables
    assert kernel.meaning() == expected(view)


@settings(max_examples=150, deadline=None)
@given(batches, st.integers(0, 10), events)
def test_interrupted_writes_and_a_restart_converge(history, stop_after, missed):
    view, tables, kernel = running()
    writes = None
    for batch in history:
        if writes is not None:
            kernel.write(writes)
        writes = change(view, tables, *batch)
    if writes is not None:
        kernel.write(writes, stop_after)
    for each in missed:
        view.apply(each)
    view.take_changes()
    restarted = ServiceTables(4)
    # what a broken-off batch left is whole up to the step it broke off at; so is every step after
    kernel.write(restarted.start(kernel.tables, views(view)))
    assert kernel.meaning() == expected(view)
    assert restarted.resync(kernel.tables).steps == ()
    assert restarted.update(views(view)).steps == ()


@pytest.mark.parametrize("service_name", ["web", "kubernetes"])
def test_updating_a_service_nobody_knows_is_nothing(service_name):
    key = ObjectKey("default", service_name)
    assert ServiceTables(4).update({key: ServiceView()}).steps == ()


def test_udp_flows_stay_with_an_endpoint_that_serves_while_it_terminates():
    ports = [{"name": "dns", "port": 53, "protocol": "UDP"}]

    def answering(*endpoints):
        slice_ports = [{"name": "dns", "port": 53, "protocol": "UDP"}]
        return added(endpoint_slice(list(endpoints), ports=slice_ports))

    both = endpoint("10.0.0.1"), endpoint("10.0.0.2")
    view, tables, kernel = running(service(ports=ports))
    kernel.write(change(view, tables, answering(*both)))
    leaving = endpoint("10.0.0.1", ready=False, serving=True, terminating=True)
    kernel.write(change(view, tables, answering(leaving, both[1])))
    assert len(kernel.tables["backends"]) == 2, "what flows to it know it by"
    assert len(kernel.tables["slots"]) == 1, "no new flow chooses it"
    dead = endpoint("10.0.0.1", ready=False, serving=False, terminating=True)
    kernel.write(change(view, tables, answering(dead, both[1])))
    assert len(kernel.tables["backends"]) == 1
    assert tables.resync(kernel.tables).steps == ()

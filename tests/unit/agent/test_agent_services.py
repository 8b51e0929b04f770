# SPDX-License-Identifier: Apache-2.0
"""The services concern against maps in memory: gating, operation counts, failures, health ports."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import msgspec
import pytest
from bpfdp_agent.bpf.errors import BpfError, MapFull
from bpfdp_agent.diff.tables import SERVICE_MAPS
from bpfdp_agent.layouts import FRONTEND, FRONTEND_KEY
from bpfdp_agent.model.cluster import ClusterView
from bpfdp_agent.reconcile.loop import Loop
from bpfdp_agent.reconcile.services import NEEDS, ServiceSync
from bpfdp_agent.reconcile.surroundings import Surroundings
from bpfdp_agent.serve.metrics import Metrics
from bpfdp_agent.serve.nodestatus import NodeStatus
from bpfdp_agent.serve.proxyhealth import ProxyHealth
from bpfdp_agent.watch.wire import ObjectKey, Synced
from unit.agent.kube_objects import added, deleted, endpoint, endpoint_slice, node, service


class FakeMaps:
    """Maps as dicts; `full` names one that takes no more, in the families `full_in`."""

    def __init__(self) -> None:
        self.content: dict[tuple[str, int], dict[bytes, bytes]] = {}
        self.full = ""
        self.full_in = (4, 6)
        self.limits: dict[str, int] = {}
        self.room: dict[str, int] = {}

    def read(self, name, family):
        return dict(self.content.get((name, family), {}))

    def write(self, name, family, puts, deletes=()):
        table = self.content.setdefault((name, family), {})
        if name == self.full and family in self.full_in and puts:
            raise MapFull(f"{name}{family}", 1)
        if len(table.keys() | puts.keys()) > self.room.get(name, 1 << 20):
            for key in deletes:  # as OpenMap.write does
                table.pop(key, None)
            if len(table.keys() | puts.keys()) > self.room[name]:
                raise MapFull(f"{name}{family}", self.room[name])
        table.update(puts)
        for key in deletes:
            table.pop(key, None)

    def __getitem__(self, which):
        return SimpleNamespace(
            lookup=lambda key: self.content.get(which, {}).get(key),
            info=SimpleNamespace(max_entries=self.limits.get(which[0], 1 << 20)),
        )


class FakeEvents:
    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def warning(self, ref, reason, message):
        self.told.append((str(ref), reason))


class FakeConnections:
    def __init__(self) -> None:
        self.forgotten: list[int] = []
        self.failing = False

    async def forget_backends(self, family, gone):
        if self.failing:
            raise BpfError("no")
        self.forgotten += [family] * len(gone)


class Bench:
    """A ServiceSync with a synced view."""

    def __init__(self, *, synced: bool = True) -> None:
        self.view = ClusterView("node1")
        self.maps, self.events, self.connections = FakeMaps(), FakeEvents(), FakeConnections()
        self.metrics = Metrics()
        self.proxy = ProxyHealth(self.metrics.proxy)
        self.status = NodeStatus("1", "6.18")
        self.around = Surroundings(
            settings=None,
            view=self.view,
            status=self.status,
            events=self.events,
            metrics=self.metrics,
            proxy=self.proxy,
            proxy_servers=SimpleNamespace(wake=SimpleNamespace(set=lambda: None)),
        )
        self.fresh()
        self.give(added(node()))
        if synced:
            self.synced()

    def fresh(self) -> None:
        """As after a restart of the agent: the maps stay."""
        self.sync = ServiceSync(self.around, self.maps, self.connections, lambda: None)

    def synced(self) -> None:
        for kind in NEEDS:
            self.view.apply(Synced(kind))

    def give(self, *events) -> None:
        for event in events:
            self.view.apply(event)
        self.sync.changed(self.view.take_changes().services)

    def size(self, name: str, family: int = 4) -> int:
        return len(self.maps.read(name, family))


def web(number: int = 1, **spec):
    name = f"web{number}"
    return (
        added(service(name, f"10.96.1.{number}", **spec)),
        added(endpoint_slice([endpoint(f"10.0.0.{number}"), endpoint("10.0.1.1")], name)),
    )


async def test_nothing_is_written_or_deleted_before_the_lists_are_complete():
    bench = Bench(synced=False)
    stale = FRONTEND_KEY.pack(4, addr=bytes([10, 96, 9, 9]), port=80, proto=6)
    bench.maps.content["frontends", 4] = {stale: FRONTEND.pack(4, service=77)}
    bench.give(*web())
    assert await bench.sync.reconcile() == 0
    assert bench.size("frontends") == 1
    assert not bench.status.is_true("ServicesSynced")
    bench.synced()
    await bench.sync.reconcile()
    assert stale not in bench.maps.read("frontends", 4)
    assert bench.status.is_true("ServicesSynced")


def dual_web(number: int):
    """A dual-stack service with two endpoints of its own in each family."""
    name, high, low = f"web{number}", number // 250, number % 250
    four = [endpoint(f"10.{each}.{high}.{low}") for each in (1, 2)]
    six = [endpoint(f"fd00:{each}::{number:x}") for each in (1, 2)]
    return (
        service(name, [f"10.96.{high}.{low}", f"fd96::{number:x}"]),
        endpoint_slice(four, name),
        endpoint_slice(six, name, family=6),
    )


async def operations_among(others: int) -> list[float]:
    """What the agent reports for each change to one service among others."""
    bench, done = Bench(), asyncio.Event()
    loop = Loop("services", bench.sync.reconcile, bench.metrics, lambda *_: done.set())
    running = asyncio.create_task(loop.run())

    async def reported(*events) -> float:
        bench.give(*events)
        done.clear()
        loop.wake()
        await done.wait()
        await asyncio.sleep(0)  # the report comes just before the metric
        return bench.metrics.registry.get_sample_value(
            "bpfdp_last_reconcile_map_operations", {"concern": "services"}
        )

    await reported(*(added(each) for n in range(1, 1 + others) for each in dual_web(n)))
    web, four, six = dual_web(0)
    more = endpoint_slice([endpoint(f"10.{n}.0.0") for n in (1, 2, 3)], "web0")
    less = endpoint_slice([endpoint("10.3.0.0")], "web0")
    affine = service("web0", ["10.96.0.0", "fd96::0"], sessionAffinity="ClientIP")
    found = [
        await reported(added(web), added(four), added(six)),
        await reported(added(more)),
        await reported(added(less)),
        await reported(added(affine)),
        await reported(added(affine), added(less)),
        await reported(deleted(web), deleted(less), deleted(six)),
    ]
    running.cancel()
    return found


async def test_a_change_is_reported_to_cost_the_same_at_10_and_at_10000_services():
    few = await operations_among(10)
    # new: per family 2 frontends, 2 slots, 2 backends; with affinity a member for each slot
    assert few == [12, 3, 6, 5, 0, 13]
    assert await operations_among(10_000) == few


async def test_a_restarted_agent_writes_only_what_differs():
    bench = Bench()
    bench.give(*web(1), *web(2))
    await bench.sync.reconcile()
    bench.fresh()
    assert await bench.sync.reconcile() == 0
    bench.fresh()
    bench.give(deleted(service("web2", "10.96.1.2")))
    assert await bench.sync.reconcile() > 0
    assert bench.size("frontends") == 2


async def test_backends_that_go_lose_their_udp_flows():
    bench = Bench()
    bench.give(*web())
    await bench.sync.reconcile()
    bench.give(added(endpoint_slice([endpoint("10.0.1.1")], "web1")))
    await bench.sync.reconcile()
    assert bench.connections.forgotten == [4]


async def test_a_full_map_is_told_of_and_healed():
    bench = Bench()
    bench.maps.full = "backends"
    bench.give(*web())
    with pytest.raises(MapFull):
        await bench.sync.reconcile()
    assert ("Service ns/web1", "MapFull") in bench.events.told
    assert bench.status.get("ServicesSynced").reason == "MapFull"
    assert "web1" in bench.status.get("ServicesSynced").message
    bench.maps.full = ""
    await bench.sync.reconcile()
    assert bench.size("backends") == 2
    assert bench.status.is_true("ServicesSynced")


async def test_a_service_that_does_not_fit_is_refused_whole_and_named():
    bench = Bench()
    bench.maps.limits = {"backends": 3}
    bench.give(*web(1), *web(2))
    await bench.sync.reconcile()
    before = {name: bench.maps.read(name, 4) for name in SERVICE_MAPS}
    bench.give(*web(3))
    await bench.sync.reconcile()
    assert {name: bench.maps.read(name, 4) for name in SERVICE_MAPS} == before
    condition = bench.status.get("ServicesSynced")
    assert (condition.status, condition.reason) == ("False", "MapFull")
    for part in ("Service ns/web3", "backends4", "spec.maps.backends"):
        assert part in condition.message
    assert bench.events.told == [("Service ns/web3", "MapFull")]
    # another service changes all the same, and when one goes there is room
    bench.give(added(service("web2", "10.96.1.22")))
    await bench.sync.reconcile()
    assert FRONTEND_KEY.pack(4, addr=bytes([10, 96, 1, 22]), port=80, proto=6) in bench.maps.read(
        "frontends", 4
    )
    bench.give(deleted(service("web1", "10.96.1.1")))
    await bench.sync.reconcile()
    assert bench.status.is_true("ServicesSynced")
    assert bench.size("backends") == 3


async def test_an_exchange_of_endpoints_in_a_map_at_its_limit_goes_on():
    bench = Bench()
    bench.maps.limits = {"backends": 2}
    bench.maps.room = {"backends": 2}
    bench.give(*web(1))
    await bench.sync.reconcile()
    others = [endpoint("10.0.0.8"), endpoint("10.0.0.9")]
    bench.give(added(endpoint_slice(others, "web1")))
    await bench.sync.reconcile()
    assert bench.status.is_true("ServicesSynced")
    assert bench.size("backends") == 2


async def test_what_is_refused_costs_no_writes():
    bench = Bench()
    bench.maps.limits = {"backends": 2}
    bench.give(*web(1))
    await bench.sync.reconcile()
    bench.give(*web(2), *web(3))
    assert await bench.sync.reconcile() == 0


async def test_an_endpoint_too_many_leaves_the_service_as_it_was():
    bench = Bench()
    bench.maps.limits = {"slots": 2}
    bench.give(*web(1))
    await bench.sync.reconcile()
    many = [endpoint(f"10.0.0.{n}") for n in range(1, 6)]
    bench.give(added(endpoint_slice(many, "web1")))
    await bench.sync.reconcile()
    assert (bench.size("slots"), bench.size("backends")) == (2, 2)
    bench.maps.limits = {}
    bench.give(deleted(service("web9", "10.96.1.9")), added(service("web1", "10.96.1.11")))
    await bench.sync.reconcile()
    assert bench.size("slots") == 5


async def test_after_a_restart_what_was_served_comes_first():
    bench = Bench()
    bench.maps.limits = {"backends": 2}
    bench.give(*web(2))
    await bench.sync.reconcile()
    bench.give(*web(1))
    bench.fresh()
    bench.sync.changed(bench.view.services)
    await bench.sync.reconcile()
    assert "web1" in bench.status.get("ServicesSynced").message
    assert bench.size("backends") == 2


def dual_stack():
    four = endpoint_slice([endpoint("10.0.0.7")], "lb")
    six = endpoint_slice([endpoint("fd00::1")], "lb", family=6)
    found = service(
        "lb",
        ["10.96.1.9", "fd96::9"],
        type="LoadBalancer",
        externalTrafficPolicy="Local",
        healthCheckNodePort=30999,
    )
    return added(found), added(four), added(six)


@pytest.mark.parametrize("restarted", [True, False])
async def test_one_family_that_fails_leaves_the_other_whole(restarted):
    bench = Bench()
    if not restarted:
        await bench.sync.reconcile()
    bench.maps.full, bench.maps.full_in = "backends", (4,)
    bench.give(*dual_stack(), *web(2))
    with pytest.raises(MapFull):
        await bench.sync.reconcile()
    assert (bench.size("backends", 4), bench.size("backends", 6)) == (0, 1)
    bench.give(deleted(service("web2", "10.96.1.2")))
    bench.maps.full_in = (6,)
    bench.give(added(endpoint_slice([endpoint("fd00::2")], "lb", family=6)))
    with pytest.raises(MapFull):
        await bench.sync.reconcile()
    assert not bench.status.is_true("ServicesSynced")
    bench.maps.full = ""
    await bench.sync.reconcile()
    assert [bench.size("backends", family) for family in (4, 6)] == [1, 1]
    assert b"\xfd" + bytes(14) + b"\x02" in b"".join(bench.maps.read("backends", 6).values())
    assert bench.size("frontends") == 2
    assert 30999 in bench.proxy.services


async def test_flows_that_could_not_be_cut_loose_are_next_time():
    bench = Bench()
    bench.give(*web())
    await bench.sync.reconcile()
    bench.connections.failing = True
    bench.give(added(endpoint_slice([endpoint("10.0.1.1")], "web1")), *dual_stack())
    with pytest.raises(BpfError):
        await bench.sync.reconcile()
    assert bench.size("backends", 6) == 1
    assert 30999 in bench.proxy.services
    bench.connections.failing = False
    await bench.sync.reconcile()
    await bench.sync.reconcile()
    assert bench.connections.forgotten == [4]


async def test_a_bad_endpoint_is_named_and_harms_nothing_else():
    bench = Bench()
    slice_ = added(endpoint_slice([endpoint("10.0.0.300"), endpoint("10.0.1.1")], "web1"))
    bench.give(*web(2), web()[0], slice_)
    await bench.sync.reconcile()
    assert ("EndpointSlice ns/web1-v4", "InvalidObject") in bench.events.told
    assert bench.status.current.last_error.object == "EndpointSlice ns/web1-v4"
    assert bench.size("frontends") == 4
    bench.give(*web())
    await bench.sync.reconcile()
    assert bench.status.current.last_error is None


async def test_health_check_node_ports_count_local_ready_endpoints():
    bench = Bench()
    found = added(
        service(
            "lb",
            "10.96.1.9",
            type="LoadBalancer",
            externalTrafficPolicy="Local",
            healthCheckNodePort=30999,
        )
    )
    ends = [endpoint("10.0.0.1"), endpoint("10.0.0.2", ready=False), endpoint("10.0.1.1", "node2")]
    bench.give(found, added(endpoint_slice(ends, "lb")))
    await bench.sync.reconcile()
    assert bench.proxy.services[30999].local_endpoints == 1
    assert set(msgspec.json.decode(bench.proxy.healthz().body)["status"]) == {"IPv4", "IPv6"}
    bench.give(deleted(service("lb", "10.96.1.9")))
    await bench.sync.reconcile()
    assert bench.proxy.services == {}
    assert ObjectKey("ns", "lb") not in bench.view.services


async def test_ports_without_a_local_endpoint_are_counted_by_policy():
    bench = Bench()
    bench.give(*web(1, internalTrafficPolicy="Local"))
    bench.give(added(endpoint_slice([endpoint("10.0.0.1", "node2")], "web1")))
    await bench.sync.reconcile()
    text = bench.metrics.text().decode()
    name = "kubeproxy_sync_proxy_rules_no_local_endpoints_total"
    assert f'{name}{{ip_family="IPv4",traffic_policy="internal"}} 1.0' in text
    assert f'{name}{{ip_family="IPv4",traffic_policy="external"}} 0.0' in text
    assert 'kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family="IPv6"} 1.0' in text

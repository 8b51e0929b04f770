# SPDX-License-Identifier: Apache-2.0
"""The pods concern: its order of writes, which keeps policy closed, and what may be attached."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest
from bpfdp_agent.bpf.errors import MapFull, SyscallFailed
from bpfdp_agent.desired.endpoints import PolicySlots
from bpfdp_agent.layouts import ADDRESS_KEY, ENDPOINT
from bpfdp_agent.model.cluster import ClusterView
from bpfdp_agent.model.pods import PodLink
from bpfdp_agent.reconcile import pods
from bpfdp_agent.reconcile.pods import NEEDS, PodSync
from bpfdp_agent.serve.metrics import Metrics
from bpfdp_agent.serve.nodestatus import NodeStatus
from bpfdp_agent.watch.wire import Synced
from unit.agent.kube_objects import added, deleted, node, pod

A, B = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])


class Log:
    """Maps and policies that write down what is done to them, in order."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.content: dict[tuple[str, int], dict[bytes, bytes]] = {}
        self.full = False
        self.identities_known = False
        self.started = True
        self.failing = None
        self.in_use = frozenset()

    def __getitem__(self, which):
        return which

    def read(self, name, family):
        return dict(self.content.get((name, family), {}))

    def write(self, name, family, puts, deletes=()):
        if self.full:
            raise MapFull(name, 1)
        self.done.append(name)
        table = self.content.setdefault((name, family), {})
        table.update(puts)
        for key in deletes:
            del table[key]

    async def add_identities(self, new):
        self.done += ["policies learn"] * bool(new)
        return len(new)

    async def drop_identities(self, gone):
        self.done += ["policies forget"] * bool(gone)
        return len(gone)

    def slots_of(self, found):
        return PolicySlots(5, 0) if found.metadata.labels else PolicySlots()


class Bench:
    def __init__(self) -> None:
        self.view, self.log = ClusterView("node1"), Log()
        self.status = NodeStatus("1", "6.18")
        self.settled = 0
        around = SimpleNamespace(view=self.view, status=self.status, metrics=Metrics())
        self.sync = PodSync(around, self.log, self.log, self.tick)
        self.sync._links = ()
        for kind in NEEDS:
            self.view.apply(Synced(kind))
        self.give(added(node()))

    def tick(self) -> None:
        self.settled += 1

    def give(self, *events) -> None:
        for event in events:
            self.view.apply(event)
        self.sync.changed(self.view.take_changes())

    async def round(self) -> list[str]:
        self.log.done.clear()
        await self.sync.reconcile()
        return self.log.done

    def endpoint(self, address: bytes):
        value = self.log.read("endpoints", 4).get(ADDRESS_KEY.pack(4, addr=address))
        return ENDPOINT.unpack(4, value) if value else None


@pytest.fixture
async def bench() -> Bench:
    made = Bench()
    await made.round()
    return made


async def test_policies_learn_before_an_address_maps_and_forget_after(bench):
    bench.give(added(pod("a", labels={"app": "x"})))
    assert await bench.round() == ["policies learn", "identities"]
    bench.give(deleted(pod("a")))
    assert await bench.round() == ["identities", "policies forget"]


async def test_a_pod_is_attachable_only_with_its_endpoint(bench):
    bench.sync._links = (PodLink((A,), 7), PodLink((B,), 8))
    bench.give(added(pod("a", ("10.0.0.1",), labels={"app": "x"})))
    await bench.round()
    assert bench.endpoint(A) == {"ifindex": 7, "ingress_slot": 5, "egress_slot": 0, "flags": 0}
    assert bench.endpoint(B) is None
    assert bench.sync.attachable == {7}
    assert bench.log.in_use == {5, 0}
    bench.give(added(pod("b", ("10.0.0.2",))))
    await bench.round()
    assert bench.sync.attachable == {7, 8}
    assert bench.status.current.pods == 2


async def test_endpoints_wait_for_the_first_round_of_policies():
    bench = Bench()
    bench.log.started = False
    bench.sync._links = (PodLink((A,), 7),)
    bench.give(added(pod("a", ("10.0.0.1",))))
    await bench.round()
    assert bench.log.identities_known
    assert not bench.sync.complete
    assert bench.endpoint(A) is None
    bench.log.started = True
    await bench.round()
    assert bench.sync.complete
    assert bench.endpoint(A) is not None
    assert bench.status.is_true("PoliciesSynced")


async def test_an_interrupted_write_is_made_good(bench):
    bench.log.full = True
    bench.give(added(pod("a")))
    with pytest.raises(MapFull):
        await bench.round()
    bench.log.full = False
    await bench.round()
    assert ADDRESS_KEY.pack(4, addr=A) in bench.log.read("identities", 4)
    assert await bench.round() == []


@pytest.fixture
def purged(monkeypatch) -> list[tuple[tuple[str, int], set[bytes]]]:
    """What is purged of which table; the first pass fails when `None` is put in before."""
    passes: list = []

    async def purge(table, addresses):
        if passes == [None]:
            passes.clear()
            raise SyscallFailed("BPF_MAP_LOOKUP_BATCH", errno.ENOMEM)
        passes.append((table, set(addresses)))
        return len(addresses)

    monkeypatch.setattr(pods.conntrack, "purge_addresses", purge)
    return passes


async def test_the_flows_of_an_address_go_with_its_pod(bench, purged):
    bench.sync._links = (PodLink((A,), 7), PodLink((B,), 8))
    bench.give(added(pod("a", ("10.0.0.1",))), added(pod("b", ("10.0.0.2",))))
    await bench.round()
    bench.sync._links = (PodLink((B,), 9),)
    await bench.round()
    assert purged == [(("ct", 4), {A, B})]
    bench.give(added(pod("b", ("10.0.0.2",), labels={"app": "x"})))
    await bench.round()
    assert bench.endpoint(B)["ingress_slot"] == 5
    assert len(purged) == 1


async def test_flows_that_could_not_be_forgotten_are_tried_again(bench, purged):
    bench.sync._links = (PodLink((A,), 7),)
    bench.give(added(pod("a", ("10.0.0.1",))))
    await bench.round()
    bench.sync._links = ()
    purged.append(None)
    with pytest.raises(SyscallFailed):
        await bench.round()
    assert bench.sync.attachable == frozenset()
    await bench.round()
    assert purged == [(("ct", 4), {A})]

# SPDX-License-Identifier: Apache-2.0
"""The policies concern: who judges a pod, that nothing fails open, and that trouble is told of."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

import msgspec
import pytest
from bpfdp_agent.bpf.errors import CompileFailed, MapFull
from bpfdp_agent.dataplane.policies import PolicyNotLoaded
from bpfdp_agent.desired.endpoints import PolicySlots
from bpfdp_agent.desired.identities import identity_of
from bpfdp_agent.layouts import ADDRESS_KEY, ENDPOINT, POLICY_SLOT_ALLOW, POLICY_SLOT_DENY
from bpfdp_agent.model.cluster import ClusterView
from bpfdp_agent.reconcile import policies
from bpfdp_agent.reconcile.policies import NEEDS, PolicySync
from bpfdp_agent.reconcile.surroundings import Surroundings
from bpfdp_agent.serve.metrics import Metrics
from bpfdp_agent.serve.nodestatus import NodeStatus
from bpfdp_agent.watch.wire import Added, Deleted, Kind, ObjectKey, Synced, decode
from unit.agent.kube_objects import added, deleted, pod


class FakePrograms:
    """Slots from 2 on; `broken` makes every new program fail."""

    def __init__(self, *_: object) -> None:
        self.loaded: dict[str, int] = {}
        self.adopted: set[int] = set()
        self.content: dict[str, dict[int, bytes]] = {}
        self.broken = False
        self.full: MapFull | None = None
        self.specs = {}
        self.freed: list[set[int]] = []
        self.stale: list[str] = []
        self.compiling = lambda: None

    async def open(self):
        pass

    @property
    def slots(self):
        return self.adopted | set(self.loaded.values())

    async def ensure_all(self, wanted):
        results = {}
        self.compiling()
        for each in wanted:
            key = each.spec.key
            self.specs[key] = each.spec
            if (key not in self.loaded or key in self.stale) and self.broken:
                results[key] = PolicyNotLoaded(each.spec, CompileFailed("policy", "error: no"))
                continue
            if key not in self.loaded or key in self.stale:
                self.loaded.setdefault(key, 2 + len(self.loaded))
                self.content[key] = dict(each.values())
                self.stale = [k for k in self.stale if k != key]
            results[key] = self.loaded[key]
        return results

    async def write(self, changes):
        if self.full:
            self.stale += changes
            raise PolicyNotLoaded(self.specs[next(iter(changes))], self.full)
        for key, values in changes.items():
            table = self.content.get(key)
            if table is not None:
                table.update(values)
        return sum(map(len, changes.values()))

    def forget(self, in_use):
        self.freed.append(set(in_use))
        gone = [key for key, slot in self.loaded.items() if slot not in in_use]
        for key in gone:
            del self.loaded[key]
        return gone

    async def free(self):
        await asyncio.sleep(1)


class Bench:
    def __init__(self, monkeypatch) -> None:
        monkeypatch.setattr(policies, "PolicyPrograms", FakePrograms)
        monkeypatch.setattr(policies, "exists", lambda ifindex: ifindex < 100)
        self.view = ClusterView("node1")
        self.told: list[tuple[str, str]] = []
        self.status = NodeStatus("1", "6.18")
        around = Surroundings(
            settings=None,
            view=self.view,
            status=self.status,
            events=SimpleNamespace(
                warning=lambda ref, reason, text: self.told.append((str(ref), reason))
            ),
            metrics=Metrics(),
            proxy=None,
            proxy_servers=None,
        )
        self.endpoints: dict[bytes, bytes] = {}
        maps = SimpleNamespace(read=lambda _, family: self.endpoints if family == 4 else {})
        kernel = SimpleNamespace(compiler=None, renderer=None, maps=maps, pins=None)
        self.sync = PolicySync(around, kernel, lambda: None)
        self.programs: FakePrograms = self.sync._programs
        for kind in NEEDS:
            self.view.apply(Synced(kind))
        self.give(
            Added(Kind.NAMESPACE, decode(Kind.NAMESPACE, b'{"metadata": {"name": "ns"}}')),
            added(pod("web", ("10.0.0.1",), labels={"app": "web"})),
            added(pod("client", ("10.0.0.2",), labels={"app": "client"})),
        )

    def give(self, *events) -> None:
        for event in events:
            self.view.apply(event)
        self.sync.changed(self.view.take_changes())

    def leave_endpoint(self, last: int, slot: int, ifindex: int = 7) -> None:
        """What an earlier agent wrote for the pod 10.0.0.`last`, and the program it loaded."""
        key = ADDRESS_KEY.pack(4, addr=bytes([10, 0, 0, last]))
        self.endpoints[key] = ENDPOINT.pack(4, ifindex=ifindex, ingress_slot=slot)
        self.programs.adopted.add(slot)

    def give_namespace(self, **labels: str) -> None:
        body = {"metadata": {"name": "ns", "labels": labels}}
        found = decode(Kind.NAMESPACE, msgspec.json.encode(body))
        self.give(Added(Kind.NAMESPACE, found))

    async def identities(self, *names: str) -> None:
        found = [identity_of(self.view.pods[ObjectKey("ns", n)]) for n in names]
        await self.sync.add_identities(dict(enumerate(found, start=1)))
        self.sync.identities_known = True

    def slots(self, name: str = "web") -> PolicySlots:
        return self.sync.slots_of(self.view.pods[ObjectKey("ns", name)])


def policy(name: str = "p", selected: str = "web", **spec):
    body = {
        "metadata": {"name": name, "namespace": "ns"},
        "spec": {
            "podSelector": {"matchLabels": {"app": selected}},
            "policyTypes": ["Ingress"],
            **spec,
        },
    }
    return Added(Kind.NETWORK_POLICY, decode(Kind.NETWORK_POLICY, msgspec.json.encode(body)))


def allow(app: str, port: int = 80):
    peers = [{"podSelector": {"matchLabels": {"app": app}}}]
    return {"ingress": [{"from": peers, "ports": [{"protocol": "TCP", "port": port}]}]}


@pytest.fixture
def bench(monkeypatch) -> Bench:
    return Bench(monkeypatch)


async def test_the_first_round_waits_for_identities(bench):
    bench.give(policy(**allow("client")))
    await bench.sync.reconcile()
    assert not bench.sync.started
    await bench.identities("client")
    await bench.sync.reconcile()
    assert bench.sync.started
    (content,) = bench.programs.content.values()
    assert set(content) == {1}


async def test_slots_by_policy(bench):
    await bench.identities("client")
    await bench.sync.reconcile()
    assert bench.slots() == PolicySlots(POLICY_SLOT_ALLOW, POLICY_SLOT_ALLOW)
    bench.give(policy("deny"))
    await bench.sync.reconcile()
    assert bench.slots() == PolicySlots(POLICY_SLOT_DENY, POLICY_SLOT_ALLOW)
    bench.give(policy("some", **allow("client")))
    await bench.sync.reconcile()
    assert bench.slots() == PolicySlots(2, POLICY_SLOT_ALLOW)
    assert bench.status.current.policies == 2
    assert bench.slots("client") == PolicySlots(POLICY_SLOT_ALLOW, POLICY_SLOT_ALLOW)
    for name in ("deny", "some"):
        bench.give(Deleted(Kind.NETWORK_POLICY, ObjectKey("ns", name)))
    await bench.sync.reconcile()
    assert bench.slots() == PolicySlots(POLICY_SLOT_ALLOW, POLICY_SLOT_ALLOW)


async def test_a_program_that_does_not_load_denies_what_was_open_and_is_tried_again(bench):
    await bench.identities("client")
    await bench.sync.reconcile()
    bench.programs.broken = True
    bench.give(policy(**allow("client")))
    with pytest.raises(PolicyNotLoaded):
        await bench.sync.reconcile()
    assert bench.slots().ingress == POLICY_SLOT_DENY
    assert bench.status.get("PoliciesSynced").reason == "TemplateError"
    assert bench.told == [("NetworkPolicy ns/p", "TemplateError")]
    bench.programs.broken = False
    await bench.sync.reconcile()
    assert bench.slots().ingress == 2


async def test_a_full_map_is_told_of_on_each_policy_of_the_program(bench):
    await bench.identities("client")
    bench.give(policy("p", **allow("client")), policy("q", **allow("client", 81)))
    await bench.sync.reconcile()
    bench.programs.full = MapFull("peers", 64)
    with pytest.raises(PolicyNotLoaded):
        await bench.sync.add_identities(
            {5: identity_of(bench.view.pods[ObjectKey("ns", "client")])}
        )
    assert bench.told == [("NetworkPolicy ns/p", "MapFull"), ("NetworkPolicy ns/q", "MapFull")]


async def test_a_program_that_does_not_load_leaves_the_last_good_one(bench):
    await bench.identities("client")
    bench.give(policy(**allow("client")))
    await bench.sync.reconcile()
    bench.programs.broken = True
    bench.give(policy(**allow("client", port=81)))
    with pytest.raises(PolicyNotLoaded):
        await bench.sync.reconcile()
    assert bench.slots().ingress == 2


@pytest.mark.parametrize(
    "spec", [allow("client"), {"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/99"}}]}]}]
)
async def test_after_a_restart_a_pod_keeps_the_program_it_had(bench, spec):
    await bench.identities("client")
    bench.programs.broken = True
    bench.leave_endpoint(1, 9)
    bench.give(policy(**spec))
    with contextlib.suppress(PolicyNotLoaded):
        await bench.sync.reconcile()
    assert bench.slots() == PolicySlots(9, POLICY_SLOT_ALLOW)


@pytest.mark.parametrize(
    ("ifindex", "adopted"), [(100, True), (7, False)], ids=["another pod's", "not adopted"]
)
async def test_after_a_restart_nothing_else_is_taken_for_the_last_program(bench, ifindex, adopted):
    await bench.identities("client")
    bench.programs.broken = True
    bench.leave_endpoint(1, 9, ifindex)
    if not adopted:
        bench.programs.adopted.clear()
    bench.give(policy(**allow("client")))
    with pytest.raises(PolicyNotLoaded):
        await bench.sync.reconcile()
    assert bench.slots().ingress == POLICY_SLOT_DENY


async def test_a_pod_keeps_what_it_has_while_its_program_compiles(bench):
    await bench.identities("client")
    await bench.sync.reconcile()
    bench.give(policy(**allow("client")))
    meanwhile = []
    bench.programs.compiling = lambda: meanwhile.append(bench.slots().ingress)
    await bench.sync.reconcile()
    bench.give(added(pod("new", ("10.0.0.9",), labels={"app": "fresh"})))
    bench.give(policy("q", "fresh", **allow("client", 81)))
    bench.programs.compiling = lambda: meanwhile.append(bench.slots("new").ingress)
    await bench.sync.reconcile()
    assert meanwhile == [POLICY_SLOT_ALLOW, POLICY_SLOT_DENY]
    assert (bench.slots().ingress, bench.slots("new").ingress) == (2, 3)


async def test_a_policy_that_cannot_be_enforced_is_named_and_fails_closed(bench):
    await bench.identities("client")
    bad = {"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/99"}}]}]}
    bench.give(policy("bad", **bad), policy("good", "client", **allow("web")))
    await bench.sync.reconcile()
    assert bench.told == [("NetworkPolicy ns/bad", "InvalidObject")]
    assert bench.slots().ingress == POLICY_SLOT_DENY
    assert bench.slots("client").ingress == 2
    await bench.sync.reconcile()
    assert len(bench.told) == 1
    bench.give(Deleted(Kind.NETWORK_POLICY, ObjectKey("ns", "bad")))
    await bench.sync.reconcile()
    assert bench.status.current.last_error is None
    assert bench.slots().ingress == POLICY_SLOT_ALLOW


async def test_a_new_pod_is_judged_before_the_round_that_loads_its_program(bench):
    await bench.identities("client")
    bench.give(policy(**allow("client")))
    await bench.sync.reconcile()
    bench.give(added(pod("web2", ("10.0.0.9",), labels={"app": "web"})))
    assert bench.slots("web2").ingress == 2
    bench.give(policy("new", "fresh", **allow("web")))
    bench.give(added(pod("fresh", ("10.0.0.10",), labels={"app": "fresh"})))
    assert bench.slots("fresh").ingress == POLICY_SLOT_DENY
    await bench.sync.reconcile()
    assert bench.slots("fresh").ingress == 3


async def test_a_pod_of_the_same_name_is_another_pod(bench):
    await bench.identities("client")
    bench.give(policy(**allow("client")))
    await bench.sync.reconcile()
    again = pod("web", ("10.0.0.1",), labels={"app": "other"})
    meta = msgspec.structs.replace(again.metadata, uid="another")
    bench.give(added(msgspec.structs.replace(again, metadata=meta)))
    assert bench.slots().ingress == POLICY_SLOT_ALLOW


@pytest.mark.looptime
async def test_slots_in_use_are_not_freed(bench):
    await bench.identities("client")
    bench.give(policy(**allow("client")))
    await bench.sync.reconcile()
    task = asyncio.create_task(bench.sync.free_unused())
    await asyncio.sleep(12)
    assert all(2 in used for used in bench.programs.freed)
    bench.give(Deleted(Kind.NETWORK_POLICY, ObjectKey("ns", "p")))
    await bench.sync.reconcile()
    await asyncio.sleep(6)
    assert bench.programs.loaded == {}
    task.cancel()


@pytest.mark.looptime
async def test_no_pod_gets_a_slot_that_is_being_freed(bench):
    await bench.identities("client")
    bench.give(policy(**allow("client")))
    await bench.sync.reconcile()
    bench.give(deleted(pod("web")))
    task = asyncio.create_task(bench.sync.free_unused())
    await asyncio.sleep(policies.FREE_EVERY + 0.5)
    bench.give(added(pod("web2", ("10.0.0.9",), labels={"app": "web"})))
    assert bench.slots("web2").ingress == POLICY_SLOT_DENY
    await bench.sync.reconcile()
    assert bench.slots("web2").ingress in bench.programs.slots
    task.cancel()


async def test_a_namespace_that_could_not_be_written_is_made_good_in_the_same_round(bench):
    bench.give_namespace(team="x")
    await bench.identities("web", "client")
    peers = [{"namespaceSelector": {"matchLabels": {"team": "x"}}}]
    bench.give(policy(ingress=[{"from": peers}]))
    await bench.sync.reconcile()
    (content,) = bench.programs.content.values()
    assert set(content) == {1, 2}
    bench.programs.full = MapFull("peers", 64)
    bench.give_namespace(team="y")
    await bench.sync.reconcile()
    (content,) = bench.programs.content.values()
    assert content == {}
    assert not bench.sync.behind


async def test_after_a_failed_write_the_other_identities_are_known_all_the_same(bench):
    bench.sync.identities_known = True
    bench.give(policy(**allow("client")))
    await bench.sync.reconcile()
    client = identity_of(bench.view.pods[ObjectKey("ns", "client")])
    bench.programs.full = MapFull("peers", 64)
    with pytest.raises(PolicyNotLoaded):
        await bench.sync.add_identities({1: client, 2: client})
    assert bench.sync.behind
    bench.programs.full, bench.programs.broken = None, True
    with pytest.raises(PolicyNotLoaded):
        await bench.sync.reconcile()
    assert not bench.sync.behind  # the round is repeated, with pauses
    bench.programs.broken = False
    await bench.sync.reconcile()
    (content,) = bench.programs.content.values()
    assert set(content) == {1, 2}
    assert not bench.sync.behind

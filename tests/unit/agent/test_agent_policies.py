# SPDX-License-Identifier: Apache-2.0
"""The policies concern: who judges a pod, that nothing fails open, and that trouble is told of."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import msgspec
import pytest
from bpfdp_agent.bpf.errors import CompileFailed
from bpfdp_agent.dataplane.policies import PolicyNotLoaded
from bpfdp_agent.desired.endpoints import PolicySlots
from bpfdp_agent.desired.identities import identity_of
from bpfdp_agent.layouts import POLICY_SLOT_ALLOW, POLICY_SLOT_DENY
from bpfdp_agent.model.cluster import ClusterView
from bpfdp_agent.reconcile import policies
from bpfdp_agent.reconcile.policies import NEEDS, PolicySync
from bpfdp_agent.reconcile.surroundings import Surroundings
from bpfdp_agent.serve.metrics import Metrics
from bpfdp_agent.serve.nodestatus import NodeStatus
from bpfdp_agent.watch.wire import Added, Deleted, Kind, ObjectKey, Synced, decode
from unit.agent.kube_objects import added, pod


class FakePrograms:
    """Slots from 2 on; `broken` makes every new program fail."""

    def __init__(self, *_: object) -> None:
        self.slots: dict[str, int] = {}
        self.content: dict[str, dict[int, bytes]] = {}
        self.broken = False
        self.freed: list[set[int]] = []

    async def open(self):
        pass

    async def ensure_all(self, wanted):
        results = {}
        for each in wanted:
            key = each.spec.key
            if key not in self.slots and self.broken:
                results[key] = PolicyNotLoaded(each.spec, CompileFailed("policy", "error: no"))
                continue
            if key not in self.slots:
                self.slots[key] = 2 + len(self.slots)
                self.content[key] = dict(each.values())
            results[key] = self.slots[key]
        return results

    async def write(self, changes):
        for key, values in changes.items():
            table = self.content.get(key)
            if table is not None:
                table.update(values)
        return sum(map(len, changes.values()))

    async def free(self, in_use):
        self.freed.append(set(in_use))
        gone = [key for key, slot in self.slots.items() if slot not in in_use]
        for key in gone:
            del self.slots[key]
        return gone


class Bench:
    def __init__(self, monkeypatch) -> None:
        monkeypatch.setattr(policies, "PolicyPrograms", FakePrograms)
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
        kernel = SimpleNamespace(compiler=None, renderer=None, maps=None, pins=None)
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
    bench.programs.broken = False
    await bench.sync.reconcile()
    assert bench.slots().ingress == 2


async def test_a_program_that_does_not_load_leaves_the_last_good_one(bench):
    await bench.identities("client")
    bench.give(policy(**allow("client")))
    await bench.sync.reconcile()
    bench.programs.broken = True
    bench.give(policy(**allow("client", port=81)))
    with pytest.raises(PolicyNotLoaded):
        await bench.sync.reconcile()
    assert bench.slots().ingress == 2


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
    assert bench.programs.slots == {}
    task.cancel()

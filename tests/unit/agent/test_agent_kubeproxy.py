# SPDX-License-Identifier: Apache-2.0
"""kube-proxy's rules: cleared when it is gone from this node, and never before that is known."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest
from bpfdp_agent.config import Config
from bpfdp_agent.dataplane import kubeproxy_rules
from bpfdp_agent.model.cluster import ClusterView
from bpfdp_agent.reconcile.kubeproxy import KubeProxySync
from bpfdp_agent.serve.nodestatus import NodeStatus
from bpfdp_agent.watch.wire import Kind, NodeSpec, Synced, Taint
from unit.agent.kube_objects import added, node

GONE = Config(kube_proxy_state="Disabled")


class Bench:
    def __init__(self, monkeypatch) -> None:
        self.clearings = 0
        monkeypatch.setattr(kubeproxy_rules, "clear", self.clear)
        self.status = NodeStatus("1", "6.18")
        self.view = ClusterView("node1")
        self.servers = SimpleNamespace(active=False, wake=SimpleNamespace(set=lambda: None))
        self.health = SimpleNamespace(node_eligible=True)
        self.sync = KubeProxySync(
            SimpleNamespace(
                view=self.view,
                status=self.status,
                proxy_servers=self.servers,
                proxy=self.health,
            )
        )

    async def clear(self):
        self.clearings += 1
        return SimpleNamespace(chains=3, rules=5)

    def label(self, **labels: str) -> None:
        found = node()
        labels = {f"bpfdataplane.io/{k.replace('_', '-')}": v for k, v in labels.items()}
        metadata = msgspec.structs.replace(found.metadata, labels=labels)
        self.view.apply(added(msgspec.structs.replace(found, metadata=metadata)))

    async def round(self, config: Config = GONE):
        self.sync.configure(config)
        await self.sync.reconcile()
        return self.status.get("KubeProxyRulesCleared")


@pytest.fixture
def bench(monkeypatch) -> Bench:
    return Bench(monkeypatch)


async def test_rules_are_cleared_once_it_is_gone_and_again_after_it_was_back(bench):
    bench.label()
    bench.view.apply(Synced(Kind.NODE))
    assert (await bench.round(Config(kube_proxy_state="Removing"))).status == "False"
    assert (bench.clearings, bench.servers.active) == (0, False)
    for _ in range(2):
        assert (await bench.round()).status == "True"
    assert (bench.clearings, bench.servers.active) == (1, True)
    await bench.round(Config(kube_proxy_state="Running"))
    await bench.round()
    assert bench.clearings == 2


async def test_a_node_that_keeps_it_by_label_keeps_its_rules_and_ports(bench):
    bench.sync.configure(GONE)
    await bench.sync.reconcile()
    assert bench.clearings == 0, "nothing is known of the node yet"
    bench.label(kube_proxy="true")
    bench.view.apply(Synced(Kind.NODE))
    condition = await bench.round()
    assert (condition.status, condition.reason) == ("False", "NotCleared")
    assert "bpfdataplane.io/kube-proxy=true" in condition.message
    assert (bench.clearings, bench.servers.active) == (0, False)
    bench.label()
    assert (await bench.round()).status == "True"
    assert (bench.clearings, bench.servers.active) == (1, True)


@pytest.mark.parametrize(
    ("taint", "deletion", "eligible"),
    [
        ("other", None, True),
        ("ToBeDeletedByClusterAutoscaler", None, False),
        ("other", "2026-01-01T00:00:00Z", False),
    ],
)
async def test_load_balancers_leave_a_node_that_is_going(bench, taint, deletion, eligible):
    found = node()
    metadata = msgspec.structs.replace(found.metadata, deletion_timestamp=deletion)
    spec = NodeSpec(taints=(Taint(key=taint),))
    bench.view.apply(added(msgspec.structs.replace(found, metadata=metadata, spec=spec)))
    bench.view.apply(Synced(Kind.NODE))
    await bench.round()
    assert bench.health.node_eligible is eligible

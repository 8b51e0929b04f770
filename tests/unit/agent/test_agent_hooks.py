# SPDX-License-Identifier: Apache-2.0
"""The hooks concern: what it leaves attached when something goes wrong."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from bpfdp_agent.bpf.errors import AttachFailed
from bpfdp_agent.config import Config
from bpfdp_agent.dataplane.attach import Attachment, Hook
from bpfdp_agent.layouts import FAMILIES
from bpfdp_agent.reconcile import hooks
from bpfdp_agent.serve.metrics import Metrics
from bpfdp_agent.serve.nodestatus import NodeStatus

LO = 1


class Hooks(set[Attachment]):
    """What is attached, by the kind of attacher that asks; `failing`: no program can be."""

    failing = False
    kind = ""

    def attacher(self, kind, _pins):
        self.kind = kind
        return self

    def remove_stale(self):
        return []

    async def attached(self):
        return sorted(self)

    async def attach(self, hook, ifindex, family, program):
        if self.failing:
            raise AttachFailed("no")
        self.add(Attachment(hook, ifindex, family, self.kind, program))

    async def remove_other_kind(self):
        for each in [each for each in self if each.kind != self.kind]:
            self.remove(each)

    def cgroup_attached(self):
        return {}


@pytest.fixture
def there(monkeypatch) -> Hooks:
    made = Hooks()
    monkeypatch.setattr(hooks, "Attacher", made.attacher)
    return made


def sync() -> hooks.HookSync:
    program = SimpleNamespace(id=7, descriptor=7)
    found = hooks.HookSync(
        SimpleNamespace(
            features=frozenset({"tcx", "clsact"}),
            status=NodeStatus("1", "6.18"),
            metrics=Metrics(),
        ),
        SimpleNamespace(pins=None, maps=SimpleNamespace(carry_over=lambda: 0)),
        SimpleNamespace(hook=lambda _hook, _family: program, cgroup=dict, current=True),
        SimpleNamespace(devices=(), tunnel_ifindex=0),
        SimpleNamespace(attachable={LO}),
        lambda: None,
    )
    found.may_attach = True
    return found


async def test_another_attach_type_takes_the_old_one_off_only_where_it_worked(there):
    agent = sync()
    agent.configure(Config(attach_type="TC"))
    await agent.reconcile()
    old = {(hook, family) for hook in (Hook.FROM_POD, Hook.TO_POD) for family in FAMILIES}
    there.failing = True
    agent.configure(Config(attach_type="TCX"))
    with pytest.raises(AttachFailed):
        await agent.reconcile()
    assert {(a.hook, a.family) for a in there} == old
    there.failing = False
    await agent.reconcile()
    assert {a.kind for a in there} == {"TCX"}

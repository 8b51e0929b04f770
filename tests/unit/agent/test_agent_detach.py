# SPDX-License-Identifier: Apache-2.0
"""What the agent makes of a config that says Detach, and then Attach again."""

from __future__ import annotations

from typing import ClassVar

import pytest
from bpfdp_agent import agent
from bpfdp_agent.bpf.errors import BpfError
from bpfdp_agent.config import Config, ProcessSettings
from bpfdp_agent.dataplane import cleanup


class FakeSession:
    """Is in `running` from start to stop."""

    running: ClassVar[list[FakeSession]] = []

    def __init__(self, _around, _health, config) -> None:
        self.stopped = False
        self.map_sizes = config.map_sizes

    async def start(self):
        self.running.append(self)

    def configure(self, config):
        pass

    async def stop(self):
        self.stopped = True
        self.running.remove(self)


async def test_attach_after_a_detach_that_failed_begins_anew(monkeypatch):
    removed = cleanup.Removed(failures=["a pin is busy"])

    async def clean():
        return removed

    monkeypatch.setattr(agent, "Session", FakeSession)
    monkeypatch.setattr(cleanup, "clean", clean)
    made = agent.Agent(ProcessSettings("node1"), None)
    made._supported = True
    attach, leave = Config(), Config(detach=True, kube_proxy_state="Disabled")

    async def follow(config):
        made._config = config
        await made._follow_config()

    await follow(attach)
    with pytest.raises(BpfError, match="a pin is busy"):
        await follow(leave)
    assert FakeSession.running == []
    await follow(attach)
    assert len(FakeSession.running) == 1
    removed.failures.clear()
    await follow(leave)
    assert FakeSession.running == []
    assert made._around.status.get("Attached").reason == "Detached"


async def test_other_map_sizes_begin_another_session(monkeypatch):
    monkeypatch.setattr(agent, "Session", FakeSession)
    monkeypatch.setattr(FakeSession, "running", [])
    made = agent.Agent(ProcessSettings("node1"), None)
    made._supported = True

    async def follow(size: int) -> FakeSession:
        made._config = Config(map_sizes=(("backends", size),))
        await made._follow_config()
        (running,) = FakeSession.running
        return running

    first = await follow(1024)
    assert await follow(1024) is first
    grown = await follow(2048)
    assert (grown.map_sizes, first.stopped) == ((("backends", 2048),), True)

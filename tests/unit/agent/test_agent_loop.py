# SPDX-License-Identifier: Apache-2.0
"""A concern's loop: what arrives while it works is one more round; failures back off and heal."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from bpfdp_agent.bpf.errors import BpfError
from bpfdp_agent.config import Config
from bpfdp_agent.reconcile.loop import WELL_AFTER, Loop, keep_running
from bpfdp_agent.reconcile.session import Session
from bpfdp_agent.serve.metrics import Metrics

pytestmark = pytest.mark.looptime


class Work:
    """Counts its rounds; the first `failures` of them fail."""

    def __init__(self, error: Exception | None = None, failures: int = 0) -> None:
        self.error, self.failures = error, failures
        self.rounds: list[float] = []

    async def __call__(self) -> int:
        self.rounds.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0.1)
        if self.failures:
            self.failures -= 1
            raise self.error
        return 3


def loop_of(work, heard):
    return Loop("x", work, Metrics(), lambda name, error: heard.append(error))


async def test_many_wakes_during_a_round_are_one_more_round():
    work = Work()
    loop = loop_of(work, [])
    task = asyncio.create_task(loop.run())
    loop.wake()
    await asyncio.sleep(0.05)
    for _ in range(50):
        loop.wake()
    await asyncio.sleep(5)
    assert len(work.rounds) == 2
    task.cancel()


@pytest.mark.parametrize("error", [BpfError("no"), OSError("no"), KeyError("a bug")])
async def test_failures_are_told_and_retried_with_growing_pauses(error):
    work, heard = Work(error, failures=4), []
    loop = loop_of(work, heard)
    task = asyncio.create_task(loop.run())
    loop.wake()
    await asyncio.sleep(60)
    gaps = [round(b - a) for a, b in zip(work.rounds, work.rounds[1:], strict=False)]
    assert gaps == [1, 2, 4, 8]
    assert heard == [error] * 4 + [None]
    task.cancel()


async def test_a_wake_after_a_failure_tries_at_once():
    work = Work(BpfError("no"), failures=1)
    loop = loop_of(work, [])
    task = asyncio.create_task(loop.run())
    loop.wake()
    await asyncio.sleep(0.2)
    loop.wake()
    await asyncio.sleep(0.2)
    assert len(work.rounds) == 2
    task.cancel()


class Endless:
    """Work that fails at each of its first `failures` starts and then runs on."""

    def __init__(self, error: Exception, failures: int) -> None:
        self.error, self.failures = error, failures
        self.running = False

    async def __call__(self) -> None:
        await asyncio.sleep(0.1)
        if self.failures:
            self.failures -= 1
            raise self.error
        self.running = True
        await asyncio.Event().wait()


@pytest.mark.parametrize("error", [BpfError("no"), OSError("no"), RuntimeError("a bug")])
async def test_work_without_an_end_begins_again_and_is_well_after_a_while(error):
    work, heard = Endless(error, failures=3), []
    task = asyncio.create_task(
        keep_running("x", work, lambda name, error: heard.append((name, error)))
    )
    await asyncio.sleep(10)
    assert work.running
    assert heard == [("x", error)] * 3
    await asyncio.sleep(WELL_AFTER)
    assert heard == [("x", error)] * 3 + [("x", None)]
    task.cancel()


async def test_nothing_of_a_session_dies_without_a_word(tmp_path, monkeypatch):
    told = {}

    def broken(*_):
        raise RuntimeError("can't start new thread")

    async def idle():
        return 0

    around = SimpleNamespace(
        settings=SimpleNamespace(state_dir=tmp_path),
        metrics=Metrics(),
        report=told.setdefault,
    )
    session = Session(around, None, Config())
    monkeypatch.setattr(session._kernel.maps, "open", lambda: None)
    monkeypatch.setattr(session, "_nothing_yet", lambda: None)
    for part in ("programs", "services", "node", "pods", "policies", "hooks", "kube_proxy"):
        monkeypatch.setattr(getattr(session, f"_{part}"), "reconcile", idle)
    for part in (session._pods, session._node):
        monkeypatch.setattr(part, "follow", broken)
    monkeypatch.setattr(session._policies, "free_unused", broken)
    monkeypatch.setattr(session._connections, "run", broken)
    await session.start()
    await asyncio.sleep(0.1)
    background = {"pods found", "links", "unused policies", "connections"}
    assert {name for name, error in told.items() if error} == background
    assert not [task for task in session._tasks.values() if task.done()]
    await session.stop()

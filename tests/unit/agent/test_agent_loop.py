# SPDX-License-Identifier: Apache-2.0
"""A concern's loop: what arrives while it works is one more round; failures back off and heal."""

from __future__ import annotations

import asyncio

import pytest
from bpfdp_agent.bpf.errors import BpfError
from bpfdp_agent.reconcile.loop import Loop
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

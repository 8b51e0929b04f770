# SPDX-License-Identifier: Apache-2.0
"""The loop answers events, never stops for an error, and its health does not need the API server."""

from __future__ import annotations

import asyncio
import logging

import pytest
from bpfdp_operator import loop as module
from bpfdp_operator.connection import ApiError
from bpfdp_operator.logs import KeyValueFormatter
from bpfdp_operator.loop import BACKSTOP_SECONDS, Reconciler
from unit.control.fakecluster import DEPLOYMENT

pytestmark = pytest.mark.looptime


class NoConnection:
    async def __aenter__(self) -> NoConnection:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None


class Counting(Reconciler):
    """Passes are noted instead of done; `fail` makes the next ones fail."""

    def __init__(self) -> None:
        super().__init__(DEPLOYMENT)
        self.passes: list[float] = []
        self.fail: list[Exception] = []

    async def _pass(self, *_: object) -> None:
        self._woken.clear()
        self.passes.append(asyncio.get_running_loop().time())
        if self.fail:
            raise self.fail.pop(0)


@pytest.fixture
async def reconciler(monkeypatch: pytest.MonkeyPatch) -> Counting:
    monkeypatch.setattr(module, "Connection", NoConnection)
    return Counting()


async def run_for(reconciler: Counting, seconds: float) -> list[float]:
    task = asyncio.create_task(reconciler.run())
    await asyncio.sleep(seconds)
    task.cancel()
    start = reconciler.passes[0]
    return [round(at - start, 1) for at in reconciler.passes]


async def test_the_clock_wakes_it(reconciler: Counting) -> None:
    assert await run_for(reconciler, 70) == [0, BACKSTOP_SECONDS, 2 * BACKSTOP_SECONDS]


async def test_a_burst_of_events_is_one_pass(reconciler: Counting) -> None:
    async def events() -> None:
        await asyncio.sleep(5)
        for _ in range(100):
            reconciler.wake()
            await asyncio.sleep(0.001)

    burst = asyncio.create_task(events())
    assert len(await run_for(reconciler, 20)) == 2
    await burst


async def test_failures_are_retried_ever_more_rarely(
    reconciler: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    reconciler.fail = [OSError("no route"), ApiError(500, "GET", "/x", "down"), ValueError("bug")]
    assert (await run_for(reconciler, 20))[:4] == [0, 2, 6, 14]
    assert [r.exc_info is not None for r in caplog.records] == [False, False, True]


async def test_someone_elses_write_is_no_failure(
    reconciler: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    reconciler.fail = [ApiError(409, "PATCH", "/x", "conflict")]
    with caplog.at_level(logging.INFO):
        assert (await run_for(reconciler, 5))[:2] == [0, 2]
    assert caplog.records[0].levelname == "INFO"


def test_a_log_line_is_key_value() -> None:
    record = logging.makeLogRecord(
        {"name": "bpfdp.x", "levelname": "INFO", "msg": 'it "works"', "node": "n1", "why": ""}
    )
    line = KeyValueFormatter().format(record)
    assert line.endswith('level=info logger=bpfdp.x msg="it \\"works\\"" node=n1 why=""')

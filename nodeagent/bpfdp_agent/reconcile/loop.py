# SPDX-License-Identifier: Apache-2.0
"""What runs on and on: a concern's loop, which works when woken, and work without an end.

What fails is told and tried again, so that one concern's error does not take the others down.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from bpfdp_agent.bpf.errors import BpfError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from bpfdp_agent.serve.metrics import Metrics

log = logging.getLogger(__name__)

FIRST_RETRY = 1.0
LAST_RETRY = 60.0
WELL_AFTER = 30.0
"""Work without an end is well again when it has run for this time; its passes are shorter."""


class Loop:
    """Calls `work` (→ number of map operations) after each `wake`.

    What arrives while it works is one more round, not one per event. `report` hears how each round
    went: None, or the error of the kernel or the API server. After an error the round is repeated
    with growing pauses (a wake in between tries at once). Any other error is a bug: logged with its
    trace, and retried likewise, so that one concern's bug does not take the others down.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[], Awaitable[int]],
        metrics: Metrics,
        report: Callable[[str, Exception | None], None],
    ) -> None:
        self.name = name
        self._work = work
        self._metrics = metrics
        self._report = report
        self._woken = asyncio.Event()
        self._pause = FIRST_RETRY

    def wake(self) -> None:
        """There is something to do."""
        self._woken.set()

    async def run(self) -> None:
        """Work when woken, until cancelled."""
        while True:
            await self._woken.wait()
            self._woken.clear()
            if not await self._round():
                await self._wait_before_retry()

    async def _round(self) -> bool:
        started = time.monotonic()
        try:
            operations = await self._work()
        except Exception as error:
            _log_bug(self.name, error)
            self._metrics.reconcile_errors.labels(self.name).inc()
            self._report(self.name, error)
            return False
        elapsed = time.monotonic() - started
        self._pause = FIRST_RETRY
        self._report(self.name, None)
        self._metrics.reconcile_seconds.labels(self.name).observe(elapsed)
        self._metrics.map_operations.labels(self.name).inc(operations)
        self._metrics.last_operations.labels(self.name).set(operations)
        self._metrics.last_sync.labels(self.name).set_to_current_time()
        if operations:
            log.debug("%s: %d map operations in %.1f ms", self.name, operations, elapsed * 1000)
        return True

    async def _wait_before_retry(self) -> None:
        try:
            await asyncio.wait_for(self._woken.wait(), self._pause)
        except TimeoutError:
            self._woken.set()
        self._pause = min(self._pause * 2, LAST_RETRY)


async def keep_running(
    name: str,
    work: Callable[[], Awaitable[None]],
    report: Callable[[str, Exception | None], None],
) -> None:
    """Do work that ends only by an error, again after each, until cancelled.

    `report` hears the error, and None once the work has gone well for WELL_AFTER.
    """
    while True:
        well = asyncio.get_running_loop().call_later(WELL_AFTER, report, name, None)
        try:
            await work()
        except Exception as error:
            _log_bug(name, error)
            report(name, error)
        finally:
            well.cancel()
        await asyncio.sleep(FIRST_RETRY)


def _log_bug(name: str, error: Exception) -> None:
    """The trace of what is no error of the kernel's or the API server's."""
    if not isinstance(error, (BpfError, OSError)):
        log.error("%s: bug", name, exc_info=error)

# SPDX-License-Identifier: Apache-2.0
"""The reconcile loop: woken by handlers, or by the clock; read, plan, write the status, act."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from bpfdp_operator import observe
from bpfdp_operator.apply import Applier
from bpfdp_operator.conditions import status_of
from bpfdp_operator.connection import ApiError, Connection
from bpfdp_operator.plan import ApplyAgent, plan
from bpfdp_operator.store import Store
from bpfdp_operator.world import CONFIG_NAME, Config, Deployment, Memory

if TYPE_CHECKING:
    from bpfdp_operator.plan import Action, Plan

log = logging.getLogger("bpfdp.loop")

BACKSTOP_SECONDS = 30.0
MOVING_SECONDS = 2.0
"""While something is under way, pods are looked at this often: they are not watched."""
SETTLE_SECONDS = 0.3
"""Events come in bursts: wait this long after the first, so that one pass answers many."""
STUCK_SECONDS = 300.0
CONFLICT = 409
REFUSALS = (400, 403, 422)


class Reconciler:
    """One per process. Handlers put objects into `store` and call `wake`."""

    def __init__(
        self, deployment: Deployment, *, refresh_seconds: float = BACKSTOP_SECONDS
    ) -> None:
        self.store = Store()
        self.memory = Memory()
        self._deployment = deployment
        self._woken = asyncio.Event()
        self._beat = time.monotonic()
        self._refresh_seconds = refresh_seconds
        self._last_refresh: float | None = None
        self._last_listing: float | None = None
        self._moving = False

    def wake(self) -> None:
        """Ask for a pass soon."""
        self._woken.set()

    @property
    def age(self) -> float:
        """Seconds since the loop last got round, whether its pass succeeded or not."""
        return time.monotonic() - self._beat

    async def run(self) -> None:
        """Reconcile until cancelled."""
        failures = 0
        async with Connection() as connection:
            applier = Applier(connection, self.store, self._deployment, self.memory)
            while True:
                self._beat = time.monotonic()
                try:
                    await self._pass(connection, applier)
                    failures = 0
                except Exception as error:
                    failures = self._failed(error, failures)
                await self._rest(min(BACKSTOP_SECONDS, 2.0**failures) if failures else None)

    @property
    def config_gone(self) -> bool:
        """Whether the config was not there at the last pass."""
        return self._last_refresh is not None and self.store.get(Config, CONFIG_NAME) is None

    def _failed(self, error: Exception, failures: int) -> int:
        """Log a failed pass, with its trace where it is neither the network nor the API server."""
        self._last_refresh = self._last_listing = None
        known = isinstance(error, ApiError | OSError | TimeoutError)
        if isinstance(error, ApiError) and error.status == CONFLICT:
            log.info("someone else wrote first; trying again", extra={"error": str(error)})
            return max(failures, 1)
        text = str(error) or type(error).__name__
        log.warning("a pass failed", extra={"error": text}, exc_info=None if known else error)
        return min(failures + 1, 5)

    async def _rest(self, pause: float | None) -> None:
        """Sleep until woken, at most until the backstop; after a failure for `pause` seconds."""
        if pause is not None:
            await asyncio.sleep(pause)
            return
        try:
            longest = MOVING_SECONDS if self._moving else BACKSTOP_SECONDS
            await asyncio.wait_for(self._woken.wait(), longest)
        except TimeoutError:
            return
        await asyncio.sleep(SETTLE_SECONDS)

    async def _pass(self, connection: Connection, applier: Applier) -> None:
        self._woken.clear()
        now = time.time()
        started = time.monotonic()
        due = self._last_refresh is None or started - self._last_refresh >= self._refresh_seconds
        if due:
            await self._refresh(connection, started)
        world = await observe.read(
            connection, self.store, self._deployment, self.memory, now, resync=due
        )
        config = world.config
        if config is None:
            self._moving = False
            return
        decided = plan(world, config)
        self._moving = decided.step.moving
        changed = await applier.write_status(config, status_of(world, config, decided), now)
        if self.store.get(Config, config.metadata.name) is None:
            return
        await self._act(applier, decided, config, now)
        if changed or any(_announced(action) for action in decided.actions):
            self.wake()

    async def _refresh(self, connection: Connection, started: float) -> None:
        """Read again what a broken watch may have missed; the long lists ten times more rarely."""
        listed = self._last_listing
        if listed is None or started - listed >= 10 * self._refresh_seconds:
            await observe.refresh_nodes(connection, self.store)
            self._last_listing = started
        await observe.refresh(connection, self.store, self._deployment)
        self._last_refresh = started

    async def _act(self, applier: Applier, decided: Plan, config: Config, now: float) -> None:
        """Carry out the actions; a refusal is remembered, to be shown in the status."""
        try:
            for action in decided.actions:
                await applier.carry_out(action, config, now)
        except ApiError as error:
            if error.status in REFUSALS:
                self.memory.refusal = str(error)
            raise
        self.memory.refusal = ""


def _announced(action: Action) -> bool:
    """Whether another pass should look at the result soon; re-applying what is there is quiet."""
    return not isinstance(action, ApplyAgent) or bool(action.announced)

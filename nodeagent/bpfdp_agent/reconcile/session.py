# SPDX-License-Identifier: Apache-2.0
"""What runs while the dataplane is on this node: maps, programs, and a loop per concern.

A Session begins with what an earlier agent left in the kernel and ends (`stop`) without removing
anything; `detach` removes everything.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from bpfdp_agent.dataplane.maps import MapStore
from bpfdp_agent.dataplane.pins import Pins
from bpfdp_agent.reconcile.loop import Loop
from bpfdp_agent.reconcile.services import ServiceSync

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from bpfdp_agent.config import Config
    from bpfdp_agent.model.cluster import Changes
    from bpfdp_agent.reconcile.surroundings import Surroundings
    from bpfdp_agent.serve.health import Health

log = logging.getLogger(__name__)


class Session:
    """One attachment of this node."""

    def __init__(self, around: Surroundings, health: Health) -> None:
        self._around = around
        self._health = health
        self._pins = Pins()
        self._maps: MapStore | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._loops: dict[str, Loop] = {}

    async def start(self, config: Config) -> None:
        """Open maps and begin the loops. Raises BpfError; call `stop` then."""
        self._maps = MapStore(self._pins, sizes=dict(config.map_sizes))
        self._maps.open()
        self._services = ServiceSync(self._around, self._maps, self._settled)
        self._loop("services", self._services.reconcile)

    def _loop(self, name: str, work: Callable[[], Awaitable[int]]) -> None:
        loop = Loop(name, work, self._around.metrics, self._around.report)
        self._loops[name] = loop
        loop.wake()
        self._tasks.append(asyncio.create_task(loop.run(), name=name))

    async def configure(self, config: Config) -> int:
        """Follow the config at run time."""
        return 0

    def changed(self, changes: Changes) -> None:
        """Tell each concern what of the view is its own."""
        if changes.services:
            self._services.changed(changes.services)
            self._loops["services"].wake()

    def wake_all(self) -> None:
        """A list is complete."""
        for loop in self._loops.values():
            loop.wake()

    def _settled(self) -> None: ...

    async def stop(self) -> None:
        """End the loops; the kernel keeps everything."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        if self._maps is not None:
            self._maps.close()

    async def detach(self, config: Config) -> int:
        await self.stop()
        return 0

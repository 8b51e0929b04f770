# SPDX-License-Identifier: Apache-2.0
"""The kubelet's probes, on 127.0.0.1 only.

/livez   200 while the event loop answers. It never depends on the API server: an agent cut off
         from it must not be restarted for that.
/readyz  200 once there is nothing left to do: attached and first sync done, or detached because
         the operator said so, or the node lacks a kernel feature. The last two are not failures
         of the pod (a rollout must go on past such a node); BpfNode's conditions tell them apart.
"""

from __future__ import annotations

import logging

from aiohttp import web

log = logging.getLogger(__name__)


class Health:
    """What /readyz answers: the reason why not, or an empty string for ready."""

    def __init__(self) -> None:
        self.not_ready = "starting"


class HealthServer:
    """Serves the probes."""

    def __init__(self, health: Health, port: int, host: str = "127.0.0.1") -> None:
        self._health = health
        self._host = host
        self._port = port
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen; raises OSError when the port is taken."""
        app = web.Application()
        app.add_routes(
            [
                web.get("/livez", self._livez),
                web.get("/readyz", self._readyz),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()

    async def stop(self) -> None:
        """Stop listening."""
        if self._runner:
            await self._runner.cleanup()

    async def _livez(self, _request: web.Request) -> web.Response:
        return _answer("")

    async def _readyz(self, _request: web.Request) -> web.Response:
        return _answer(self._health.not_ready)


def _answer(problem: str) -> web.Response:
    return web.Response(status=503 if problem else 200, text=f"{problem or 'ok'}\n")

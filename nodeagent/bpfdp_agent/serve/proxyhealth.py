# SPDX-License-Identifier: Apache-2.0
"""The health answers that load balancers and cloud controllers ask kube-proxy for.

:10256 /healthz and /livez, and one server per healthCheckNodePort (type LoadBalancer with
externalTrafficPolicy: Local). Bodies and headers are kube-proxy's (services-contract 1.6). They
are served only while kube-proxy is gone (`active`), so that it finds its ports free on its way
back; a port that its last pod still holds is retried quietly.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from bpfdp_agent.serve.metrics import any_address_socket

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

log = logging.getLogger(__name__)

RETRY = 5.0
TO_BE_DELETED_TAINT = "ToBeDeletedByClusterAutoscaler"


class ServiceHealth(msgspec.Struct, frozen=True):
    """One healthCheckNodePort: `local_endpoints` counts distinct local Ready addresses."""

    port: int
    namespace: str
    name: str
    local_endpoints: int


class ProxyHealth:
    """What is answered."""

    def __init__(self) -> None:
        self.synced = False
        self.node_eligible = True
        self._last_updated = datetime.datetime.fromtimestamp(0, datetime.UTC)
        self._services: dict[int, ServiceHealth] = {}

    @property
    def services(self) -> dict[int, ServiceHealth]:
        """Services by healthCheckNodePort."""
        return self._services

    def set_services(self, services: Iterable[ServiceHealth]) -> None:
        """Replace the services that want a health check port."""
        self._services = {s.port: s for s in services}

    def updated(self) -> None:
        """The service tables are equal to what the API server says as of now."""
        self.synced = True
        self._last_updated = datetime.datetime.now(datetime.UTC)

    def node_answer(self, *, with_node: bool) -> web.Response:
        """`/healthz` (with_node) or `/livez`."""
        healthy = self.synced and (self.node_eligible or not with_node)
        body = {
            "lastUpdated": str(self._last_updated),
            "currentTime": str(datetime.datetime.now(datetime.UTC)),
            "nodeEligible": self.node_eligible,
        }
        return _json(200 if healthy else 503, body)

    def service_answer(self, port: int) -> web.Response:
        """The answer on one healthCheckNodePort."""
        service = self._services.get(port)
        if service is None:
            return _json(503, {})
        healthy = self.synced and self.node_eligible
        body = {
            "service": {"namespace": service.namespace, "name": service.name},
            "localEndpoints": service.local_endpoints,
            "serviceProxyHealthy": healthy,
        }
        answer = _json(200 if healthy and service.local_endpoints else 503, body)
        answer.headers["X-Load-Balancing-Endpoint-Weight"] = str(service.local_endpoints)
        return answer


def _json(status: int, body: object) -> web.Response:
    return web.Response(
        status=status,
        body=msgspec.json.encode(body),
        headers={"Content-Type": "application/json", "X-Content-Type-Options": "nosniff"},
    )


class ProxyHealthServers:
    """Keeps one listener per port that should answer."""

    def __init__(
        self, health: ProxyHealth, bind_failed: Callable[[ServiceHealth, OSError], None]
    ) -> None:
        self._health = health
        self._bind_failed = bind_failed
        self._runners: dict[int, web.AppRunner] = {}
        self.active = False
        self.healthz_port = 10256
        self.wake = asyncio.Event()

    async def run(self) -> None:
        """Open and close listeners as wanted until cancelled; then close all."""
        try:
            while True:
                self.wake.clear()
                await self._sync()
                try:
                    await asyncio.wait_for(self.wake.wait(), RETRY)
                except TimeoutError:
                    continue
        finally:
            await self.close()

    async def close(self) -> None:
        """Close every listener."""
        for port in list(self._runners):
            await self._runners.pop(port).cleanup()

    async def _sync(self) -> None:
        wanted = {*self._health.services, self.healthz_port} if self.active else set()
        for port in set(self._runners) - wanted:
            await self._runners.pop(port).cleanup()
        for port in wanted - set(self._runners):
            try:
                await self._listen(port)
            except OSError as error:
                self._not_bound(port, error)

    async def _listen(self, port: int) -> None:
        app = web.Application()
        if port == self.healthz_port:
            app.add_routes(
                [web.get("/healthz", self._node(True)), web.get("/livez", self._node(False))]
            )
        else:
            app.add_routes([web.get("/{path:.*}", self._service(port))])
        listening = any_address_socket(port)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.SockSite(runner, listening).start()
        self._runners[port] = runner

    def _node(self, with_node: bool) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def answer(_request: web.Request) -> web.StreamResponse:
            return self._health.node_answer(with_node=with_node)

        return answer

    def _service(self, port: int) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def answer(_request: web.Request) -> web.StreamResponse:
            return self._health.service_answer(port)

        return answer

    def _not_bound(self, port: int, error: OSError) -> None:
        log.debug(
            "port %d is held by another program (kube-proxy until it is removed): %s", port, error
        )
        service = self._health.services.get(port)
        if service is not None:
            self._bind_failed(service, error)

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
import functools
import logging
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from bpfdp_agent.layouts import FAMILIES
from bpfdp_agent.serve.metrics import any_address_socket
from bpfdp_agent.serve.proxymetrics import family_name

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from bpfdp_agent.serve.proxymetrics import ProxyMetrics

log = logging.getLogger(__name__)

RETRY = 5.0
TIMEOUT = datetime.timedelta(seconds=60)
"""How long an update may wait: twice kube-proxy's default sync period."""


class ServiceHealth(msgspec.Struct, frozen=True):
    """One healthCheckNodePort: `local_endpoints` counts distinct local Ready addresses."""

    port: int
    namespace: str
    name: str
    local_endpoints: int


class ProxyHealth:
    """What is answered. As with kube-proxy a family is well until an update has waited too long."""

    def __init__(self, metrics: ProxyMetrics) -> None:
        self.node_eligible = True
        self._metrics = metrics
        self._updated: dict[int, datetime.datetime] = {}
        self._waiting_since: dict[int, datetime.datetime] = {}
        self._services: dict[int, ServiceHealth] = {}

    @property
    def services(self) -> dict[int, ServiceHealth]:
        """Services by healthCheckNodePort."""
        return self._services

    def set_services(self, services: Iterable[ServiceHealth]) -> None:
        """Replace the services that want a health check port."""
        self._services = {s.port: s for s in services}

    def queued(self) -> None:
        """The service maps are behind what the API server says."""
        for family in FAMILIES:
            self._waiting_since.setdefault(family, _now())

    def updated(self, family: int) -> None:
        """A family's service maps are equal to what the API server says as of now."""
        self._waiting_since.pop(family, None)
        self._updated[family] = _now()

    def _late(self, family: int) -> bool:
        waiting = self._waiting_since.get(family)
        return waiting is not None and _now() - waiting >= TIMEOUT

    @property
    def healthy(self) -> bool:
        """No family has an update that waits too long."""
        return not any(self._late(family) for family in self._updated)

    def healthz(self) -> web.Response:
        """`/healthz`: the proxy, and whether load balancers should use this node."""
        answer = self._answer(self.healthy and self.node_eligible, nodeEligible=self.node_eligible)
        self._metrics.healthz.labels(str(answer.status)).inc()
        return answer

    def livez(self) -> web.Response:
        """`/livez`: the proxy alone."""
        answer = self._answer(self.healthy)
        self._metrics.livez.labels(str(answer.status)).inc()
        return answer

    def _answer(self, well: bool, **node: bool) -> web.Response:
        never = datetime.datetime.min.replace(tzinfo=datetime.UTC)
        last = _now() if well else max(self._updated.values(), default=never)
        status = {
            family_name(family): {
                "lastUpdated": _rfc3339(updated),
                "healthy": not self._late(family),
            }
            for family, updated in sorted(self._updated.items())
        }
        body = {
            "lastUpdated": _rfc3339(last),
            "currentTime": _rfc3339(_now()),
            **node,
            "healthy": self.healthy,
        }
        return _json(200 if well else 503, body | ({"status": status} if status else {}))

    def service_answer(self, port: int) -> web.Response:
        """The answer on one healthCheckNodePort."""
        service = self._services.get(port)
        if service is None:
            return _json(503, {})
        healthy = self.healthy
        body = {
            "service": {"namespace": service.namespace, "name": service.name},
            "localEndpoints": service.local_endpoints,
            "serviceProxyHealthy": healthy,
        }
        answer = _json(200 if healthy and service.local_endpoints else 503, body)
        answer.headers["X-Load-Balancing-Endpoint-Weight"] = str(service.local_endpoints)
        return answer


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _rfc3339(moment: datetime.datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


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
                [
                    web.get("/healthz", _handler(self._health.healthz)),
                    web.get("/livez", _handler(self._health.livez)),
                ]
            )
        else:
            answer = functools.partial(self._health.service_answer, port)
            app.add_routes([web.get("/{path:.*}", _handler(answer))])
        listening = any_address_socket(port)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.SockSite(runner, listening).start()
        self._runners[port] = runner

    def _not_bound(self, port: int, error: OSError) -> None:
        log.debug(
            "port %d is held by another program (kube-proxy until it is removed): %s", port, error
        )
        service = self._health.services.get(port)
        if service is not None:
            self._bind_failed(service, error)


def _handler(
    answer: Callable[[], web.Response],
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(_request: web.Request) -> web.StreamResponse:
        return answer()

    return handle

# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics, and the server that gives them out on every address of the node."""

from __future__ import annotations

import socket

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from bpfdp_agent.serve.proxymetrics import ProxyMetrics

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)


class Metrics:
    """The agent's metrics: names start with bpfdp_, kube-proxy's own (`proxy`) with kubeproxy_."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        reg = self.registry
        self.proxy = ProxyMetrics(reg)
        self.build = Info("bpfdp_build", "Version of the agent.", registry=reg)
        self.reconcile_seconds = Histogram(
            "bpfdp_reconcile_duration_seconds",
            "Time to bring the kernel to the desired state, by concern.",
            ["concern"],
            registry=reg,
            buckets=SECONDS,
        )
        self.reconcile_errors = Counter(
            "bpfdp_reconcile_errors",
            "Reconciles that failed and are retried.",
            ["concern"],
            registry=reg,
        )
        self.map_operations = Counter(
            "bpfdp_map_operations", "Map entries written or deleted.", ["concern"], registry=reg
        )
        self.last_operations = Gauge(
            "bpfdp_last_reconcile_map_operations",
            "Map entries that the last reconcile wrote or deleted.",
            ["concern"],
            registry=reg,
        )
        self.map_entries = Gauge("bpfdp_map_entries", "Entries in use.", ["map"], registry=reg)
        self.map_max_entries = Gauge(
            "bpfdp_map_max_entries", "Entries a map can hold.", ["map"], registry=reg
        )
        self.objects = Gauge(
            "bpfdp_objects", "Objects known from the API server.", ["kind"], registry=reg
        )
        self.invalid_objects = Counter(
            "bpfdp_invalid_objects", "Objects that could not be used.", ["kind"], registry=reg
        )
        self.programs = Gauge(
            "bpfdp_programs_attached", "Hooks with a program of ours.", registry=reg
        )
        self.compile_seconds = Histogram(
            "bpfdp_compile_duration_seconds",
            "Time to get a program loaded (compiled or from the cache).",
            registry=reg,
            buckets=SECONDS,
        )
        self.program_errors = Counter(
            "bpfdp_program_errors",
            "Programs that did not compile or load.",
            ["reason"],
            registry=reg,
        )
        self.conntrack_entries = Gauge(
            "bpfdp_conntrack_entries", "Connection entries.", ["family"], registry=reg
        )
        self.conntrack_removed = Counter(
            "bpfdp_conntrack_removed", "Connection entries removed.", ["cause"], registry=reg
        )
        self.last_sync = Gauge(
            "bpfdp_last_sync_timestamp_seconds",
            "When a concern was last in sync.",
            ["concern"],
            registry=reg,
        )

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)


class MetricsServer:
    """Serves /metrics on all addresses, both families where the node has IPv6."""

    def __init__(self, metrics: Metrics, port: int) -> None:
        self._metrics = metrics
        self._port = port
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen; raises OSError when the port is taken."""
        app = web.Application()
        app.add_routes([web.get("/metrics", self._get)])
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.SockSite(self._runner, any_address_socket(self._port)).start()

    async def stop(self) -> None:
        """Stop listening."""
        if self._runner:
            await self._runner.cleanup()

    async def _get(self, _request: web.Request) -> web.Response:
        return web.Response(
            body=self._metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )


def any_address_socket(port: int) -> socket.socket:
    """A listening TCP socket on every address of the node; raises OSError when the port is held."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("0.0.0.0", port))  # noqa: S104 - a host port, as documented

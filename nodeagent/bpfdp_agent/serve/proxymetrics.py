# SPDX-License-Identifier: Apache-2.0
"""kube-proxy's metrics under kube-proxy's names, so that dashboards and alerts go on working.

Names, labels and buckets are those of pkg/proxy/metrics (Kubernetes 1.36), for what a proxy does
whatever it is made of; those about iptables or nftables rules have no counterpart.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge, Histogram

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

SYNC_SECONDS = tuple(0.001 * 2**i for i in range(15))
PROGRAMMING_SECONDS = (
    *(0.25, 0.5),
    *(float(s) for s in range(1, 60)),
    *(float(s) for s in range(60, 120, 5)),
    *(float(s) for s in range(120, 301, 30)),
)


def family_name(family: int) -> str:
    """The value of the label ip_family."""
    return f"IPv{family}"


class ProxyMetrics:
    """One per process; `sync_` metrics are by address family."""

    def __init__(self, registry: CollectorRegistry) -> None:
        sync = "kubeproxy_sync_proxy_rules"
        self._duration = Histogram(
            f"{sync}_duration_seconds",
            "Time to write what changed to the service maps.",
            ["ip_family"],
            registry=registry,
            buckets=SYNC_SECONDS,
        )
        self._last = Gauge(
            f"{sync}_last_timestamp_seconds",
            "When the service maps were last in sync.",
            ["ip_family"],
            registry=registry,
        )
        self._queued = Gauge(
            f"{sync}_last_queued_timestamp_seconds",
            "When a sync was last asked for.",
            ["ip_family"],
            registry=registry,
        )
        self.no_local_endpoints = Gauge(
            f"{sync}_no_local_endpoints_total",
            "Service ports with a Local traffic policy that have endpoints, but none on this node.",
            ["traffic_policy", "ip_family"],
            registry=registry,
        )
        self._pending = {
            kind: Gauge(
                f"{sync}_{kind}_changes_pending",
                f"{kind.capitalize()} changes that are not in the maps yet.",
                registry=registry,
            )
            for kind in ("service", "endpoint")
        }
        self._seen = {
            kind: Counter(
                f"{sync}_{kind}_changes_total", f"{kind.capitalize()} changes.", registry=registry
            )
            for kind in ("service", "endpoint")
        }
        self.programming = Histogram(
            "kubeproxy_network_programming_duration_seconds",
            "From the change of a pod or Service (last-change-trigger-time) to the maps.",
            ["ip_family"],
            registry=registry,
            buckets=PROGRAMMING_SECONDS,
        )
        self.healthz = Counter(
            "kubeproxy_proxy_healthz_total", "Answers of /healthz.", ["code"], registry=registry
        )
        self.livez = Counter(
            "kubeproxy_proxy_livez_total", "Answers of /livez.", ["code"], registry=registry
        )

    def queued(self, families: tuple[int, ...]) -> None:
        """Something changed that these families' maps depend on."""
        for family in families:
            self._queued.labels(family_name(family)).set_to_current_time()

    def changed(self, kind: str) -> None:
        """A Service ("service") or an EndpointSlice ("endpoint") changed."""
        self._seen[kind].inc()
        self._pending[kind].inc()

    def synced(self, family: int, started: float) -> None:
        """A family's maps are in sync; `started` by time.monotonic()."""
        self._duration.labels(family_name(family)).observe(time.monotonic() - started)
        self._last.labels(family_name(family)).set_to_current_time()

    def all_synced(self) -> None:
        """Nothing is pending."""
        for gauge in self._pending.values():
            gauge.set(0)

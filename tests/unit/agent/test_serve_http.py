# SPDX-License-Identifier: Apache-2.0
"""The HTTP answers: probes, kube-proxy's health pages, metrics; Events are not repeated."""

from __future__ import annotations

import asyncio
import datetime
import socket

import aiohttp
import msgspec
import pytest
from bpfdp_agent.serve import proxyhealth
from bpfdp_agent.serve.events import EventRecorder, ObjectRef
from bpfdp_agent.serve.health import Health, HealthServer
from bpfdp_agent.serve.metrics import Metrics, MetricsServer
from bpfdp_agent.serve.proxyhealth import ProxyHealth, ProxyHealthServers, ServiceHealth


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


async def get(port: int, path: str):
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}{path}") as answer,
    ):
        return answer.status, await answer.text(), answer.headers


async def test_ready_and_live_are_separate():
    health, port = Health(), free_port()
    server = HealthServer(health, port)
    await server.start()
    assert (await get(port, "/livez"))[0] == 200
    assert (await get(port, "/readyz"))[:2] == (503, "starting\n")
    health.not_ready = ""
    assert (await get(port, "/readyz"))[0] == 200
    await server.stop()


async def test_metrics_are_served():
    metrics, port = Metrics(), free_port()
    metrics.map_operations.labels("services").inc(10)
    server = MetricsServer(metrics, port)
    await server.start()
    _, text, _ = await get(port, "/metrics")
    assert 'bpfdp_map_operations_total{concern="services"} 10.0' in text
    await server.stop()


def proxy_health() -> ProxyHealth:
    return ProxyHealth(Metrics().proxy)


@pytest.mark.parametrize(
    ("endpoints", "late", "status"), [(2, False, 200), (0, False, 503), (2, True, 503)]
)
def test_health_check_node_port_answers_as_kube_proxy_does(monkeypatch, endpoints, late, status):
    health = proxy_health()
    health.updated(4)
    if late:
        health.queued()
        pass_seconds(monkeypatch, 61)
    health.node_eligible = False  # for this answer the node does not matter
    health.set_services([ServiceHealth(30001, "ns", "web", endpoints)])
    answer = health.service_answer(30001)
    assert answer.status == status
    assert answer.headers["X-Load-Balancing-Endpoint-Weight"] == str(endpoints)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert msgspec.json.decode(answer.body) == {
        "service": {"namespace": "ns", "name": "web"},
        "localEndpoints": endpoints,
        "serviceProxyHealthy": not late,
    }


def pass_seconds(monkeypatch, seconds: float) -> None:
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
    monkeypatch.setattr(proxyhealth, "_now", lambda: later)


def test_livez_ignores_the_node_and_healthz_does_not():
    health = proxy_health()
    health.updated(4)
    health.node_eligible = False
    assert health.healthz().status == 503
    assert health.livez().status == 200
    said = msgspec.json.decode(health.healthz().body)
    assert (said["nodeEligible"], said["healthy"], said["status"]["IPv4"]["healthy"]) == (
        False,
        True,
        True,
    )
    assert "nodeEligible" not in msgspec.json.decode(health.livez().body)


def test_an_update_that_waits_too_long_makes_its_family_unwell(monkeypatch):
    health = proxy_health()
    health.queued()  # before the first sync: starting up is well
    assert health.livez().status == 200
    health.updated(4)
    health.updated(6)
    health.queued()
    health.updated(6)
    assert health.livez().status == 200
    pass_seconds(monkeypatch, 61)
    assert health.livez().status == 503
    status = msgspec.json.decode(health.livez().body)["status"]
    assert (status["IPv4"]["healthy"], status["IPv6"]["healthy"]) == (False, True)


async def test_ports_are_taken_only_when_kube_proxy_is_gone_and_given_back():
    health, port, failures = proxy_health(), free_port(), []
    health.updated(4)
    servers = ProxyHealthServers(health, lambda s, e: failures.append(s))
    servers.healthz_port = port
    task = asyncio.create_task(servers.run())
    await asyncio.sleep(0.05)
    with pytest.raises(aiohttp.ClientError):
        await get(port, "/healthz")
    servers.active = True
    servers.wake.set()
    await asyncio.sleep(0.05)
    assert (await get(port, "/healthz"))[0] == 200
    servers.active = False
    servers.wake.set()
    await asyncio.sleep(0.05)
    with pytest.raises(aiohttp.ClientError):
        await get(port, "/healthz")
    task.cancel()


async def test_an_event_is_sent_once():
    sent = []

    class Client:
        async def request(self, method, path, **kwargs):
            sent.append((path, msgspec.json.decode(kwargs["body"])))
            return 201, b"{}"

    recorder = EventRecorder(Client(), "n1")
    task = asyncio.create_task(recorder.run())
    ref = ObjectRef("v1", "Service", "web", "shop")
    for _ in range(5):
        recorder.warning(ref, "InvalidObject", "bad port")
    await asyncio.sleep(0.01)
    task.cancel()
    assert len(sent) == 1
    assert sent[0][0] == "/api/v1/namespaces/shop/events"
    assert sent[0][1]["involvedObject"] == {
        "apiVersion": "v1",
        "kind": "Service",
        "name": "web",
        "namespace": "shop",
    }

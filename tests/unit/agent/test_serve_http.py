# SPDX-License-Identifier: Apache-2.0
"""The HTTP answers: probes, kube-proxy's health pages, metrics; Events are not repeated."""

from __future__ import annotations

import asyncio
import socket

import aiohttp
import msgspec
import pytest
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


@pytest.mark.parametrize(
    ("endpoints", "synced", "status"), [(2, True, 200), (0, True, 503), (2, False, 503)]
)
def test_health_check_node_port_answers_as_kube_proxy_does(endpoints, synced, status):
    health = ProxyHealth()
    if synced:
        health.updated()
    health.set_services([ServiceHealth(30001, "ns", "web", endpoints)])
    answer = health.service_answer(30001)
    assert answer.status == status
    assert answer.headers["X-Load-Balancing-Endpoint-Weight"] == str(endpoints)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert msgspec.json.decode(answer.body) == {
        "service": {"namespace": "ns", "name": "web"},
        "localEndpoints": endpoints,
        "serviceProxyHealthy": synced,
    }


def test_livez_ignores_the_node_and_healthz_does_not():
    health = ProxyHealth()
    health.updated()
    health.node_eligible = False
    assert health.node_answer(with_node=True).status == 503
    assert health.node_answer(with_node=False).status == 200


async def test_ports_are_taken_only_when_kube_proxy_is_gone_and_given_back():
    health, port, failures = ProxyHealth(), free_port(), []
    health.updated()
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

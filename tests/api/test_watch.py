# SPDX-License-Identifier: Apache-2.0
"""The agent's reflectors against a real API server: paths, selectors, fields, deletions."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from bpfdp_agent.model.addresses import packed
from bpfdp_agent.model.cluster import ClusterView
from bpfdp_agent.model.services import service_view
from bpfdp_agent.watch.connection import connect
from bpfdp_agent.watch.reflector import Reflector
from bpfdp_agent.watch.wire import RESOURCES, Kind, Malformed, ObjectKey, Synced


def meta(name, **more):
    return {"name": name, "namespace": "default", **more}


NODE = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {"name": "node1", "labels": {"topology.kubernetes.io/zone": "a"}},
}
POD = {
    "apiVersion": "v1", "kind": "Pod", "metadata": meta("a", labels={"app": "web"}),
    "spec": {"nodeName": "node1", "containers": [{"name": "c", "image": "i", "ports": [{"name": "http", "containerPort": 80}]}]},
}  # fmt: skip
SERVICE = {
    "apiVersion": "v1", "kind": "Service", "metadata": meta("web"),
    "spec": {"type": "NodePort", "ports": [{"name": "http", "port": 80, "targetPort": "http", "nodePort": 30080}], "sessionAffinity": "ClientIP"},
}  # fmt: skip
OTHER = {
    "apiVersion": "v1", "kind": "Service", "metadata": meta("other", labels={"service.kubernetes.io/service-proxy-name": "x"}),
    "spec": {"ports": [{"port": 80}]},
}  # fmt: skip
SLICE = {
    "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
    "metadata": meta("web-1", labels={"kubernetes.io/service-name": "web"}), "addressType": "IPv4",
    "endpoints": [{"addresses": ["10.0.0.1"], "nodeName": "node1", "conditions": {"ready": True}}],
    "ports": [{"name": "http", "port": 80, "protocol": "TCP"}],
}  # fmt: skip
POLICY = {
    "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": meta("deny"),
    "spec": {"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}]}]},
}  # fmt: skip
CONFIG = {
    "apiVersion": "bpfdataplane.io/v1alpha1",
    "kind": "BpfDataplaneConfig",
    "metadata": {"name": "default"},
    "spec": {},
}


@contextlib.asynccontextmanager
async def watching(kubeconfig):
    """A view that follows the API server, and a way to wait until it says something."""
    connection = await connect(str(kubeconfig))
    queue: asyncio.Queue = asyncio.Queue()
    tasks = [asyncio.create_task(Reflector(r, connection, queue).run()) for r in RESOURCES.values()]
    view = ClusterView("node1")

    async def until(condition):
        async with asyncio.timeout(20):
            while not condition():
                event = await queue.get()
                assert not isinstance(event, Malformed), event
                view.apply(event)

    try:
        yield view, until
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await connection.close()


async def test_the_view_follows_a_real_api_server(api):
    applied = api.apply(NODE, POD, SERVICE, OTHER, SLICE, POLICY)
    assert applied.returncode == 0, applied.stderr
    web = ObjectKey("default", "web")
    async with watching(api.kubeconfig) as (view, until):
        await until(lambda: view.synced(*RESOURCES))
        assert web in view.services
        assert ObjectKey("default", "other") not in view.services
        assert view.policies[ObjectKey("default", "deny")].spec.ingress[0].from_[
            0
        ].ip_block.except_ == ("10.1.0.0/16",)
        assert view.policies[ObjectKey("default", "deny")].spec.policy_types == ("Ingress",)
        assert "default" in view.namespaces
        assert view.nodes.zone == "a"
        (port,) = service_view(view.services[web], view.slices_of(web), 4, view.nodes).ports
        assert [f.port for f in port.frontends] == [80, 30080]
        assert (port.cluster[0].address, port.affinity_seconds) == (packed("10.0.0.1"), 10800)

        assert api.apply(CONFIG).returncode == 0
        await until(lambda: view.config is not None)
        assert view.config.status.agents.mode == "Attach"

        status = {
            "phase": "Running",
            "podIP": "10.0.0.1",
            "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}],
        }
        patched = api.kubectl(
            "patch",
            "pod",
            "a",
            "--subresource=status",
            "--type=merge",
            "-p",
            str({"status": status}).replace("'", '"'),
        )
        assert patched.returncode == 0, patched.stderr
        await until(lambda: view.pod_at(packed("fd00::1")) is not None)

        ended = api.kubectl(
            "patch",
            "pod",
            "a",
            "--subresource=status",
            "--type=merge",
            "-p",
            '{"status":{"phase":"Succeeded"}}',
        )
        assert ended.returncode == 0, ended.stderr
        await until(lambda: ObjectKey("default", "a") not in view.pods)

        api.kubectl("delete", "service", "web", "other")
        await until(lambda: web not in view.services)
        api.kubectl(
            "delete",
            "endpointslice/web-1",
            "networkpolicy/deny",
            "bpfdataplanes/default",
            "node/node1",
        )
        api.kubectl("delete", "pod", "a", "--force", "--grace-period=0")
        await until(lambda: not view.policies and view.config is None and not view.slices_of(web))


async def test_the_selectors_are_accepted_and_an_empty_list_is_synced(api):
    connection = await connect(str(api.kubeconfig))
    try:
        for resource in RESOURCES.values():
            queue: asyncio.Queue = asyncio.Queue()
            task = asyncio.create_task(Reflector(resource, connection, queue).run())
            async with asyncio.timeout(10):
                while not isinstance(await queue.get(), Synced):
                    pass
            task.cancel()
    finally:
        await connection.close()


async def test_without_any_configuration_it_says_what_to_do(tmp_path):
    with pytest.raises(ConnectionError, match="point KUBECONFIG"):
        await connect(str(tmp_path / "nothing"))


def test_every_kind_is_watched():
    assert set(RESOURCES) == set(Kind)

# SPDX-License-Identifier: Apache-2.0
"""Reading the cluster into a World: what is watched comes from the store, the rest is asked for.

Pods are listed by label for each pass instead of watched: kopf has one watch per kind, and one on
all pods of the cluster would cost far more than two short lists. Their DaemonSets' status changes
with every pod's readiness, and that is watched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec

from bpfdp_operator import world as w
from bpfdp_operator.endpoint import OVERRIDE_NAME
from bpfdp_operator.render import AGENT_PODS

if TYPE_CHECKING:
    from bpfdp_operator.connection import Connection
    from bpfdp_operator.store import Store

T = TypeVar("T", bound=w.ApiObject)

CONFIGS = f"/apis/{w.GROUP}/{w.VERSION}/bpfdataplanes"
BPF_NODES = f"/apis/{w.GROUP}/{w.VERSION}/bpfnodes"
NODES = "/api/v1/nodes"
SLICES_OF_KUBERNETES = "kubernetes.io/service-name=kubernetes"
CHUNK = "500"


class _ListMeta(msgspec.Struct, rename="camel"):
    continue_: str = msgspec.field(default="", name="continue")


class _List(msgspec.Struct, Generic[T]):
    items: tuple[T, ...] | None = ()
    metadata: _ListMeta = msgspec.field(default_factory=_ListMeta)


def daemonsets(namespace: str) -> str:
    """Path of a namespace's DaemonSets."""
    return f"/apis/apps/v1/namespaces/{namespace}/daemonsets"


async def refresh_nodes(connection: Connection, store: Store) -> None:
    """List what there is one of for each node and take it over."""
    store.replace(w.BpfNode, await list_all(connection, w.BpfNode, BPF_NODES))
    store.replace(w.Node, await list_all(connection, w.Node, NODES))


async def refresh(connection: Connection, store: Store, deployment: w.Deployment) -> None:
    """Read the few other objects that are watched and take them over."""
    config = await find(connection, w.Config, f"{CONFIGS}/{w.CONFIG_NAME}")
    store.replace(w.Config, [config] if config else [])
    slices = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
    query = {"labelSelector": SLICES_OF_KUBERNETES}
    store.replace(w.EndpointSlice, await list_all(connection, w.EndpointSlice, slices, query))
    wanted = ((deployment.namespace, w.AGENT_NAME), (w.KUBE_PROXY_NAMESPACE, w.KUBE_PROXY_NAME))
    paths = [f"{daemonsets(namespace)}/{name}" for namespace, name in wanted]
    found = [await find(connection, w.DaemonSet, path) for path in paths]
    store.replace(w.DaemonSet, [daemonset for daemonset in found if daemonset is not None])


async def read(
    connection: Connection,
    store: Store,
    deployment: w.Deployment,
    memory: w.Memory,
    now: float,
    *,
    resync: bool,
) -> w.World:
    """Build the snapshot of this moment."""
    agent = store.get(w.DaemonSet, w.AGENT_NAME, deployment.namespace)
    proxy = store.get(w.DaemonSet, w.KUBE_PROXY_NAME, w.KUBE_PROXY_NAMESPACE)
    own = f"/api/v1/namespaces/{deployment.namespace}"
    system = f"/api/v1/namespaces/{w.KUBE_PROXY_NAMESPACE}"
    settings = await find(connection, w.ConfigMap, f"{system}/configmaps/kube-proxy")
    return w.World(
        deployment=deployment,
        now=now,
        resync=resync,
        config=store.get(w.Config, w.CONFIG_NAME),
        agent=agent,
        agent_pods=await _pods(connection, own, AGENT_PODS),
        kube_proxy=proxy,
        kube_proxy_pods=await _pods(connection, system, _selector(proxy)) if proxy else (),
        kube_proxy_config=settings.data.get("config.conf", "") if settings else "",
        nodes=store.all(w.Node),
        bpf_nodes=store.all(w.BpfNode),
        kubernetes_slices=store.all(w.EndpointSlice),
        endpoint_override=await find(connection, w.ConfigMap, f"{own}/configmaps/{OVERRIDE_NAME}"),
        detaching_for=now - memory.detaching_since if memory.detaching_since else None,
        selector_patches=memory.selector_patches,
        refusal=memory.refusal,
        selector_patch_age=now - memory.selector_patched_at,
    )


def _selector(daemonset: w.DaemonSet) -> str:
    labels = daemonset.spec.selector.match_labels or {"k8s-app": w.KUBE_PROXY_NAME}
    return ",".join(f"{key}={value}" for key, value in labels.items())


async def _pods(connection: Connection, namespace: str, selector: str) -> tuple[w.Pod, ...]:
    query = {"labelSelector": selector}
    return await list_all(connection, w.Pod, f"{namespace}/pods", query)


async def find(connection: Connection, kind: type[T], path: str) -> T | None:
    """Read one object; None where there is none."""
    data = await connection.find(path)
    return msgspec.json.decode(data, type=kind) if data is not None else None


async def list_all(
    connection: Connection, kind: type[T], path: str, query: dict[str, str] | None = None
) -> tuple[T, ...]:
    """Read a whole list, in chunks."""
    items: list[T] = []
    token = ""
    while True:
        extra = {"limit": CHUNK} | ({"continue": token} if token else {})
        data = await connection.get(path, (query or {}) | extra)
        page = msgspec.json.decode(data, type=_List[kind])  # type: ignore[valid-type]
        items += page.items or ()
        token = page.metadata.continue_
        if not token:
            return tuple(items)

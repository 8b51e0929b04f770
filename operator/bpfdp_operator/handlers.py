# SPDX-License-Identifier: Apache-2.0
"""kopf's side: store what is seen and wake the loop. Nothing is decided here."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from typing import TYPE_CHECKING, Any

import kopf
import msgspec

from bpfdp_operator import world as w
from bpfdp_operator.loop import STUCK_SECONDS, Reconciler
from bpfdp_operator.observe import SLICES_OF_KUBERNETES

if TYPE_CHECKING:
    from bpfdp_operator.store import HasMetadata

log = logging.getLogger("bpfdp.handlers")


class Memo:
    """kopf copies a memo for each object; this one stays the same."""

    def __init__(self, reconciler: Reconciler) -> None:
        self.reconciler = reconciler
        self.task: asyncio.Task[None] | None = None

    def __copy__(self) -> Memo:
        """Return the one memo."""
        return self


@kopf.on.startup()
async def start(settings: kopf.OperatorSettings, memo: Memo, **_: Any) -> None:
    """Set kopf up to watch and nothing else, and start the loop."""
    settings.posting.enabled = False
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 310
    settings.watching.connect_timeout = 30
    settings.watching.reconnect_backoff = 1
    settings.watching.label_selectors["discovery.k8s.io", "endpointslices"] = SLICES_OF_KUBERNETES
    settings.persistence.finalizer = f"{w.GROUP}/kopf-finalizer"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=w.GROUP)
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=w.GROUP)
    memo.task = asyncio.create_task(memo.reconciler.run(), name="reconcile")


@kopf.on.cleanup()
async def stop(memo: Memo, **_: Any) -> None:
    """Stop the loop; every step is safe to leave in the middle."""
    if memo.task is not None:
        memo.task.cancel()


@kopf.on.login()
def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
    """Use the pod's service account, or the kubeconfig outside of a cluster.

    kopf would ask the cluster's DNS for the API server: an operator on the host network has none.
    """
    inside = kopf.login_with_service_account(**kwargs)
    if inside is None:
        return kopf.login_with_kubeconfig(**kwargs)
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    authority = f"[{host}]" if ":" in host else host
    return dataclasses.replace(inside, server=f"https://{authority}:{port}")


@kopf.on.probe(id="reconcileAgeSeconds")
def reconcile_age(memo: Memo, **_: Any) -> float:
    """Fail liveness when the loop no longer gets round, or has ended."""
    ended = memo.task is not None and memo.task.done()
    if ended or memo.reconciler.age > STUCK_SECONDS:
        raise kopf.PermanentError(f"no pass for {memo.reconciler.age:.0f} s")
    return round(memo.reconciler.age, 1)


@kopf.on.event(w.GROUP, w.VERSION, "bpfdataplanes")
def config_seen(event: kopf.RawEvent, memo: Memo, **_: Any) -> None:
    """The config."""
    _store(event, memo, w.Config)


@kopf.on.event(w.GROUP, w.VERSION, "bpfnodes")
def report_seen(event: kopf.RawEvent, memo: Memo, **_: Any) -> None:
    """A node's report."""
    _store(event, memo, w.BpfNode)


@kopf.on.event("", "v1", "nodes")
def node_seen(event: kopf.RawEvent, memo: Memo, **_: Any) -> None:
    """A node."""
    _store(event, memo, w.Node)


def _ours_or_kube_proxy(name: str, **_: Any) -> bool:
    return name in (w.AGENT_NAME, w.KUBE_PROXY_NAME)


@kopf.on.event("apps", "v1", "daemonsets", when=_ours_or_kube_proxy)
def daemonset_seen(event: kopf.RawEvent, memo: Memo, **_: Any) -> None:
    """The agents' or kube-proxy's DaemonSet."""
    _store(event, memo, w.DaemonSet)


@kopf.on.event("discovery.k8s.io", "v1", "endpointslices")
def slice_seen(event: kopf.RawEvent, memo: Memo, namespace: str | None, **_: Any) -> None:
    """An EndpointSlice of default/kubernetes."""
    if namespace == "default":
        _store(event, memo, w.EndpointSlice)


def _store(event: kopf.RawEvent, memo: Memo, kind: type[HasMetadata]) -> None:
    body: dict[str, Any] = dict(event["object"])
    try:
        item = msgspec.convert(body, kind, strict=False)
    except msgspec.ValidationError as error:
        name = body.get("metadata", {}).get("name")
        log.warning("malformed object ignored", extra={"object": name, "error": str(error)})
        return
    store = memo.reconciler.store
    if event["type"] == "DELETED":
        store.drop(item)
        memo.reconciler.wake()
    elif store.put(item):
        memo.reconciler.wake()

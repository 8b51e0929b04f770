# SPDX-License-Identifier: Apache-2.0
"""Carrying out a plan: the only module of the operator that writes to the cluster.

Every write is safe to repeat. What the API server answers goes into the store at once, so that the
next pass does not decide on what it has just changed.
"""

from __future__ import annotations

import logging
import secrets
from typing import TYPE_CHECKING, Any

import msgspec

from bpfdp_operator import observe, plan
from bpfdp_operator import world as w
from bpfdp_operator.conditions import timestamp, turned
from bpfdp_operator.connection import APPLY, JSON, MERGE, ApiError, Connection
from bpfdp_operator.kubeproxy import selector_patch
from bpfdp_operator.survey import name_list

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from bpfdp_operator.store import Store

log = logging.getLogger("bpfdp.apply")

EVENT_REPEAT_SECONDS = 600.0
EVENTS = "/api/v1/namespaces/default/events"
GONE = (404,)


class Applier:
    """Writes the status and carries out actions, each with an Event on the config."""

    def __init__(
        self, connection: Connection, store: Store, deployment: w.Deployment, memory: w.Memory
    ) -> None:
        self._connection = connection
        self._store = store
        self._deployment = deployment
        self._memory = memory
        self._said: dict[tuple[str, str], float] = {}
        self._writers: dict[type[Any], Callable[[Any, w.Config, float], Awaitable[None]]] = {
            plan.AddFinalizer: self._add_finalizer,
            plan.RemoveFinalizer: self._remove_finalizer,
            plan.ApplyAgent: self._apply_agent,
            plan.DeleteAgent: self._delete_agent,
            plan.RemoveKubeProxy: self._remove_kube_proxy,
            plan.RestoreKubeProxy: self._restore_kube_proxy,
            plan.KeepKubeProxy: self._keep_kube_proxy,
            plan.ReleaseKubeProxy: self._release_kube_proxy,
            plan.DeleteBpfNode: self._delete_bpf_node,
        }

    async def write_status(self, config: w.Config, status: w.ConfigStatus, now: float) -> bool:
        """Write the status where it differs and tell of changed conditions; say whether it did."""
        detaching = status.agents.mode == w.AgentsMode.DETACH
        if not detaching:
            self._memory.detaching_since = None
        elif self._memory.detaching_since is None:
            self._memory.detaching_since = now
        if status == config.status:
            return False
        path = f"{observe.CONFIGS}/{config.metadata.name}/status"
        body = {"status": msgspec.to_builtins(status)}
        try:
            data = await self._patch(path, body)
        except ApiError as error:
            if error.status in GONE:
                self._store.drop(config)
                return False
            raise
        self._store.put(msgspec.json.decode(data, type=w.Config))
        for condition in turned(config.status, status):
            bad = condition.type == "Degraded" and condition.status == "True"
            text = f"{condition.type}={condition.status}: {condition.message}"
            await self.tell(config, condition.reason, text, now, warning=bad)
        return True

    async def carry_out(self, action: plan.Action, config: w.Config, now: float) -> None:
        """Do one action; raises ApiError when the API server refuses."""
        await self._writers[type(action)](action, config, now)

    # The config itself

    async def _add_finalizer(self, _: plan.AddFinalizer, config: w.Config, _now: float) -> None:
        await self._finalizers(config, wanted=True)

    async def _remove_finalizer(
        self, _: plan.RemoveFinalizer, config: w.Config, now: float
    ) -> None:
        if config.deleting:
            await self.tell(config, "Deleting", "All traces are gone; letting the config go.", now)
        await self._finalizers(config, wanted=False)

    async def _finalizers(self, config: w.Config, *, wanted: bool) -> None:
        # The config in hand is older than the status just written. resourceVersion: the list is
        # replaced whole, and others may hold finalizers of their own.
        current = self._store.get(w.Config, config.metadata.name) or config
        others = [f for f in current.metadata.finalizers if f != w.FINALIZER]
        metadata = {
            "finalizers": [*others, w.FINALIZER] if wanted else others,
            "resourceVersion": current.metadata.resource_version,
        }
        path = f"{observe.CONFIGS}/{config.metadata.name}"
        data = await self._patch(path, {"metadata": metadata})
        updated = msgspec.json.decode(data, type=w.Config)
        if updated.deleting and not updated.metadata.finalizers:
            self._store.drop(updated)
        else:
            self._store.put(updated)

    # The agents

    async def _apply_agent(self, action: plan.ApplyAgent, config: w.Config, now: float) -> None:
        path = f"{observe.daemonsets(self._deployment.namespace)}/{w.AGENT_NAME}"
        query = {"fieldManager": w.FIELD_MANAGER, "force": "true"}
        data = await self._connection.request(
            "PATCH", path, query=query, body=action.manifest, content_type=APPLY
        )
        self._store.put(msgspec.json.decode(data, type=w.DaemonSet))
        if action.announced:
            await self.tell(config, "RollingOut", action.announced, now)

    async def _delete_agent(self, action: plan.DeleteAgent, config: w.Config, now: float) -> None:
        text = "Every node is detached; removing the agents."
        if action.left_behind:
            names = name_list(action.left_behind)
            text = f"Removing the agents though {names} did not detach; run `bpfdp cleanup` there."
        await self.tell(config, "Detached", text, now, warning=bool(action.left_behind))
        path = f"{observe.daemonsets(self._deployment.namespace)}/{w.AGENT_NAME}"
        await self._delete(path)
        agent = self._store.get(w.DaemonSet, w.AGENT_NAME, self._deployment.namespace)
        if agent is not None:
            self._store.drop(agent)

    async def _delete_bpf_node(self, action: plan.DeleteBpfNode, _: w.Config, _now: float) -> None:
        await self._delete(f"{observe.BPF_NODES}/{action.node}")
        report = self._store.get(w.BpfNode, action.node)
        if report is not None:
            self._store.drop(report)

    # kube-proxy

    async def _remove_kube_proxy(
        self, _: plan.RemoveKubeProxy, config: w.Config, now: float
    ) -> None:
        await self._patch_selector("true")
        self._memory.selector_patches += 1
        self._memory.selector_patched_at = now
        text = "Every node is programmed; kube-proxy is asked to leave."
        await self.tell(config, "KubeProxyRemoved", text, now)

    async def _restore_kube_proxy(
        self, _: plan.RestoreKubeProxy, config: w.Config, now: float
    ) -> None:
        await self._patch_selector(None)
        self._memory.selector_patches = 0
        await self.tell(config, "KubeProxyRunning", "Bringing kube-proxy back.", now)

    async def _patch_selector(self, value: str | None) -> None:
        # A merge patch: to server-side apply nodeSelector is atomic, its other keys would go.
        path = f"{observe.daemonsets(w.KUBE_PROXY_NAMESPACE)}/{w.KUBE_PROXY_NAME}"
        data = await self._patch(path, selector_patch(value))
        self._store.put(msgspec.json.decode(data, type=w.DaemonSet))

    async def _keep_kube_proxy(
        self, action: plan.KeepKubeProxy, config: w.Config, now: float
    ) -> None:
        await self._mark_node(action.node, "true", w.FIELD_MANAGER)
        text = f"kube-proxy stays on {action.node}, which the dataplane does not serve."
        await self.tell(config, "KubeProxyRunning", text, now)

    async def _release_kube_proxy(
        self, action: plan.ReleaseKubeProxy, config: w.Config, now: float
    ) -> None:
        await self._mark_node(action.node, None, None)
        text = f"{action.node} need not keep kube-proxy any more."
        await self.tell(config, "KubeProxyRemoved", text, now)

    async def _mark_node(self, name: str, label: str | None, keeper: str | None) -> None:
        metadata = {
            "labels": {w.KUBE_PROXY_LABEL: label},
            "annotations": {w.KEPT_ANNOTATION: keeper},
        }
        data = await self._patch(f"{observe.NODES}/{name}", {"metadata": metadata})
        self._store.put(msgspec.json.decode(data, type=w.Node))

    # Requests

    async def _patch(self, path: str, body: dict[str, Any]) -> bytes:
        query = {"fieldManager": w.FIELD_MANAGER}
        return await self._connection.request(
            "PATCH", path, query=query, body=body, content_type=MERGE
        )

    async def _delete(self, path: str) -> None:
        try:
            await self._connection.request(
                "DELETE", path, query={"propagationPolicy": "Background"}
            )
        except ApiError as error:
            if error.status not in GONE:
                raise

    async def tell(
        self, config: w.Config, reason: str, message: str, now: float, *, warning: bool = False
    ) -> None:
        """Log one line and post an Event on the config, unless the same was said a while ago."""
        if now - self._said.get((reason, message), 0.0) < EVENT_REPEAT_SECONDS:
            return
        self._said = {k: at for k, at in self._said.items() if now - at < EVENT_REPEAT_SECONDS}
        self._said[reason, message] = now
        log.log(logging.WARNING if warning else logging.INFO, message, extra={"reason": reason})
        try:
            body = _event(config, reason, message, now, warning=warning)
            await self._connection.request("POST", EVENTS, body=body, content_type=JSON)
        except ApiError as error:
            # An Event is a courtesy: a pass does not stop for it.
            log.warning("no Event was written", extra={"error": str(error)})


def _event(
    config: w.Config, reason: str, message: str, now: float, *, warning: bool
) -> dict[str, Any]:
    """A core/v1 Event; those on cluster-scoped objects live in the namespace `default`."""
    when = timestamp(now)
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{config.metadata.name}.{secrets.token_hex(8)}",
            "namespace": "default",
        },
        "involvedObject": {
            "apiVersion": f"{w.GROUP}/{w.VERSION}",
            "kind": "BpfDataplaneConfig",
            "name": config.metadata.name,
            "uid": config.metadata.uid,
        },
        "reason": reason,
        "message": message[:1024],
        "type": "Warning" if warning else "Normal",
        "source": {"component": w.FIELD_MANAGER},
        "firstTimestamp": when,
        "lastTimestamp": when,
        "count": 1,
    }

# SPDX-License-Identifier: Apache-2.0
"""Kubernetes Events on the objects the agent has something to say about.

Best effort: an Event that cannot be written is logged and dropped. The same Event (object,
reason, message) is sent at most once in REPEAT_AFTER, so a loop that retries does not flood.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from typing import TYPE_CHECKING, Literal

import msgspec

from bpfdp_agent.serve.nodestatus import utc_now
from bpfdp_agent.watch.wire import Kind

if TYPE_CHECKING:
    from bpfdp_agent.serve.nodestatus import ApiClient
    from bpfdp_agent.watch.wire import ObjectKey

log = logging.getLogger(__name__)

REPEAT_AFTER = 600.0
QUEUE_LIMIT = 256
CLUSTER_SCOPE_NAMESPACE = "default"
"""Where Events on cluster-scoped objects go (the API server asks for this one)."""


class ObjectRef(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """`involvedObject`."""

    api_version: str
    kind: str
    name: str
    namespace: str = ""
    uid: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace + '/' if self.namespace else ''}{self.name}"


_API_VERSIONS = {
    Kind.SERVICE: "v1",
    Kind.ENDPOINT_SLICE: "discovery.k8s.io/v1",
    Kind.POD: "v1",
    Kind.NAMESPACE: "v1",
    Kind.NODE: "v1",
    Kind.NETWORK_POLICY: "networking.k8s.io/v1",
    Kind.SERVICE_CIDR: "networking.k8s.io/v1",
    Kind.CONFIG: "bpfdataplane.io/v1alpha1",
}


def ref_of(kind: Kind, key: ObjectKey) -> ObjectRef:
    """How an Event names a watched object."""
    return ObjectRef(_API_VERSIONS[kind], str(kind), key.name, key.namespace)


class Event(msgspec.Struct, frozen=True):
    """One thing to tell."""

    ref: ObjectRef
    type: Literal["Normal", "Warning"]
    reason: str
    message: str


class EventRecorder:
    """Queues Events and sends them in the background."""

    def __init__(self, client: ApiClient, node_name: str) -> None:
        self._client = client
        self._node_name = node_name
        self._queue: asyncio.Queue[Event] = asyncio.Queue(QUEUE_LIMIT)
        self._recent: dict[Event, float] = {}

    def warning(self, ref: ObjectRef, reason: str, message: str) -> None:
        """Tell of a problem."""
        self._put(Event(ref=ref, type="Warning", reason=reason, message=message[:1000]))

    def normal(self, ref: ObjectRef, reason: str, message: str) -> None:
        """Tell of a step done."""
        self._put(Event(ref=ref, type="Normal", reason=reason, message=message[:1000]))

    def _put(self, event: Event) -> None:
        now = time.monotonic()
        if now - self._recent.get(event, -REPEAT_AFTER) < REPEAT_AFTER:
            return
        self._recent = {e: t for e, t in self._recent.items() if now - t < REPEAT_AFTER}
        self._recent[event] = now
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            log.warning("event dropped, too many are waiting: %s %s", event.ref, event.message)

    async def run(self) -> None:
        """Send what is queued until cancelled."""
        while True:
            event = await self._queue.get()
            try:
                await self._send(event)
            except (OSError, TimeoutError) as error:
                log.warning("event on %s not written: %s", event.ref, error)

    async def _send(self, event: Event) -> None:
        namespace = event.ref.namespace or CLUSTER_SCOPE_NAMESPACE
        now = utc_now()
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"bpfdp.{uuid.uuid4().hex[:16]}", "namespace": namespace},
            "involvedObject": msgspec.to_builtins(event.ref),
            "type": event.type,
            "reason": event.reason,
            "message": event.message,
            "source": {"component": "bpfdp-agent", "host": self._node_name},
            "reportingComponent": "bpfdataplane.io/agent",
            "reportingInstance": self._node_name,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        code, answer = await self._client.request(
            "POST", f"/api/v1/namespaces/{namespace}/events", body=msgspec.json.encode(body)
        )
        if code != 201:
            log.warning("event on %s refused: %d %s", event.ref, code, answer[:200])

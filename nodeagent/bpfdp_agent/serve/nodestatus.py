# SPDX-License-Identifier: Apache-2.0
"""This node's BpfNode: what the agent found, attached and programmed, for people and the operator.

`NodeStatus` holds the state; concerns set their part; `NodeStatusWriter` sends it when it
changed, at most once in MIN_INTERVAL, by server-side apply. Nothing in it ticks: an idle node
writes nothing. Numbers come in steps where they would otherwise change all the time.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from bpfdp_agent.config import GROUP, VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

log = logging.getLogger(__name__)

FIELD_MANAGER = "bpfdp-agent"
MIN_INTERVAL = 2.0
RETRY_LIMIT = 60.0
MAX_INTERFACES = 64
MAX_MESSAGE = 1024

ConditionType = Literal[
    "Ready",
    "FeaturesSupported",
    "ProgramsLoaded",
    "Attached",
    "ServicesSynced",
    "PoliciesSynced",
    "KubeProxyRulesCleared",
]
Reason = Literal[
    "AgentNotReady",
    "Attached",
    "Cleared",
    "Deleting",
    "Detached",
    "InvalidConfiguration",
    "InvalidObject",
    "KernelUnsupported",
    "Loaded",
    "MapFull",
    "NotCleared",
    "ProgramRejected",
    "Supported",
    "Synced",
    "Syncing",
    "TemplateError",
]

READY_NEEDS: tuple[ConditionType, ...] = (
    "FeaturesSupported",
    "ProgramsLoaded",
    "ServicesSynced",
    "PoliciesSynced",
    "Attached",
)


class _Wire(msgspec.Struct, frozen=True, rename="camel"):
    """Base of the status's parts."""


class Condition(_Wire, frozen=True):
    """One condition, the Kubernetes way."""

    type: ConditionType
    status: Literal["True", "False", "Unknown"]
    reason: Reason
    message: str
    last_transition_time: str
    observed_generation: int = 0


class FeatureStatus(_Wire, frozen=True):
    """A kernel feature as probed."""

    name: str
    supported: bool
    message: str = ""


class InterfaceStatus(_Wire, frozen=True):
    """An interface and the hooks attached to it."""

    name: str
    hooks: tuple[str, ...]


class MapStatus(_Wire, frozen=True):
    """How full a map is, in steps of 5 %."""

    name: str
    used_percent: int
    max_entries: int


class LastError(_Wire, frozen=True):
    """The latest thing that went wrong. `object` is `Kind namespace/name` where there is one."""

    reason: str
    message: str
    time: str
    object: str = ""


class Status(_Wire, frozen=True):
    """`BpfNode.status`."""

    observed_config_generation: int = 0
    agent_version: str = ""
    kernel: str = ""
    attach_type: Literal["TCX", "TC"] | None = None
    features: tuple[FeatureStatus, ...] = ()
    conditions: tuple[Condition, ...] = ()
    interfaces: tuple[InterfaceStatus, ...] = ()
    pods: int = 0
    services: int = 0
    backends: int = 0
    policies: int = 0
    maps: tuple[MapStatus, ...] = ()
    addresses: tuple[str, ...] = ()
    last_error: LastError | None = None


class ApiClient(Protocol):
    """The part of the API connection that writes objects."""

    async def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: bytes | None = None,
        content_type: str = "application/json",
    ) -> tuple[int, bytes]:
        """Status code and body; raises OSError-like errors where no answer came."""
        ...


def utc_now() -> str:
    """Now, the way Kubernetes writes times."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class NodeStatus:
    """The status as the agent's parts see it. `changed` is set whenever it differs from before."""

    def __init__(self, version: str, kernel: str, now: Callable[[], str] = utc_now) -> None:
        self._now = now
        self._status = Status(agent_version=version, kernel=kernel)
        self._generation = 0
        self._errors: dict[tuple[str, str], LastError] = {}
        self.changed = asyncio.Event()

    @property
    def current(self) -> Status:
        """The status to be published."""
        return self._status

    def adopt(self, previous: Status) -> None:
        """Start from what an earlier agent wrote: conditions and their times outlive a restart.

        Its error does not: what is still wrong will be found again.
        """
        self._status = msgspec.structs.replace(
            previous,
            agent_version=self._status.agent_version,
            kernel=self._status.kernel,
            last_error=None,
        )
        self.changed.set()

    def set_generation(self, generation: int) -> None:
        """Name the generation of the CR the agent runs."""
        self._generation = generation
        conditions = tuple(
            msgspec.structs.replace(c, observed_generation=generation)
            for c in self._status.conditions
        )
        self.update(observed_config_generation=generation, conditions=conditions)

    def update(self, **fields: Any) -> None:
        """Set top-level fields; unknown names raise TypeError."""
        status = msgspec.structs.replace(self._status, **fields)
        if status != self._status:
            self._status = status
            self.changed.set()

    def condition(
        self, kind: ConditionType, status: bool | None, reason: Reason, message: str
    ) -> bool:
        """Set a condition (None: Unknown); returns whether its status changed."""
        old = self.get(kind)
        text: Literal["True", "False", "Unknown"] = (
            "Unknown" if status is None else "True" if status else "False"
        )
        moved = old is None or old.status != text
        new = Condition(
            type=kind,
            status=text,
            reason=reason,
            message=message[:MAX_MESSAGE],
            last_transition_time=self._now() if old is None or moved else old.last_transition_time,
            observed_generation=self._generation,
        )
        others = [c for c in self._status.conditions if c.type != kind]
        self.update(conditions=tuple(sorted([*others, new], key=lambda c: c.type)))
        if kind != "Ready":
            self.condition("Ready", *self._readiness())
        return moved

    def _readiness(self) -> tuple[bool, Reason, str]:
        """Ready sums up the others: the first that is not well, and why."""
        attached = self.get("Attached")
        if attached is not None and attached.reason == "Detached":
            return True, "Detached", "Detached, as the BpfDataplaneConfig says."
        for kind in READY_NEEDS:
            found = self.get(kind)
            if found is None:
                return False, "Syncing", f"The agent is starting: {kind} is not known yet."
            if found.status != "True":
                return False, found.reason, found.message
        return True, "Synced", "The node runs what the API server says."

    def get(self, kind: ConditionType) -> Condition | None:
        """A condition as set."""
        return next((c for c in self._status.conditions if c.type == kind), None)

    def is_true(self, kind: ConditionType) -> bool:
        """Whether a condition is True."""
        found = self.get(kind)
        return found is not None and found.status == "True"

    def error(self, reason: Reason, message: str, obj: str = "", *, concern: str = "") -> None:
        """Something is wrong from now on, until `clear_error`; the latest is the one published.

        `obj` is the object at fault, `concern` the part of the agent that found it.
        """
        key = (obj, concern)
        known = self._errors.get(key)
        if known and (known.reason, known.message) == (reason, message[:MAX_MESSAGE]):
            return
        self._errors.pop(key, None)
        self._errors[key] = LastError(
            reason=reason, message=message[:MAX_MESSAGE], time=self._now(), object=obj
        )
        self._publish_error()

    def clear_error(self, obj: str = "", *, concern: str = "") -> None:
        """It is healed; what else is wrong is published instead."""
        if self._errors.pop((obj, concern), None):
            self._publish_error()

    def _publish_error(self) -> None:
        self.update(last_error=next(reversed(self._errors.values()), None))

    def interfaces(self, hooks: Mapping[str, Iterable[str]]) -> None:
        """Publish what is attached: interface → hooks (the first MAX_INTERFACES by name)."""
        rows = tuple(
            InterfaceStatus(name=name, hooks=tuple(sorted(hooks[name])))
            for name in sorted(hooks)[:MAX_INTERFACES]
        )
        self.update(interfaces=rows)

    def maps(self, usage: Mapping[str, tuple[int, int]]) -> None:
        """Publish map use: name → (entries, max entries)."""
        self.update(
            maps=tuple(
                MapStatus(
                    name=name,
                    used_percent=percent_in_steps(*usage[name]),
                    max_entries=usage[name][1],
                )
                for name in sorted(usage)
            )
        )


def percent_in_steps(used: int, maximum: int) -> int:
    """Use in percent, rounded up to steps of 5 so that small changes publish nothing."""
    if not used or not maximum:
        return 0
    return min(100, -(-used * 20 // maximum) * 5)


class NodeStatusWriter:
    """Sends the status when it changed. One per process."""

    def __init__(self, client: ApiClient, node_name: str, status: NodeStatus) -> None:
        self._client = client
        self._node_name = node_name
        self._status = status
        self._sent: Status | None = None
        self._created = False

    async def run(self) -> None:
        """Send on change until cancelled; failures are retried with growing pauses."""
        pause = MIN_INTERVAL
        while True:
            await self._status.changed.wait()
            self._status.changed.clear()
            if self._status.current != self._sent:
                try:
                    await self.send()
                    pause = MIN_INTERVAL
                except (OSError, ApiRefusedError, TimeoutError) as error:
                    log.warning("BpfNode %s not written, retrying: %s", self._node_name, error)
                    self._created = False
                    self._status.changed.set()
                    pause = min(pause * 2, RETRY_LIMIT)
            await asyncio.sleep(pause)

    async def load(self) -> None:
        """Adopt the status an earlier agent left, when there is one."""
        code, body = await self._client.request("GET", self._path())
        if code == 200:
            previous = msgspec.json.decode(body, type=_StatusOnly)
            self._status.adopt(previous.status)

    async def send(self) -> None:
        """Write the status now; raises ApiRefusedError with the server's words."""
        status = self._status.current
        if not self._created:
            await self._apply(self._path(), {"metadata": await self._metadata()})
            self._created = True
        body = {"metadata": {"name": self._node_name}, "status": _wire(status)}
        await self._apply(f"{self._path()}/status", body)
        self._sent = status

    async def _metadata(self) -> dict[str, Any]:
        code, body = await self._client.request("GET", f"/api/v1/nodes/{self._node_name}")
        if code != 200:
            raise ApiRefusedError(f"node {self._node_name}: {code} {_words(body)}")
        node = msgspec.json.decode(body, type=_NodeOnly)
        return {
            "name": self._node_name,
            "ownerReferences": [
                {
                    "apiVersion": "v1",
                    "kind": "Node",
                    "name": self._node_name,
                    "uid": node.metadata.uid,
                }
            ],
        }

    async def _apply(self, path: str, body: dict[str, Any]) -> None:
        code, answer = await self._client.request(
            "PATCH",
            path,
            params={"fieldManager": FIELD_MANAGER, "force": "true"},
            body=msgspec.json.encode(
                {"apiVersion": f"{GROUP}/{VERSION}", "kind": "BpfNode", **body}
            ),
            content_type="application/apply-patch+yaml",
        )
        if code not in (200, 201):
            raise ApiRefusedError(f"{path}: {code} {_words(answer)}")

    def _path(self) -> str:
        return f"/apis/{GROUP}/{VERSION}/bpfnodes/{self._node_name}"


class ApiRefusedError(Exception):
    """The API server answered with an error; the message carries its words."""


class _StatusOnly(msgspec.Struct, frozen=True):
    status: Status = Status()


class _Refusal(msgspec.Struct, frozen=True):
    message: str = ""


def _words(answer: bytes) -> str:
    """The API server's own message."""
    try:
        return msgspec.json.decode(answer, type=_Refusal).message
    except msgspec.DecodeError:
        return answer[:300].decode(errors="replace")


class _Uid(msgspec.Struct, frozen=True):
    uid: str = ""


class _NodeOnly(msgspec.Struct, frozen=True):
    metadata: _Uid


def _wire(status: Status) -> dict[str, Any]:
    """The status for server-side apply: what is None is left out, so the field is removed."""
    built: dict[str, Any] = msgspec.to_builtins(status)
    return {name: value for name, value in built.items() if value is not None}

# SPDX-License-Identifier: Apache-2.0
"""What every concern needs: the view to read, and where to say how it goes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bpfdp_agent.bpf.errors import CompileFailed, MapFull, ProgramRejected, TemplateInvalid
from bpfdp_agent.dataplane.policies import PolicyNotLoaded

if TYPE_CHECKING:
    from bpfdp_agent.config import ProcessSettings
    from bpfdp_agent.model.cluster import ClusterView
    from bpfdp_agent.serve.events import EventRecorder, ObjectRef
    from bpfdp_agent.serve.metrics import Metrics
    from bpfdp_agent.serve.nodestatus import NodeStatus, Reason
    from bpfdp_agent.serve.proxyhealth import ProxyHealth, ProxyHealthServers

log = logging.getLogger(__name__)


@dataclass
class Surroundings:
    """One per process."""

    settings: ProcessSettings
    view: ClusterView
    status: NodeStatus
    events: EventRecorder
    metrics: Metrics
    proxy: ProxyHealth
    proxy_servers: ProxyHealthServers
    features: frozenset[str] = frozenset()

    def invalid(self, ref: ObjectRef, problem: str) -> None:
        """An object that cannot be used as written: a log line, an Event, lastError."""
        log.warning("%s: %s", ref, problem)
        self.events.warning(ref, "InvalidObject", problem)
        self.status.error("InvalidObject", problem, str(ref))
        self.metrics.invalid_objects.labels(ref.kind).inc()

    def valid(self, ref: ObjectRef) -> None:
        """The object is well again, or gone."""
        self.status.clear_error(str(ref))

    def report(self, concern: str, error: Exception | None) -> None:
        """How a concern's round went."""
        if error is None:
            self.status.clear_error(concern=concern)
            return
        log.error("%s: %s", concern, error)
        self.status.error(reason_of(error), f"{concern}: {error}", concern=concern)


def reason_of(error: Exception) -> Reason:
    """The enum's word for an error of the kernel's side."""
    if isinstance(error, PolicyNotLoaded):
        error = error.cause
    if isinstance(error, MapFull):
        return "MapFull"
    if isinstance(error, CompileFailed | TemplateInvalid):
        return "TemplateError"
    if isinstance(error, ProgramRejected):
        return "ProgramRejected"
    return "AgentNotReady"

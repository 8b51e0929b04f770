# SPDX-License-Identifier: Apache-2.0
"""How long after a change at its origin the maps held it (SIG Scalability's SLI)."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from bpfdp_agent.watch.wire import EndpointSlice, ObjectKey


class ProgrammingLatency:
    """Each trigger time of a slice counts once; those from before the agent's start do not."""

    def __init__(self, now: Callable[[], datetime.datetime] | None = None) -> None:
        self._now = now or (lambda: datetime.datetime.now(datetime.UTC))
        self._started = self._now()
        self._seen: dict[tuple[ObjectKey, int], dict[ObjectKey, str]] = {}

    def of(self, service: ObjectKey, family: int, slices: Iterable[EndpointSlice]) -> list[float]:
        """Seconds since the changes that a service's slices tell of for the first time."""
        told = {s.key: s.metadata.annotations.last_change for s in slices}
        before = self._seen.pop((service, family), {})
        if told:
            self._seen[service, family] = told
        new = (_moment(text) for key, text in told.items() if text and before.get(key) != text)
        return [
            max((self._now() - moment).total_seconds(), 0.0)
            for moment in new
            if moment is not None and moment > self._started
        ]


def _moment(text: str) -> datetime.datetime | None:
    try:
        found = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.tzinfo else None

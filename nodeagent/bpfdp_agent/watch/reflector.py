# SPDX-License-Identifier: Apache-2.0
"""One kind's list and watch, kept going for ever, as typed events in a queue.

A chunked list, then a watch from its resourceVersion with bookmarks; a broken watch goes on from
the last version seen, an expired one (410) starts again with a list. A list is compared with the
keys already told of, so that what vanished meanwhile comes out as `Deleted`, and only once the
list is complete.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import TYPE_CHECKING, Protocol

import msgspec

from bpfdp_agent.watch.wire import (
    Added,
    Deleted,
    Event,
    ListEnvelope,
    Malformed,
    Modified,
    ObjectKey,
    Status,
    Synced,
    WatchEnvelope,
    decode,
    stamp,
)

if TYPE_CHECKING:
    import contextlib
    from collections.abc import AsyncIterator, Mapping

    from bpfdp_agent.watch.wire import Kind, Resource

log = logging.getLogger(__name__)

GONE = 410
ABSENT = 404
_REMEDIES = {
    401: "the agent's token is not accepted: check the ServiceAccount bpfdp-agent",
    403: "the agent's ClusterRole must allow get, list and watch of it",
    404: "the API server does not know it: are the CRDs installed?",
}

_list = msgspec.json.Decoder(ListEnvelope)
_watch = msgspec.json.Decoder(WatchEnvelope)
_status = msgspec.json.Decoder(Status)


class Source(Protocol):
    """The part of the connection that reads."""

    async def request(
        self, method: str, path: str, *, params: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status code and body."""
        ...

    def stream(
        self, path: str, params: Mapping[str, str], inactivity: float
    ) -> contextlib.AbstractAsyncContextManager[tuple[int, AsyncIterator[bytes]]]:
        """Status code and lines."""
        ...


class Timing(msgspec.Struct, frozen=True):
    """Seconds, and the length of a page.

    The API server sends a bookmark about once a minute to watches of kinds that change, so a
    watch that was silent for `inactivity` may be dead and is started anew at once. A watch that
    lives shorter than `short` counts as a failure.
    """

    page: int = 500
    inactivity: float = 150.0
    watch: float = 480.0
    short: float = 1.0
    first_wait: float = 0.5
    longest_wait: float = 30.0
    absent: float = 300.0


class RequestFailed(Exception):
    """The API server answered, but not with what was asked for."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class Reflector:
    """Lists and watches one resource; `run` until cancelled. Events go to the queue in order."""

    def __init__(
        self,
        resource: Resource,
        source: Source,
        queue: asyncio.Queue[Event],
        timing: Timing = Timing(),  # noqa: B008 - frozen
    ) -> None:
        self._resource = resource
        self._source = source
        self._queue = queue
        self._timing = timing
        # every key told of -> resourceVersion; "" for an object that did not decode
        self._known: dict[ObjectKey, str] = {}
        self._version = ""  # where the next watch starts; "": list first
        self._failures = 0
        self._absent = False

    @property
    def kind(self) -> Kind:
        """What it reflects."""
        return self._resource.kind

    async def run(self) -> None:
        """List and watch until cancelled, whatever happens to the connection."""
        while True:
            started = time.monotonic()
            try:
                if not self._version:
                    await self._relist()
                    started = time.monotonic()
                await self._watch_once()
                if time.monotonic() - started < self._timing.short:
                    await self._wait("the watch ended at once")
            except RequestFailed as error:
                await self._answer(error)
            except msgspec.DecodeError as error:
                self._version = ""
                await self._wait(f"unreadable answer: {error}")
            except OSError as error:
                if time.monotonic() - started > self._timing.longest_wait:
                    self._failures = 0  # it worked for a while: no run of failures
                await self._wait(str(error) or type(error).__name__)

    async def _answer(self, error: RequestFailed) -> None:
        if error.code == GONE:
            self._version = ""
            if not self._failures:  # at full speed, unless the server says so again at once
                self._failures = 1
                log.info("%s: the resourceVersion has expired, listing again", self.kind)
                return
        if error.code == ABSENT and self._resource.optional:
            if not self._absent:
                log.info("%s: this API server does not serve it; looked for again later", self.kind)
            self._absent = True
            await self._queue.put(Synced(self.kind))
            await asyncio.sleep(self._timing.absent)
            return
        remedy = _REMEDIES.get(error.code)
        await self._wait(f"{error} ({remedy})" if remedy else str(error))

    async def _wait(self, reason: str) -> None:
        """Back off: exponentially, with full jitter below the first half."""
        limit = min(self._timing.longest_wait, self._timing.first_wait * 2**self._failures)
        self._failures = min(self._failures + 1, 16)
        seconds = limit * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
        level = logging.WARNING if self._failures > 1 else logging.INFO
        log.log(level, "%s: %s; trying again in %.1f s", self.kind, reason, seconds)
        await asyncio.sleep(seconds)

    # -- list -----------------------------------------------------------------------------

    async def _relist(self) -> None:
        seen: set[ObjectKey] = set()
        readable = True
        page = ""
        while True:
            envelope = await self._page(page)
            for raw in envelope.items or ():
                key = await self._take(raw)
                readable &= key is not None
                if key:
                    seen.add(key)
            page = envelope.metadata.continue_
            if not page:
                break
        if readable:  # else what seems to be missing may be what could not be read
            for key in [k for k in self._known if k not in seen]:
                await self._drop(key)
        self._version = envelope.metadata.resource_version
        await self._queue.put(Synced(self.kind))

    async def _page(self, continue_: str) -> ListEnvelope:
        params = {"limit": str(self._timing.page), **self._selectors()}
        if continue_:
            params["continue"] = continue_
        code, body = await self._source.request("GET", self._resource.path, params=params)
        if code != 200:
            raise _failed(code, body)
        return _list.decode(body)

    # -- watch ----------------------------------------------------------------------------

    async def _watch_once(self) -> None:
        params = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(max(1, int(self._timing.watch * random.uniform(0.5, 1)))),  # noqa: S311
            **self._selectors(),
        }
        stream = self._source.stream(self._resource.path, params, self._timing.inactivity)
        async with stream as (code, lines):
            if code != 200:
                body = b"".join([line async for line in lines])
                raise _failed(code, body)
            try:
                async for line in lines:
                    await self._line(_watch.decode(line))
                    self._failures = 0
            except TimeoutError:
                # dead, or of a kind that never changes, for which no bookmark comes: start anew
                log.debug("%s: nothing heard for %.0f s", self.kind, self._timing.inactivity)
                self._failures = 0

    async def _line(self, envelope: WatchEnvelope) -> None:
        if envelope.type == "ERROR":
            status = _status.decode(envelope.object)
            self._version = ""
            raise RequestFailed(status.code, status.message or status.reason)
        if envelope.type == "BOOKMARK":
            _, self._version = stamp(envelope.object)
        elif envelope.type == "DELETED":
            key, self._version = stamp(envelope.object)
            await self._drop(key)
        else:
            key_or_none = await self._take(envelope.object)
            if key_or_none:
                _, self._version = stamp(envelope.object)

    # -- both -----------------------------------------------------------------------------

    async def _take(self, raw: msgspec.Raw) -> ObjectKey | None:
        """Tell of one object unless its version is known. None when even its key is unreadable."""
        try:
            key, version = stamp(raw)
        except msgspec.DecodeError as error:
            await self._queue.put(Malformed(self.kind, ObjectKey("", ""), str(error)))
            return None
        if version and self._known.get(key) == version:
            return key
        try:
            found = decode(self.kind, raw)
        except msgspec.DecodeError as error:
            self._known[key] = ""
            await self._queue.put(Malformed(self.kind, key, str(error)))
            return key
        event = Modified if key in self._known else Added
        self._known[key] = version
        await self._queue.put(event(self.kind, found))
        return key

    async def _drop(self, key: ObjectKey) -> None:
        self._known.pop(key, None)
        await self._queue.put(Deleted(self.kind, key))

    def _selectors(self) -> dict[str, str]:
        given = {
            "labelSelector": self._resource.label_selector,
            "fieldSelector": self._resource.field_selector,
        }
        return {name: text for name, text in given.items() if text}


def _failed(code: int, body: bytes) -> RequestFailed:
    try:
        status = _status.decode(body)
    except msgspec.DecodeError:
        return RequestFailed(code, body[:200].decode(errors="replace"))
    return RequestFailed(code, status.message or status.reason)

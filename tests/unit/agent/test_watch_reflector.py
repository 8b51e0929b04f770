# SPDX-License-Identifier: Apache-2.0
"""The reflector against a fake API server: pages, bookmarks, 410, broken and silent watches, bad objects."""

from __future__ import annotations

import asyncio
import contextlib
import json

import aiohttp
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from bpfdp_agent.watch.connection import Connection
from bpfdp_agent.watch.reflector import Reflector, Timing
from bpfdp_agent.watch.wire import RESOURCES, Added, Deleted, Kind, Malformed, Modified, Synced

PATH = "/api/v1/services"
FAST = Timing(page=2, inactivity=0.3, short=0.02, first_wait=0.01, longest_wait=0.05)


def obj(name: str, version: int, **spec):
    return {
        "metadata": {"name": name, "namespace": "ns", "resourceVersion": str(version)},
        "spec": {"clusterIP": "10.0.0.1", **spec},
    }


class FakeApi:
    """A list with pages and scripted watches. Each watch is a list of lines, or a status code."""

    def __init__(self):
        self.objects = {}
        self.version = 10
        self.watches: list = []
        self.requests: list[dict[str, str]] = []
        self.expire_continue = 0
        self.fail_lists = 0
        self.fail_code = 403
        self.live: asyncio.Queue = asyncio.Queue()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        query = dict(request.query)
        self.requests.append(query | {"auth": request.headers.get("Authorization", "")})
        if "watch" in query:
            return await self._watch(request)
        if self.fail_lists:
            self.fail_lists -= 1
            return web.json_response(
                {"kind": "Status", "code": self.fail_code, "message": "no"}, status=self.fail_code
            )
        start = int(query.get("continue", "0"))
        if start and self.expire_continue:
            self.expire_continue -= 1
            return web.json_response(
                {"code": 410, "reason": "Expired", "message": "token expired"}, status=410
            )
        limit = int(query["limit"])
        items = [self.objects[n] for n in sorted(self.objects)]
        more = str(start + limit) if start + limit < len(items) else ""
        return web.json_response(
            {
                "metadata": {"resourceVersion": str(self.version), "continue": more},
                "items": items[start : start + limit] or None,
            }
        )

    async def _watch(self, request):
        script = self.watches.pop(0) if self.watches else None
        if isinstance(script, int):
            return web.json_response({"code": script, "message": "no"}, status=script)
        response = web.StreamResponse()
        await response.prepare(request)
        for line in script or ():
            await response.write(
                line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"
            )
        if script and script[-1] == b"":  # cut off in the middle of a chunk
            request.transport.abort()
        while script is None:
            line = await self.live.get()
            await response.write(json.dumps(line).encode() + b"\n")
        return response

    @property
    def lists(self):
        return [r for r in self.requests if "watch" not in r]

    @property
    def watched(self):
        return [r for r in self.requests if "watch" in r]


@contextlib.asynccontextmanager
async def reflecting(api: FakeApi, timing: Timing = FAST, kind: Kind = Kind.SERVICE):
    app = web.Application()
    app.router.add_get(RESOURCES[kind].path, api.handle)
    server = TestServer(app)
    await server.start_server()

    async def authorize():
        return {"Authorization": "Bearer t"}

    connection = Connection(aiohttp.ClientSession(), str(server.make_url("")), authorize)
    queue: asyncio.Queue = asyncio.Queue()
    task = asyncio.create_task(Reflector(RESOURCES[kind], connection, queue, timing).run())
    try:
        yield queue
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await connection.close()
        await server.close()


async def take(queue, count):
    found = []
    for _ in range(count):
        found.append(await asyncio.wait_for(queue.get(), 5))
    return found


def brief(event):
    match event:
        case Added(object=o) | Modified(object=o):
            return (type(event).__name__, o.metadata.name)
        case Deleted(key=k) | Malformed(key=k):
            return (type(event).__name__, k.name)
        case Synced():
            return ("Synced",)


async def briefs(queue, count):
    return [brief(e) for e in await take(queue, count)]


async def test_pages_then_synced_then_changes_from_the_lists_version():
    api = FakeApi()
    api.objects = {n: obj(n, i + 1) for i, n in enumerate("abcde")}
    async with reflecting(api) as queue:
        assert await briefs(queue, 6) == [("Added", n) for n in "abcde"] + [("Synced",)]
        api.live.put_nowait({"type": "MODIFIED", "object": obj("a", 11)})
        api.live.put_nowait({"type": "DELETED", "object": obj("b", 12)})
        api.live.put_nowait({"type": "ADDED", "object": obj("f", 13)})
        assert await briefs(queue, 3) == [("Modified", "a"), ("Deleted", "b"), ("Added", "f")]
    assert len(api.lists) == 3
    assert (
        api.lists[0]["labelSelector"]
        == "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name"
    )
    assert api.watched[0]["resourceVersion"] == "10"
    assert api.watched[0]["allowWatchBookmarks"] == "true"
    assert api.lists[0]["auth"] == "Bearer t"


async def test_a_broken_watch_goes_on_from_the_last_version_without_a_list():
    api = FakeApi()
    api.watches = [
        [{"type": "ADDED", "object": obj("a", 11)}],
        [
            {
                "type": "BOOKMARK",
                "object": {"kind": "Service", "metadata": {"resourceVersion": "40"}},
            },
            b'{"type":"ADD',
        ],
    ]
    async with reflecting(api) as queue:
        assert await briefs(queue, 2) == [("Synced",), ("Added", "a")]
        api.live.put_nowait({"type": "ADDED", "object": obj("b", 41)})
        assert await briefs(queue, 1) == [("Added", "b")]
    assert len(api.lists) == 1
    assert [w["resourceVersion"] for w in api.watched] == ["10", "11", "40"]


@pytest.mark.parametrize(
    "expired",
    [410, [{"type": "ERROR", "object": {"code": 410, "reason": "Expired", "message": "too old"}}]],
)
async def test_an_expired_version_lists_again_and_finds_what_vanished(expired):
    api = FakeApi()
    api.objects = {n: obj(n, i + 1) for i, n in enumerate("abc")}
    api.watches = [[{"type": "ADDED", "object": obj("d", 11)}], expired]
    async with reflecting(api) as queue:
        assert await briefs(queue, 5) == [
            ("Added", "a"),
            ("Added", "b"),
            ("Added", "c"),
            ("Synced",),
            ("Added", "d"),
        ]
        # known while the second watch is still to fail: the next list differs from what was told
        del api.objects["a"]
        api.objects["b"] = obj("b", 20)
        api.version = 30
        assert await briefs(queue, 4) == [
            ("Modified", "b"),
            ("Deleted", "a"),
            ("Deleted", "d"),
            ("Synced",),
        ]


async def test_nothing_is_deleted_when_a_list_breaks_off_between_pages():
    api = FakeApi()
    api.objects = {n: obj(n, i + 1) for i, n in enumerate("abcd")}
    api.watches = [410]
    async with reflecting(api) as queue:
        await take(queue, 5)
        api.expire_continue = 2
        assert await briefs(queue, 1) == [("Synced",)]
        assert queue.empty()


async def test_silence_is_a_dead_connection():
    api = FakeApi()
    async with reflecting(api) as queue:
        assert await briefs(queue, 1) == [("Synced",)]
        await asyncio.sleep(FAST.inactivity * 2 + 0.2)
        assert len(api.watched) >= 2
        assert len(api.lists) == 1


async def test_a_kind_that_never_changes_is_not_a_run_of_failures():
    """No bookmark comes for it; a growing pause after each silence would be a deaf one."""
    api = FakeApi()
    timing = msgspec.structs.replace(FAST, inactivity=0.1, first_wait=5.0, longest_wait=5.0)
    async with reflecting(api, timing) as queue:
        assert await briefs(queue, 1) == [("Synced",)]
        await asyncio.sleep(0.65)
        assert len(api.watched) >= 4


async def test_a_malformed_object_is_named_and_harms_no_other():
    api = FakeApi()
    api.objects = {"a": obj("a", 1), "b": obj("b", 2, ports="none"), "c": obj("c", 3)}
    async with reflecting(api) as queue:
        events = await take(queue, 4)
        assert [brief(e) for e in events] == [
            ("Added", "a"),
            ("Malformed", "b"),
            ("Added", "c"),
            ("Synced",),
        ]
        assert "$.spec.ports" in events[1].error
        assert str(events[1].key) == "ns/b"
        api.live.put_nowait({"type": "MODIFIED", "object": obj("a", 11, ports=7)})
        api.live.put_nowait({"type": "MODIFIED", "object": obj("b", 12)})
        api.live.put_nowait({"type": "ADDED", "object": {"metadata": []}})
        api.live.put_nowait({"type": "DELETED", "object": obj("a", 13, ports=7)})
        assert await briefs(queue, 4) == [
            ("Malformed", "a"),
            ("Modified", "b"),
            ("Malformed", ""),
            ("Deleted", "a"),
        ]
    assert len(api.watched) == 1


async def test_an_object_that_became_malformed_is_not_deleted_by_a_list():
    api = FakeApi()
    api.objects = {"a": obj("a", 1)}
    api.watches = [410]
    async with reflecting(api) as queue:
        await take(queue, 1)
        api.objects["a"] = obj("a", 2, ports={})
        assert await briefs(queue, 3) == [("Synced",), ("Malformed", "a"), ("Synced",)]


async def test_refusals_are_retried_and_say_what_to_do(caplog):
    api = FakeApi()
    api.fail_lists = 3
    async with reflecting(api) as queue:
        assert await briefs(queue, 1) == [("Synced",)]
    assert "ClusterRole must allow get, list and watch" in caplog.text


async def test_a_kind_that_may_be_absent_is_as_good_as_empty(caplog):
    api = FakeApi()
    api.fail_lists, api.fail_code = 2, 404
    timing = msgspec.structs.replace(FAST, absent=0.01)
    async with reflecting(api, timing, Kind.SERVICE_CIDR) as queue:
        assert await briefs(queue, 3) == [("Synced",)] * 3
    assert "trying again" not in caplog.text


async def test_a_server_that_always_says_expired_is_not_hammered():
    api = FakeApi()
    api.watches = [410] * 10000
    async with reflecting(
        api, Timing(page=2, inactivity=1, first_wait=0.05, longest_wait=0.2)
    ) as queue:
        await asyncio.sleep(0.6)
        assert 2 <= len(api.lists) <= 12
        assert queue.qsize() == len(api.lists)


async def test_long_lines_and_lines_cut_in_two():
    api = FakeApi()
    big = (
        json.dumps({"type": "ADDED", "object": obj("big", 11, note="x" * 3_000_000)}).encode()
        + b"\n"
    )
    api.watches = [[big[:100], big[100:]]]
    async with reflecting(api) as queue:
        assert await briefs(queue, 2) == [("Synced",), ("Added", "big")]


async def test_a_connection_that_is_cut_off_goes_on_from_the_last_version():
    api = FakeApi()
    api.watches = [[{"type": "ADDED", "object": obj("a", 11)}, b'{"type":', b""]]
    async with reflecting(api) as queue:
        assert await briefs(queue, 2) == [("Synced",), ("Added", "a")]
        api.live.put_nowait({"type": "ADDED", "object": obj("b", 12)})
        assert await briefs(queue, 1) == [("Added", "b")]
    assert [w["resourceVersion"] for w in api.watched] == ["10", "11"]
    assert len(api.lists) == 1


async def test_a_line_that_is_no_json_starts_again_with_a_list():
    api = FakeApi()
    api.watches = [[b'{"type":\n']]
    async with reflecting(api) as queue:
        assert await briefs(queue, 2) == [("Synced",), ("Synced",)]


async def test_no_api_server_is_waited_for(caplog, unused_tcp_port):
    async def authorize():
        return {}

    connection = Connection(
        aiohttp.ClientSession(), f"http://127.0.0.1:{unused_tcp_port}", authorize
    )
    with pytest.raises(OSError, match=r"127\.0\.0\.1"):
        await connection.request("GET", PATH)
    reflector = Reflector(RESOURCES[Kind.SERVICE], connection, asyncio.Queue(), FAST)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reflector.run(), 0.2)
    await connection.close()
    assert "trying again" in caplog.text

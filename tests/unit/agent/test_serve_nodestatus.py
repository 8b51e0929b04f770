# SPDX-License-Identifier: Apache-2.0
"""BpfNode: conditions keep their transition times, idle nodes write nothing, refusals are retried."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from bpfdp_agent.serve.nodestatus import NodeStatus, NodeStatusWriter, percent_in_steps


class Clock:
    def __init__(self) -> None:
        self.ticks = 0

    def __call__(self) -> str:
        self.ticks += 1
        return f"t{self.ticks}"


class FakeClient:
    """An API server with one node and one BpfNode."""

    def __init__(self) -> None:
        self.writes: list[tuple[str, dict]] = []
        self.refuse = 0
        self.stored = b""

    async def request(
        self, method, path, *, params=None, body=None, content_type="application/json"
    ):
        if method == "GET":
            if "bpfnodes" in path:
                return (200, self.stored) if self.stored else (404, b"{}")
            return 200, b'{"metadata": {"uid": "u1"}}'
        if self.refuse:
            self.refuse -= 1
            return 403, b"no"
        assert params["fieldManager"] == "bpfdp-agent"
        self.writes.append((path, msgspec.json.decode(body)))
        return 200, b"{}"


def status() -> NodeStatus:
    return NodeStatus("1", "6.18", Clock())


def test_transition_time_moves_only_with_the_status():
    s = status()
    assert s.condition("Attached", False, "Syncing", "a")
    first = s.get("Attached").last_transition_time
    assert not s.condition("Attached", False, "Syncing", "b")
    assert s.get("Attached").last_transition_time == first
    assert s.get("Attached").message == "b"
    assert s.condition("Attached", True, "Attached", "c")
    assert s.get("Attached").last_transition_time != first


def test_ready_sums_up_the_others():
    s = status()
    for kind in ("FeaturesSupported", "ProgramsLoaded", "ServicesSynced", "PoliciesSynced"):
        s.condition(kind, True, "Synced", "well")
        assert not s.is_true("Ready")
    s.condition("Attached", True, "Attached", "well")
    assert s.is_true("Ready")
    s.condition("ProgramsLoaded", False, "TemplateError", "line 3")
    assert (s.get("Ready").reason, s.get("Ready").message) == ("TemplateError", "line 3")
    s.condition("Attached", False, "Detached", "gone")
    assert (s.get("Ready").status, s.get("Ready").reason) == ("True", "Detached")


def test_the_same_again_is_no_change():
    s = status()
    s.condition("Attached", True, "Attached", "c")
    s.error("MapFull", "full", "Service a/b")
    s.changed.clear()
    s.condition("Attached", True, "Attached", "c")
    s.error("MapFull", "full", "Service a/b")
    s.update(pods=0)
    assert not s.changed.is_set()


def test_an_error_is_cleared_by_its_own_cause_and_uncovers_the_one_before():
    s = status()
    s.error("MapFull", "full", concern="services")
    s.error("InvalidObject", "bad", "Service a/b")
    s.clear_error("Service a/c")
    assert s.current.last_error.object == "Service a/b"
    s.clear_error("Service a/b")
    assert s.current.last_error.reason == "MapFull"
    s.clear_error(concern="services")
    assert s.current.last_error is None


@pytest.mark.parametrize(("used", "percent"), [(0, 0), (1, 5), (50, 50), (51, 55), (100, 100)])
def test_map_use_comes_in_steps(used, percent):
    assert percent_in_steps(used, 100) == percent


@pytest.mark.looptime
async def test_writes_only_on_change_and_creates_with_the_node_as_owner():
    client, s = FakeClient(), status()
    writer = asyncio.create_task(NodeStatusWriter(client, "n1", s).run())
    s.update(pods=3)
    await asyncio.sleep(60)
    assert [path.rsplit("/", 1)[1] for path, _ in client.writes] == ["n1", "status"]
    assert client.writes[0][1]["metadata"]["ownerReferences"][0]["uid"] == "u1"
    assert client.writes[1][1]["status"]["pods"] == 3
    assert "lastError" not in client.writes[1][1]["status"]
    for n in range(100):
        s.update(pods=n)
        await asyncio.sleep(0.1)
    await asyncio.sleep(3)
    assert len(client.writes) <= 2 + 6
    assert client.writes[-1][1]["status"]["pods"] == 99
    writer.cancel()


@pytest.mark.looptime
async def test_a_refused_write_is_retried():
    client, s = FakeClient(), status()
    client.refuse = 3
    writer = asyncio.create_task(NodeStatusWriter(client, "n1", s).run())
    s.update(pods=3)
    await asyncio.sleep(120)
    assert client.writes[-1][1]["status"]["pods"] == 3
    writer.cancel()


async def test_a_restarted_agent_keeps_transition_times():
    client = FakeClient()
    before = status()
    before.condition("Attached", True, "Attached", "x")
    client.stored = msgspec.json.encode({"status": before.current})
    after = NodeStatus("2", "6.18", Clock())
    await NodeStatusWriter(client, "n1", after).load()
    assert after.get("Attached").last_transition_time == "t1"
    assert after.current.agent_version == "2"

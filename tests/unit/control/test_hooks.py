# SPDX-License-Identifier: Apache-2.0
"""The restore hook says why it did not finish, before its Job and Helm's patience end."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import msgspec
import pytest
from bpfdp_operator import hooks
from bpfdp_operator import world as w
from unit.control.fakecluster import DEPLOYMENT

HELM_SECONDS = 240.0


class FakeConnection:
    """An API server whose config is asked to go and stays; the operator is up, or is not."""

    operator_up = True

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def request(self, *_):
        return b""

    async def find(self, path):
        if "deployments" in path:
            replicas = int(self.operator_up)
            return msgspec.json.encode({"status": {"availableReplicas": replicas}})
        raise AssertionError(path)


class FakeReconciler:
    """Works and gets nowhere."""

    began: list[float] = []
    config_gone = False

    def __init__(self, *_, **__):
        self.store = SimpleNamespace(get=lambda *_: config("1"))

    async def run(self):
        self.began.append(asyncio.get_running_loop().time())
        await asyncio.Event().wait()


def config(version: str) -> w.Config:
    return w.Config(
        metadata=w.Metadata(name="default", resource_version=version),
        spec=w.ConfigSpec(),
        status=w.ConfigStatus(message="kube-proxy is not Ready on node-2."),
    )


@pytest.fixture
def versions(monkeypatch):
    """Set `moving` to make the status change at every look."""
    found = SimpleNamespace(moving=False, number=0)

    async def find(*_):
        found.number += found.moving
        return config(str(found.number))

    monkeypatch.setattr(hooks, "Connection", FakeConnection)
    monkeypatch.setattr(hooks, "Reconciler", FakeReconciler)
    monkeypatch.setattr(hooks.observe, "find", find)
    monkeypatch.setattr(FakeReconciler, "began", [])
    monkeypatch.delenv("BPFDP_RESTORE_SECONDS", raising=False)
    clock = SimpleNamespace(monotonic=lambda: asyncio.get_running_loop().time())
    monkeypatch.setattr(hooks, "time", clock)
    return found


async def fails_after() -> float:
    began = asyncio.get_running_loop().time()
    with pytest.raises(hooks.HookError, match="in time: kube-proxy is not Ready on node-2"):
        await hooks.restore(DEPLOYMENT)
    return asyncio.get_running_loop().time() - began


@pytest.mark.looptime
@pytest.mark.parametrize(
    ("moving", "up", "own_work"), [(True, True, None), (False, True, 60), (True, False, 20)]
)
async def test_it_gives_up_before_its_job_is_killed(versions, monkeypatch, moving, up, own_work):
    versions.moving = moving
    monkeypatch.setattr(FakeConnection, "operator_up", up)
    began = asyncio.get_running_loop().time()
    assert await fails_after() < hooks.JOB_SECONDS - 10 < HELM_SECONDS - 20
    after = [at - began for at in FakeReconciler.began]
    assert after == ([] if own_work is None else [pytest.approx(own_work, abs=5)])


@pytest.mark.looptime
async def test_a_longer_deadline_is_used(versions, monkeypatch):
    monkeypatch.setenv("BPFDP_RESTORE_SECONDS", "600")
    assert 570 < await fails_after() < 590


def test_a_deadline_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("BPFDP_RESTORE_SECONDS", "5m")
    with pytest.raises(hooks.HookError, match="'5m'"):
        hooks.restore_seconds()

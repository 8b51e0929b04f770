# SPDX-License-Identifier: Apache-2.0
"""What goes over the wire: the verb, the content type and the body of every write."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from bpfdp_operator import plan as p
from bpfdp_operator import world as w
from bpfdp_operator.apply import EVENT_REPEAT_SECONDS, Applier
from bpfdp_operator.connection import APPLY, MERGE, ApiError
from bpfdp_operator.store import Store
from unit.control.fakecluster import DEPLOYMENT, cluster, condition

NOW = 1_800_000_000.0
CONFIG = "/apis/bpfdataplane.io/v1alpha1/bpfdataplanes/default"
PROXY = "/apis/apps/v1/namespaces/kube-system/daemonsets/kube-proxy"


class Recorder:
    """A connection that notes every request, and answers with what the request made."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, Any, str]] = []
        self.refuse: dict[str, int] = {}

    async def request(
        self, method: str, path: str, *, query: Any = None, body: Any = None,
        content_type: str = "application/json",
    ) -> bytes:  # fmt: skip
        self.sent.append((method, path, body, content_type))
        if method in self.refuse:
            raise ApiError(self.refuse[method], method, path, "refused")
        answer = {"metadata": {"name": path.rsplit("/", 1)[-1], "resourceVersion": "8"}}
        if path.startswith(CONFIG):
            answer["metadata"] |= {"name": "default", "uid": "u"}
        return json.dumps(answer).encode()

    def to(self, path: str) -> list[Any]:
        return [body for _, where, body, _ in self.sent if where == path]


class Setup:
    def __init__(self) -> None:
        self.recorder = Recorder()
        self.store = Store()
        self.memory = w.Memory()
        self.applier = Applier(self.recorder, self.store, DEPLOYMENT, self.memory)  # type: ignore[arg-type]
        config = cluster().config
        assert config is not None
        metadata = msgspec.structs.replace(config.metadata, resource_version="7")
        self.config = msgspec.structs.replace(config, metadata=metadata)
        self.store.put(self.config)

    async def do(self, action: p.Action, now: float = NOW) -> None:
        await self.applier.carry_out(action, self.config, now)

    @property
    def events(self) -> list[Any]:
        return self.recorder.to("/api/v1/namespaces/default/events")


@pytest.fixture
def made() -> Setup:
    return Setup()


async def test_only_the_one_key_of_kube_proxy_is_patched(made: Setup) -> None:
    await made.do(p.RemoveKubeProxy())
    method, path, body, kind = made.recorder.sent[0]
    assert (method, path, kind) == ("PATCH", PROXY, MERGE)
    selector = body["spec"]["template"]["spec"].pop("nodeSelector")
    assert selector == {"bpfdataplane.io/kube-proxy": "true"}
    assert body == {"spec": {"template": {"spec": {}}}}
    assert made.memory.selector_patches == 1
    await made.do(p.RestoreKubeProxy())
    assert made.memory.selector_patches == 0
    (_, body) = made.recorder.to(PROXY)
    assert body["spec"]["template"]["spec"]["nodeSelector"] == {"bpfdataplane.io/kube-proxy": None}


async def test_the_agents_are_applied_server_side(made: Setup) -> None:
    await made.do(p.ApplyAgent({"kind": "DaemonSet"}, "Rolling out."))
    method, path, _, kind = made.recorder.sent[0]
    assert (method, kind) == ("PATCH", APPLY)
    assert path == "/apis/apps/v1/namespaces/bpf-dataplane/daemonsets/bpfdp-agent"
    assert [e["message"] for e in made.events] == ["Rolling out."]


async def test_finalizers_of_others_stay(made: Setup) -> None:
    metadata = msgspec.structs.replace(made.config.metadata, finalizers=("other/one",))
    made.store.put(msgspec.structs.replace(made.config, metadata=metadata))
    await made.do(p.AddFinalizer())
    (body,) = made.recorder.to(CONFIG)
    assert body["metadata"]["finalizers"] == ["other/one", w.FINALIZER]
    assert body["metadata"]["resourceVersion"] == "7"


async def test_an_event_names_the_config_and_is_not_repeated(made: Setup) -> None:
    for passed in (0.0, 1.0, EVENT_REPEAT_SECONDS + 1):
        await made.do(p.KeepKubeProxy("n1"), NOW + passed)
    first, second = made.events
    assert first["involvedObject"]["kind"] == "BpfDataplaneConfig"
    assert first["involvedObject"]["uid"] == "u"
    assert first["metadata"]["name"] != second["metadata"]["name"]


async def test_a_refused_event_stops_nothing(made: Setup) -> None:
    made.recorder.refuse["POST"] = 403
    await made.do(p.KeepKubeProxy("n1"))
    assert made.recorder.to("/api/v1/nodes/n1")


async def test_what_is_gone_already_need_not_be_deleted(made: Setup) -> None:
    made.recorder.refuse["DELETE"] = 404
    await made.do(p.DeleteBpfNode("n1"))
    await made.do(p.DeleteAgent())
    made.recorder.refuse["DELETE"] = 500
    with pytest.raises(ApiError):
        await made.do(p.DeleteBpfNode("n1"))


async def test_the_status_is_written_on_change_only(made: Setup) -> None:
    assert not await made.applier.write_status(made.config, made.config.status, NOW)
    assert made.recorder.sent == []
    status = w.ConfigStatus(conditions=(condition("Degraded", True, "MapFull"),))
    assert await made.applier.write_status(made.config, status, NOW)
    (body,) = made.recorder.to(f"{CONFIG}/status")
    assert body["status"]["conditions"][0]["reason"] == "MapFull"
    assert body["status"]["kubeProxy"] == {"state": "", "mode": ""}
    (event,) = made.events
    assert event["type"] == "Warning"


async def test_the_wait_for_detaching_starts_once(made: Setup) -> None:
    status = w.ConfigStatus(agents=w.AgentsStatus(mode="Detach"))
    await made.applier.write_status(made.config, status, NOW)
    await made.applier.write_status(made.config, status, NOW + 50)
    assert made.memory.detaching_since == NOW
    await made.applier.write_status(made.config, w.ConfigStatus(), NOW + 60)
    assert made.memory.detaching_since is None


async def test_a_config_that_is_gone_has_no_status(made: Setup) -> None:
    made.recorder.refuse["PATCH"] = 404
    status = w.ConfigStatus(message="x")
    assert not await made.applier.write_status(made.config, status, NOW)
    assert made.store.get(w.Config, "default") is None

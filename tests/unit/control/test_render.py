# SPDX-License-Identifier: Apache-2.0
"""The agents' manifest: what must be in it, and when its hash changes."""

from __future__ import annotations

from typing import Any

from bpfdp_operator import world as w
from bpfdp_operator.endpoint import ApiEndpoint
from bpfdp_operator.render import HASH_ANNOTATION, agent_daemonset

DEPLOYMENT = w.Deployment(namespace="ns", image="registry/image@sha256:1", pull_policy="Always")
ENDPOINT = ApiEndpoint("2001:db8::1", 6443, "EndpointSlice")


def render(**spec: Any) -> dict[str, Any]:
    return agent_daemonset(w.ConfigSpec(**spec), ENDPOINT, DEPLOYMENT)


def pod(manifest: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = manifest["spec"]["template"]["spec"]
    return result


def test_agents_reach_the_api_server_without_a_service() -> None:
    env = {e["name"]: e for e in pod(render())["containers"][0]["env"]}
    assert env["KUBERNETES_SERVICE_HOST"]["value"] == "2001:db8::1"
    assert env["KUBERNETES_SERVICE_PORT"]["value"] == "6443"
    assert env["NODE_NAME"]["valueFrom"]["fieldRef"]["fieldPath"] == "spec.nodeName"
    assert pod(render())["hostNetwork"] is True
    assert pod(render())["dnsPolicy"] == "Default"


def test_a_restart_does_not_unmount_the_maps() -> None:
    mounts = {m["mountPath"]: m for m in pod(render())["containers"][0]["volumeMounts"]}
    assert mounts["/sys/fs/bpf"]["mountPropagation"] == "Bidirectional"
    assert mounts["/run/netns"]["mountPropagation"] == "HostToContainer"
    assert mounts["/sys/fs/cgroup"]["readOnly"] is True


def test_probes_stay_on_localhost() -> None:
    container = pod(render())["containers"][0]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["host"] == "127.0.0.1"
        assert container[probe]["httpGet"]["port"] == 9099
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"


def test_tolerates_everything_unless_told() -> None:
    assert pod(render())["tolerations"] == [{"operator": "Exists"}]
    agent = w.NodeAgentSpec(tolerations=({"key": "x", "operator": "Exists"},))
    assert pod(render(node_agent=agent))["tolerations"] == [{"key": "x", "operator": "Exists"}]


def test_overrides() -> None:
    agent = w.NodeAgentSpec(
        image="other:1",
        resources={"limits": {"memory": "1Gi"}},
        node_selector={"a": "b"},
        priority_class_name="high",
        update_strategy={"type": "OnDelete"},
    )
    manifest = render(node_agent=agent)
    assert pod(manifest)["containers"][0]["image"] == "other:1"
    assert pod(manifest)["containers"][0]["resources"] == {"limits": {"memory": "1Gi"}}
    assert pod(manifest)["nodeSelector"] == {"a": "b"}
    assert pod(manifest)["priorityClassName"] == "high"
    assert manifest["spec"]["updateStrategy"] == {"type": "OnDelete"}


def test_the_hash_changes_with_the_manifest_only() -> None:
    def hash_of(manifest: dict[str, Any]) -> str:
        found: str = manifest["metadata"]["annotations"][HASH_ANNOTATION]
        return found

    assert hash_of(render()) == hash_of(render(paused=True))
    other = agent_daemonset(w.ConfigSpec(), ApiEndpoint("192.0.2.1", 6443, ""), DEPLOYMENT)
    assert hash_of(render()) != hash_of(other)

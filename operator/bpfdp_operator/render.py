# SPDX-License-Identifier: Apache-2.0
"""The agents' DaemonSet as a manifest for server-side apply (pure)."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import msgspec

from bpfdp_operator.world import AGENT_NAME, FIELD_MANAGER, GROUP

if TYPE_CHECKING:
    from bpfdp_operator.endpoint import ApiEndpoint
    from bpfdp_operator.world import ConfigSpec, Deployment

HASH_ANNOTATION = f"{GROUP}/manifest-hash"
SELECTOR = {
    "app.kubernetes.io/name": "bpf-dataplane",
    "app.kubernetes.io/component": "agent",
}
AGENT_PODS = ",".join(f"{key}={value}" for key, value in SELECTOR.items())

# name, path on the node, hostPath type, read-only, mount propagation
_MOUNTS = (
    # A restart of the container must not tear the mount down: that would free every map.
    ("bpffs", "/sys/fs/bpf", "Directory", False, "Bidirectional"),
    ("cgroup", "/sys/fs/cgroup", "Directory", True, "HostToContainer"),
    # Network namespaces of pods appear there as mounts, after the agent has started.
    ("netns", "/run/netns", "DirectoryOrCreate", False, "HostToContainer"),
    ("xtables-lock", "/run/xtables.lock", "FileOrCreate", False, None),
    ("cache", "/var/lib/bpfdp", "DirectoryOrCreate", False, None),
)


def agent_daemonset(
    spec: ConfigSpec, endpoint: ApiEndpoint, deployment: Deployment
) -> dict[str, Any]:
    """Return the whole DaemonSet; its hash stands in an annotation, so that a change is seen."""
    labels = SELECTOR | {"app.kubernetes.io/managed-by": FIELD_MANAGER}
    manifest: dict[str, Any] = {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {
            "name": AGENT_NAME,
            "namespace": deployment.namespace,
            "labels": labels,
        },
        "spec": {
            "selector": {"matchLabels": SELECTOR},
            "updateStrategy": spec.node_agent.update_strategy
            or {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}},
            "template": {
                "metadata": {"labels": labels},
                "spec": _pod(spec, endpoint, deployment),
            },
        },
    }
    text = msgspec.json.encode(manifest, order="deterministic")
    manifest["metadata"]["annotations"] = {HASH_ANNOTATION: hashlib.sha256(text).hexdigest()[:16]}
    return manifest


def _pod(spec: ConfigSpec, endpoint: ApiEndpoint, deployment: Deployment) -> dict[str, Any]:
    agent = spec.node_agent
    tolerations = agent.tolerations if agent.tolerations is not None else ({"operator": "Exists"},)
    pod: dict[str, Any] = {
        "serviceAccountName": AGENT_NAME,
        "hostNetwork": True,
        # The agent must come up where cluster DNS does not answer yet: that is its own work.
        "dnsPolicy": "Default",
        "priorityClassName": agent.priority_class_name,
        "terminationGracePeriodSeconds": 10,
        "tolerations": list(tolerations),
        "containers": [_container(spec, endpoint, deployment)],
        "volumes": [
            {"name": name, "hostPath": {"path": path, "type": kind}}
            for name, path, kind, _, _ in _MOUNTS
        ],
    }
    if agent.node_selector:
        pod["nodeSelector"] = agent.node_selector
    return pod


def _container(spec: ConfigSpec, endpoint: ApiEndpoint, deployment: Deployment) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": "agent",
        "image": spec.node_agent.image or deployment.image,
        "imagePullPolicy": deployment.pull_policy,
        "command": ["bpfdp", "agent"],
        "env": _environment(spec, endpoint),
        "securityContext": {"privileged": True},
        "volumeMounts": [_mount(*mount) for mount in _MOUNTS],
    }
    if spec.node_agent.resources:
        container["resources"] = spec.node_agent.resources
    port = spec.observability.health_port
    if port:
        container |= {
            "startupProbe": _probe("/livez", port, periodSeconds=2, failureThreshold=150),
            "readinessProbe": _probe("/readyz", port, periodSeconds=5, failureThreshold=3),
            "livenessProbe": _probe("/livez", port, periodSeconds=10, failureThreshold=6),
        }
    return container


def _environment(spec: ConfigSpec, endpoint: ApiEndpoint) -> list[dict[str, Any]]:
    fields = {
        "NODE_NAME": "spec.nodeName",
        "NODE_IPS": "status.hostIPs",
        "POD_NAMESPACE": "metadata.namespace",
        "POD_NAME": "metadata.name",
    }
    values = {
        # The API server's real endpoint: its ClusterIP works only once the agent has done its work.
        "KUBERNETES_SERVICE_HOST": endpoint.host,
        "KUBERNETES_SERVICE_PORT": str(endpoint.port),
        "BPFDP_HEALTH_PORT": str(spec.observability.health_port),
        "BPFDP_METRICS_PORT": str(spec.observability.metrics_port),
    }
    return [
        {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
        for name, path in fields.items()
    ] + [{"name": name, "value": value} for name, value in values.items()]


def _mount(
    name: str, path: str, _kind: str, read_only: bool, propagation: str | None
) -> dict[str, Any]:
    mount: dict[str, Any] = {"name": name, "mountPath": path}
    if read_only:
        mount["readOnly"] = True
    if propagation:
        mount["mountPropagation"] = propagation
    return mount


def _probe(path: str, port: int, **timing: int) -> dict[str, Any]:
    probe: dict[str, Any] = {"httpGet": {"host": "127.0.0.1", "path": path, "port": port}}
    return probe | {"timeoutSeconds": 5} | timing

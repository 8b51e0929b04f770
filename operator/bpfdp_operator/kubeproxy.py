# SPDX-License-Identifier: Apache-2.0
"""kube-proxy: what it is doing, and whether it may be touched (pure).

It is removed by one nodeSelector key that asks for a node label, and put back by taking that key
away: the key is itself the saved state. Where something else owns the DaemonSet it is not touched;
that owner would put it back.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
import yaml

from bpfdp_operator.world import KUBE_PROXY_LABEL, KUBE_PROXY_NAME, KUBE_PROXY_NAMESPACE

if TYPE_CHECKING:
    from bpfdp_operator.world import DaemonSet, Node, World

# Each of these says that a tool applies the DaemonSet again and again.
OWNER_KEYS = (
    "addonmanager.kubernetes.io/mode",
    "argocd.argoproj.io/tracking-id",
    "argocd.argoproj.io/instance",
    "helm.sh/chart",
    "meta.helm.sh/release-name",
    "kustomize.toolkit.fluxcd.io/name",
    "helm.toolkit.fluxcd.io/name",
)
MANAGED_BY = "app.kubernetes.io/managed-by"


def selector_patch(value: str | None) -> dict[str, Any]:
    """Return the merge patch that sets (or, with None, takes away) the one nodeSelector key."""
    return {"spec": {"template": {"spec": {"nodeSelector": {KUBE_PROXY_LABEL: value}}}}}


def command(value: str | None) -> str:
    """Return what a user runs to make that change by hand."""
    patch = json.dumps(selector_patch(value), separators=(",", ":"))
    subject = f"-n {KUBE_PROXY_NAMESPACE} patch daemonset {KUBE_PROXY_NAME}"
    return f"kubectl {subject} --type merge -p '{patch}'"


class KubeProxy(msgspec.Struct, frozen=True, kw_only=True):
    """What is seen of kube-proxy.

    `removed` is the nodeSelector key's presence; `serving` are nodes (not labelled to keep it) that
    still have a pod; `waiting` are nodes whose pod is not Ready though the node is.
    """

    present: bool
    owner: str = ""
    removed: bool = False
    mode: str = ""
    serving: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    rolled_out: bool = True
    scheduled: int = 0

    @property
    def gone(self) -> bool:
        """Whether no pod serves any more and none will come."""
        return not self.serving and self.rolled_out and (self.removed or self.scheduled == 0)

    @property
    def ready(self) -> bool:
        """Whether it serves on every Ready node that it belongs on."""
        return self.present and not self.removed and self.rolled_out and not self.waiting


def owner_of(daemonset: DaemonSet) -> str:
    """Return `key=value` of the mark that says who applies it, or an empty string."""
    marks = daemonset.metadata.annotations | daemonset.metadata.labels
    manager = marks.get(MANAGED_BY, "")
    if manager and manager.lower() != "none":
        return f"{MANAGED_BY}={manager}"
    return next((f"{key}={marks[key]}" for key in OWNER_KEYS if key in marks), "")


def mode_of(daemonset: DaemonSet, config: str) -> str:
    """Read the proxy mode from the flag, else from KubeProxyConfiguration (empty is iptables)."""
    for container in daemonset.spec.template.spec.containers:
        for word in [*container.get("command", ()), *container.get("args", ())]:
            if str(word).startswith("--proxy-mode="):
                return str(word).partition("=")[2].lower()
    try:
        document = yaml.safe_load(config) if config else None
    except yaml.YAMLError:
        return ""
    mode = document.get("mode") if isinstance(document, dict) else None
    return str(mode or "iptables").lower() if document else ""


def keeps(node: Node) -> bool:
    """Tell whether the node carries the label with which kube-proxy stays there."""
    return node.metadata.labels.get(KUBE_PROXY_LABEL) == "true"


def observe(world: World) -> KubeProxy:
    """Describe kube-proxy as the snapshot shows it."""
    daemonset = world.kube_proxy
    if daemonset is None:
        return KubeProxy(present=False)
    kept = {
        n.metadata.name for n in world.nodes if n.metadata.labels.get(KUBE_PROXY_LABEL) == "true"
    }
    alive = {n.metadata.name for n in world.nodes if n.ready}
    pods = [p for p in world.kube_proxy_pods if p.status.phase not in ("Succeeded", "Failed")]
    ready = {p.spec.node_name for p in pods if p.ready}
    placed = {p.spec.node_name for p in pods if p.spec.node_name}
    scheduled = daemonset.status.desired_number_scheduled
    return KubeProxy(
        present=True,
        owner=owner_of(daemonset),
        removed=KUBE_PROXY_LABEL in daemonset.spec.template.spec.node_selector,
        mode=mode_of(daemonset, world.kube_proxy_config),
        serving=tuple(sorted(placed - kept)),
        waiting=tuple(sorted((placed & alive) - ready)),
        rolled_out=daemonset.observed and len(placed) >= scheduled,
        scheduled=scheduled,
    )

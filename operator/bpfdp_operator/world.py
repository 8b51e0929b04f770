# SPDX-License-Identifier: Apache-2.0
"""What the operator knows of the cluster at one moment: typed, only the fields that are used.

The structs mirror the API's own shapes (camelCase on the wire); fields that are passed through to a
manifest unread (resources, tolerations) stay plain JSON.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec

GROUP = "bpfdataplane.io"
VERSION = "v1alpha1"
CONFIG_NAME = "default"
FINALIZER = f"{GROUP}/finalizer"
AGENT_NAME = "bpfdp-agent"
KUBE_PROXY_NAME = "kube-proxy"
KUBE_PROXY_NAMESPACE = "kube-system"
KUBE_PROXY_LABEL = f"{GROUP}/kube-proxy"
"""Nodes with this label set to "true" keep kube-proxy; its DaemonSet asks for it once removed."""
KEPT_ANNOTATION = f"{GROUP}/kube-proxy-kept-by"
"""Marks a node label as the operator's own, so that one set by a person is never taken away."""
FIELD_MANAGER = "bpfdp-operator"


class ApiObject(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """Base of everything read from the API server."""


class Metadata(ApiObject, frozen=True):
    """ObjectMeta."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    finalizers: tuple[str, ...] = ()
    deletion_timestamp: str | None = None


class Condition(ApiObject, frozen=True):
    """metav1.Condition; also fits the conditions of Nodes and Pods."""

    type: str
    status: str
    reason: str = ""
    message: str = ""
    last_transition_time: str | None = None
    observed_generation: int = 0


def condition_of(conditions: tuple[Condition, ...], kind: str) -> Condition | None:
    """Return the condition of that type, or None."""
    return next((c for c in conditions if c.type == kind), None)


def is_true(conditions: tuple[Condition, ...], kind: str) -> bool:
    """Tell whether the condition of that type is present and True."""
    found = condition_of(conditions, kind)
    return found is not None and found.status == "True"


def is_false(conditions: tuple[Condition, ...], kind: str) -> bool:
    """Tell whether the condition of that type is present and False."""
    found = condition_of(conditions, kind)
    return found is not None and found.status == "False"


class AgentsMode(StrEnum):
    """What the agents are told to do."""

    ATTACH = "Attach"
    DETACH = "Detach"


class KubeProxyState(StrEnum):
    """Who does services. Only `Disabled` lets agents clear kube-proxy's rules."""

    RUNNING = "Running"
    REMOVING = "Removing"
    DISABLED = "Disabled"
    RESTORING = "Restoring"
    NOT_FOUND = "NotFound"
    EXTERNALLY_MANAGED = "ExternallyManaged"
    CONFLICT = "Conflict"


class ApiServerSpec(ApiObject, frozen=True):
    """Where agents find the API server."""

    mode: str = "Auto"
    host: str = ""
    port: int = 0


class ObservabilitySpec(ApiObject, frozen=True):
    """Ports and log level of the agents."""

    log_level: str = "Info"
    metrics_port: int = 9091
    health_port: int = 9099


class NodeAgentSpec(ApiObject, frozen=True):
    """Overrides of the agents' DaemonSet, in the API's own shapes."""

    image: str = ""
    resources: dict[str, Any] = {}
    node_selector: dict[str, str] = {}
    tolerations: tuple[dict[str, Any], ...] | None = None
    priority_class_name: str = "system-node-critical"
    update_strategy: dict[str, Any] = {}


class ConfigSpec(ApiObject, frozen=True):
    """The parts of BpfDataplaneConfig.spec that the operator acts on; agents read the rest."""

    dataplane: str = "Enabled"
    kube_proxy_management: str = "Disabled"
    paused: bool = False
    unsupported_nodes: str = "Block"
    api_server: ApiServerSpec = ApiServerSpec()
    observability: ObservabilitySpec = ObservabilitySpec()
    node_agent: NodeAgentSpec = NodeAgentSpec()


class NodesStatus(ApiObject, frozen=True):
    """How many nodes are where."""

    desired: int = 0
    ready: int = 0
    updated: int = 0
    unsupported: int = 0
    summary: str = "0/0"


class KubeProxyStatus(ApiObject, frozen=True):
    """kube-proxy as the operator sees it."""

    state: str = ""
    mode: str = ""


class ApiServerStatus(ApiObject, frozen=True):
    """The endpoint that agents were given, and where it was found."""

    endpoint: str = ""
    source: str = ""


class AgentsStatus(ApiObject, frozen=True):
    """The operator's word to the agents."""

    mode: str = ""


class ConfigStatus(ApiObject, frozen=True):
    """BpfDataplaneConfig.status."""

    observed_generation: int = 0
    conditions: tuple[Condition, ...] = ()
    message: str = ""
    version: str = ""
    nodes: NodesStatus = NodesStatus()
    kube_proxy: KubeProxyStatus = KubeProxyStatus()
    api_server: ApiServerStatus = ApiServerStatus()
    services: int = 0
    backends: int = 0
    policies: int = 0
    agents: AgentsStatus = AgentsStatus()


class Config(ApiObject, frozen=True):
    """The BpfDataplaneConfig."""

    metadata: Metadata
    spec: ConfigSpec = ConfigSpec()
    status: ConfigStatus = ConfigStatus()

    @property
    def deleting(self) -> bool:
        """Whether deletion has been asked for."""
        return self.metadata.deletion_timestamp is not None

    @property
    def wanted(self) -> bool:
        """Whether nodes should run the dataplane."""
        return not self.deleting and self.spec.dataplane == "Enabled"


class LastError(ApiObject, frozen=True):
    """What went wrong last on a node, while it still matters."""

    reason: str = ""
    message: str = ""
    object: str = ""


class BpfNodeStatus(ApiObject, frozen=True):
    """BpfNode.status, as far as it is aggregated."""

    observed_config_generation: int = 0
    agent_version: str = ""
    conditions: tuple[Condition, ...] = ()
    services: int = 0
    backends: int = 0
    policies: int = 0
    last_error: LastError | None = None


class BpfNode(ApiObject, frozen=True):
    """One node's report, written by its agent alone."""

    metadata: Metadata
    status: BpfNodeStatus = BpfNodeStatus()


class PodTemplateSpec(ApiObject, frozen=True):
    """The pod spec fields of a DaemonSet's template that matter here."""

    node_selector: dict[str, str] = {}
    containers: tuple[dict[str, Any], ...] = ()


class PodTemplate(ApiObject, frozen=True):
    """A DaemonSet's template."""

    metadata: Metadata = Metadata()
    spec: PodTemplateSpec = PodTemplateSpec()


class LabelSelector(ApiObject, frozen=True):
    """A label selector; kube-proxy's uses matchLabels only."""

    match_labels: dict[str, str] = {}


class DaemonSetSpec(ApiObject, frozen=True):
    """DaemonSet.spec."""

    selector: LabelSelector = LabelSelector()
    template: PodTemplate = PodTemplate()


class DaemonSetStatus(ApiObject, frozen=True):
    """DaemonSet.status."""

    observed_generation: int = 0
    desired_number_scheduled: int = 0
    updated_number_scheduled: int = 0
    number_ready: int = 0


class DaemonSet(ApiObject, frozen=True):
    """A DaemonSet: the agents' or kube-proxy's."""

    metadata: Metadata
    spec: DaemonSetSpec = DaemonSetSpec()
    status: DaemonSetStatus = DaemonSetStatus()

    @property
    def observed(self) -> bool:
        """Whether the DaemonSet controller's numbers are about the present spec."""
        return self.status.observed_generation >= self.metadata.generation


class PodSpec(ApiObject, frozen=True):
    """Pod.spec."""

    node_name: str = ""


class PodStatus(ApiObject, frozen=True):
    """Pod.status."""

    phase: str = ""
    conditions: tuple[Condition, ...] = ()


class Pod(ApiObject, frozen=True):
    """A pod of the agents' or kube-proxy's DaemonSet."""

    metadata: Metadata
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()

    @property
    def ready(self) -> bool:
        """Whether it is Ready and meant to stay."""
        return self.metadata.deletion_timestamp is None and is_true(self.status.conditions, "Ready")


class NodeStatus(ApiObject, frozen=True):
    """Node.status."""

    conditions: tuple[Condition, ...] = ()


class Node(ApiObject, frozen=True):
    """A node."""

    metadata: Metadata
    status: NodeStatus = NodeStatus()

    @property
    def ready(self) -> bool:
        """Whether its kubelet reports Ready."""
        return is_true(self.status.conditions, "Ready")


class EndpointConditions(ApiObject, frozen=True):
    """EndpointSlice endpoint conditions; absent means true."""

    ready: bool | None = None


class Endpoint(ApiObject, frozen=True):
    """One endpoint of a slice."""

    addresses: tuple[str, ...] = ()
    conditions: EndpointConditions = EndpointConditions()


class EndpointPort(ApiObject, frozen=True):
    """One port of a slice."""

    name: str | None = None
    port: int | None = None


class EndpointSlice(ApiObject, frozen=True):
    """An EndpointSlice of default/kubernetes."""

    metadata: Metadata
    address_type: str = ""
    endpoints: tuple[Endpoint, ...] | None = ()
    ports: tuple[EndpointPort, ...] | None = ()


class ConfigMap(ApiObject, frozen=True):
    """A ConfigMap."""

    metadata: Metadata
    data: dict[str, str] = {}


class Deployment(msgspec.Struct, frozen=True):
    """How this operator was deployed: what it puts into the agents' manifest."""

    namespace: str
    image: str
    pull_policy: str = "IfNotPresent"
    version: str = ""


class Memory(msgspec.Struct):
    """What the process remembers between passes. Losing it at a restart only restarts waits."""

    detaching_since: float | None = None
    selector_patches: int = 0
    selector_patched_at: float = 0.0
    refusal: str = ""


class World(msgspec.Struct, frozen=True, kw_only=True):
    """One snapshot. `now` is seconds since the epoch; `resync` asks to apply again what drifts."""

    deployment: Deployment
    now: float
    resync: bool = False
    config: Config | None = None
    agent: DaemonSet | None = None
    agent_pods: tuple[Pod, ...] = ()
    kube_proxy: DaemonSet | None = None
    kube_proxy_pods: tuple[Pod, ...] = ()
    kube_proxy_config: str = ""
    nodes: tuple[Node, ...] = ()
    bpf_nodes: tuple[BpfNode, ...] = ()
    kubernetes_slices: tuple[EndpointSlice, ...] = ()
    endpoint_override: ConfigMap | None = None
    detaching_for: float | None = None
    selector_patches: int = 0
    selector_patch_age: float = 0.0
    refusal: str = ""

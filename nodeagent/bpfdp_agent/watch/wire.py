# SPDX-License-Identifier: Apache-2.0
"""The API server's objects as msgspec structs: only the fields the agent uses.

Envelopes of lists and watches hold their objects as raw bytes, so that one object that does not
decode harms no other: it comes out as `Malformed`, and its last good version stays in force.
No struct keeps the resourceVersion: two versions that differ in nothing we use are equal.
"""

from __future__ import annotations

import enum
import sys
from typing import NamedTuple, TypeAlias

import msgspec


class Kind(enum.StrEnum):
    """The kinds the agent watches."""

    SERVICE = "Service"
    ENDPOINT_SLICE = "EndpointSlice"
    POD = "Pod"
    NAMESPACE = "Namespace"
    NODE = "Node"
    NETWORK_POLICY = "NetworkPolicy"
    SERVICE_CIDR = "ServiceCIDR"
    CONFIG = "BpfDataplaneConfig"


class ObjectKey(NamedTuple):
    """Namespace ("" for cluster-scoped kinds) and name."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


class Wire(msgspec.Struct, frozen=True, rename="camel", kw_only=True, gc=False):
    """Base of everything decoded: immutable, compared by value, unknown fields ignored."""


class ObjectMeta(Wire, frozen=True):
    """`metadata`."""

    name: str
    namespace: str = ""
    uid: str = ""
    generation: int = 0
    labels: dict[str, str] = {}
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None


class KubeObject(Wire, frozen=True):
    """What all watched objects have."""

    metadata: ObjectMeta

    @property
    def key(self) -> ObjectKey:
        """Namespace and name."""
        return ObjectKey(self.metadata.namespace, self.metadata.name)


# -- services ---------------------------------------------------------------------------------


class ServicePort(Wire, frozen=True):
    """`spec.ports[]` of a Service; target ports are already resolved in the EndpointSlices."""

    port: int
    name: str = ""
    protocol: str = "TCP"
    node_port: int = 0


class ClientIPConfig(Wire, frozen=True):
    """`spec.sessionAffinityConfig.clientIP`."""

    timeout_seconds: int | None = None


class SessionAffinityConfig(Wire, frozen=True):
    """`spec.sessionAffinityConfig`."""

    client_ip: ClientIPConfig | None = msgspec.field(default=None, name="clientIP")


class ServiceSpec(Wire, frozen=True):
    """`spec` of a Service."""

    type: str = "ClusterIP"
    ports: tuple[ServicePort, ...] = ()
    cluster_ip: str = msgspec.field(default="", name="clusterIP")
    cluster_ips: tuple[str, ...] = msgspec.field(default=(), name="clusterIPs")
    external_ips: tuple[str, ...] = msgspec.field(default=(), name="externalIPs")
    load_balancer_source_ranges: tuple[str, ...] = ()
    session_affinity: str = "None"
    session_affinity_config: SessionAffinityConfig | None = None
    internal_traffic_policy: str | None = None
    external_traffic_policy: str | None = None
    publish_not_ready_addresses: bool = False
    health_check_node_port: int = 0


class LoadBalancerIngress(Wire, frozen=True):
    """`status.loadBalancer.ingress[]`; ip_mode absent means VIP."""

    ip: str = ""
    ip_mode: str | None = None


class LoadBalancerStatus(Wire, frozen=True):
    """`status.loadBalancer`."""

    ingress: tuple[LoadBalancerIngress, ...] = ()


class ServiceStatus(Wire, frozen=True):
    """`status` of a Service."""

    load_balancer: LoadBalancerStatus = LoadBalancerStatus()


class Service(KubeObject, frozen=True):
    """v1 Service."""

    spec: ServiceSpec = ServiceSpec()
    status: ServiceStatus = ServiceStatus()


class Named(Wire, frozen=True):
    """A hint's `forZones[]` and `forNodes[]`."""

    name: str


class EndpointHints(Wire, frozen=True):
    """`endpoints[].hints`."""

    for_zones: tuple[Named, ...] = ()
    for_nodes: tuple[Named, ...] = ()


class EndpointConditions(Wire, frozen=True):
    """`endpoints[].conditions`; absent ready and serving mean true, absent terminating false."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class Endpoint(Wire, frozen=True):
    """`endpoints[]` of an EndpointSlice."""

    addresses: tuple[str, ...]
    conditions: EndpointConditions = EndpointConditions()
    node_name: str | None = None
    hints: EndpointHints | None = None


class EndpointPort(Wire, frozen=True):
    """`ports[]` of an EndpointSlice; its name is the Service port's name."""

    name: str | None = None
    protocol: str | None = None
    port: int | None = None


class EndpointSliceAnnotations(Wire, frozen=True):
    """The one annotation that is read; when the change at its origin happened (RFC 3339)."""

    last_change: str = msgspec.field(
        default="", name="endpoints.kubernetes.io/last-change-trigger-time"
    )


class EndpointSliceMeta(ObjectMeta, frozen=True):
    """`metadata` of an EndpointSlice."""

    annotations: EndpointSliceAnnotations = EndpointSliceAnnotations()


class EndpointSlice(KubeObject, frozen=True):
    """discovery.k8s.io/v1 EndpointSlice. The API server writes empty lists as null."""

    metadata: EndpointSliceMeta
    address_type: str
    endpoints: tuple[Endpoint, ...] | None = None
    ports: tuple[EndpointPort, ...] | None = None

    @property
    def service(self) -> ObjectKey:
        """The Service it belongs to; an empty name when it carries no such label."""
        name = self.metadata.labels.get("kubernetes.io/service-name", "")
        return ObjectKey(self.metadata.namespace, name)


# -- pods, namespaces, nodes ------------------------------------------------------------------


class ContainerPort(Wire, frozen=True):
    """`ports[]` of a container."""

    container_port: int
    name: str = ""
    protocol: str = "TCP"


class Container(Wire, frozen=True):
    """A container's ports."""

    ports: tuple[ContainerPort, ...] = ()


class PodSpec(Wire, frozen=True):
    """`spec` of a Pod."""

    node_name: str = ""
    host_network: bool = False
    containers: tuple[Container, ...] = ()
    init_containers: tuple[Container, ...] = ()


class PodIP(Wire, frozen=True):
    """`status.podIPs[]`."""

    ip: str = ""


class PodStatus(Wire, frozen=True):
    """`status` of a Pod."""

    phase: str = ""
    pod_ips: tuple[PodIP, ...] = msgspec.field(default=(), name="podIPs")


class Pod(KubeObject, frozen=True):
    """v1 Pod."""

    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()

    @property
    def terminated(self) -> bool:
        """Its address may already be another pod's."""
        return self.status.phase in ("Succeeded", "Failed")


class Namespace(KubeObject, frozen=True):
    """v1 Namespace."""


class Taint(Wire, frozen=True):
    """`spec.taints[]`."""

    key: str


class NodeSpec(Wire, frozen=True):
    """`spec` of a Node."""

    pod_cidrs: tuple[str, ...] = msgspec.field(default=(), name="podCIDRs")
    taints: tuple[Taint, ...] = ()


class NodeAddress(Wire, frozen=True):
    """`status.addresses[]`."""

    type: str
    address: str


class NodeStatus(Wire, frozen=True):
    """`status` of a Node."""

    addresses: tuple[NodeAddress, ...] = ()


class Node(KubeObject, frozen=True):
    """v1 Node."""

    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()


class ServiceCIDRSpec(Wire, frozen=True):
    """`spec` of a ServiceCIDR."""

    cidrs: tuple[str, ...] = ()


class ServiceCIDR(KubeObject, frozen=True):
    """networking.k8s.io/v1 ServiceCIDR: a range that ClusterIPs are allocated from."""

    spec: ServiceCIDRSpec = ServiceCIDRSpec()


# -- policy -----------------------------------------------------------------------------------


class LabelSelectorRequirement(Wire, frozen=True):
    """`matchExpressions[]`."""

    key: str
    operator: str
    values: tuple[str, ...] = ()


class LabelSelector(Wire, frozen=True):
    """meta/v1 LabelSelector; empty selects everything."""

    match_labels: dict[str, str] = {}
    match_expressions: tuple[LabelSelectorRequirement, ...] = ()


class IPBlock(Wire, frozen=True):
    """`ipBlock` of a peer."""

    cidr: str
    except_: tuple[str, ...] = msgspec.field(default=(), name="except")


class NetworkPolicyPeer(Wire, frozen=True):
    """`from[]` and `to[]`; an absent selector differs from an empty one."""

    pod_selector: LabelSelector | None = None
    namespace_selector: LabelSelector | None = None
    ip_block: IPBlock | None = None


class NetworkPolicyPort(Wire, frozen=True):
    """`ports[]` of a rule; port is a number or a name, absent for all."""

    protocol: str = "TCP"
    port: int | str | None = None
    end_port: int | None = None


class NetworkPolicyIngressRule(Wire, frozen=True):
    """`ingress[]`; no peers means everyone, no ports means all."""

    from_: tuple[NetworkPolicyPeer, ...] = msgspec.field(default=(), name="from")
    ports: tuple[NetworkPolicyPort, ...] = ()


class NetworkPolicyEgressRule(Wire, frozen=True):
    """`egress[]`."""

    to: tuple[NetworkPolicyPeer, ...] = ()
    ports: tuple[NetworkPolicyPort, ...] = ()


class NetworkPolicySpec(Wire, frozen=True):
    """`spec` of a NetworkPolicy; the API server always fills policy_types."""

    pod_selector: LabelSelector = LabelSelector()
    policy_types: tuple[str, ...] = ()
    ingress: tuple[NetworkPolicyIngressRule, ...] = ()
    egress: tuple[NetworkPolicyEgressRule, ...] = ()


class NetworkPolicy(KubeObject, frozen=True):
    """networking.k8s.io/v1 NetworkPolicy."""

    spec: NetworkPolicySpec = NetworkPolicySpec()


# -- our own configuration --------------------------------------------------------------------


class AgentsStatus(Wire, frozen=True):
    """`status.agents`: what the operator tells the agents to do."""

    mode: str = "Attach"


class KubeProxyStatus(Wire, frozen=True):
    """`status.kubeProxy`."""

    state: str = ""


class ConfigStatus(Wire, frozen=True):
    """`status` of a BpfDataplaneConfig, the operator's word to the agents."""

    agents: AgentsStatus = AgentsStatus()
    kube_proxy: KubeProxyStatus = KubeProxyStatus()


class BpfDataplaneConfig(KubeObject, frozen=True):
    """bpfdataplane.io/v1alpha1 BpfDataplaneConfig; the spec is left to `config.py` as bytes."""

    spec: msgspec.Raw = msgspec.Raw(b"{}")
    status: ConfigStatus = ConfigStatus()


AnyObject: TypeAlias = (
    Service
    | EndpointSlice
    | Pod
    | Namespace
    | Node
    | NetworkPolicy
    | ServiceCIDR
    | BpfDataplaneConfig
)

# -- events -----------------------------------------------------------------------------------


class Added(msgspec.Struct, frozen=True):
    """An object not known before."""

    kind: Kind
    object: AnyObject


class Modified(msgspec.Struct, frozen=True):
    """A new version of a known object."""

    kind: Kind
    object: AnyObject


class Deleted(msgspec.Struct, frozen=True):
    """A known object is gone."""

    kind: Kind
    key: ObjectKey


class Synced(msgspec.Struct, frozen=True):
    """A whole list has been delivered; comes again after each relist."""

    kind: Kind


class Malformed(msgspec.Struct, frozen=True):
    """An object that does not decode; its last good version, if any, stays in force."""

    kind: Kind
    key: ObjectKey
    error: str


Event: TypeAlias = Added | Modified | Deleted | Synced | Malformed


# -- what is asked for, and how it arrives ----------------------------------------------------


class Resource(msgspec.Struct, frozen=True):
    """Where a kind is listed and watched, and what it decodes to."""

    kind: Kind
    path: str
    type: type[AnyObject]
    label_selector: str = ""
    field_selector: str = ""
    optional: bool = False
    """An API server without it is as good as one with an empty list."""


_PROXIED = "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name"

RESOURCES = {
    r.kind: r
    for r in (
        Resource(Kind.SERVICE, "/api/v1/services", Service, _PROXIED),
        Resource(
            Kind.ENDPOINT_SLICE,
            "/apis/discovery.k8s.io/v1/endpointslices",
            EndpointSlice,
            _PROXIED,
        ),
        Resource(
            Kind.POD,
            "/api/v1/pods",
            Pod,
            field_selector="status.phase!=Succeeded,status.phase!=Failed",
        ),
        Resource(Kind.NAMESPACE, "/api/v1/namespaces", Namespace),
        Resource(Kind.NODE, "/api/v1/nodes", Node),
        Resource(Kind.NETWORK_POLICY, "/apis/networking.k8s.io/v1/networkpolicies", NetworkPolicy),
        Resource(
            Kind.SERVICE_CIDR,
            "/apis/networking.k8s.io/v1/servicecidrs",
            ServiceCIDR,
            optional=True,
        ),
        Resource(
            Kind.CONFIG,
            "/apis/bpfdataplane.io/v1alpha1/bpfdataplanes",
            BpfDataplaneConfig,
            field_selector="metadata.name=default",
        ),
    )
}
"""What the agent watches. A pod that ends leaves the selection, so it arrives as deleted."""


class ListMeta(Wire, frozen=True):
    """`metadata` of a list."""

    resource_version: str = ""
    continue_: str = msgspec.field(default="", name="continue")


class ListEnvelope(Wire, frozen=True):
    """One page of a list."""

    metadata: ListMeta
    items: tuple[msgspec.Raw, ...] | None = None


class WatchEnvelope(Wire, frozen=True):
    """One line of a watch: ADDED, MODIFIED, DELETED, BOOKMARK or ERROR."""

    type: str
    object: msgspec.Raw


class Status(Wire, frozen=True):
    """The API server's error object."""

    code: int = 0
    reason: str = ""
    message: str = ""


class _Stamp(Wire, frozen=True):
    resource_version: str = ""
    name: str = ""
    namespace: str = ""


class _Stamped(Wire, frozen=True):
    metadata: _Stamp


_stamps = msgspec.json.Decoder(_Stamped)
_decoders = {kind: msgspec.json.Decoder(r.type) for kind, r in RESOURCES.items()}


def stamp(raw: msgspec.Raw | bytes) -> tuple[ObjectKey, str]:
    """An object's key and resourceVersion, whatever else is wrong with it.

    Raises msgspec.DecodeError when even the metadata is unreadable.
    """
    meta = _stamps.decode(raw).metadata
    return ObjectKey(meta.namespace, meta.name), meta.resource_version


def decode(kind: Kind, raw: msgspec.Raw | bytes) -> AnyObject:
    """The object. Raises msgspec.DecodeError with the path of the wrong field."""
    found = _decoders[kind].decode(raw)
    if isinstance(found, BpfDataplaneConfig):
        # a Raw is a window on the whole response; the copy lets that go
        return msgspec.structs.replace(found, spec=found.spec.copy())
    if isinstance(found, EndpointSlice):
        _share(found)
    return found


_conditions: dict[EndpointConditions, EndpointConditions] = {}  # at most 27


def _share(found: EndpointSlice) -> None:
    """One object for what tens of thousands of endpoints have in common: node and conditions.

    Nobody has seen the slice yet, and what is put is equal to what is there.
    """
    for endpoint in found.endpoints or ():
        conditions = _conditions.setdefault(endpoint.conditions, endpoint.conditions)
        msgspec.structs.force_setattr(endpoint, "conditions", conditions)
        if endpoint.node_name is not None:
            msgspec.structs.force_setattr(endpoint, "node_name", sys.intern(endpoint.node_name))

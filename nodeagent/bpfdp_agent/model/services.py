# SPDX-License-Identifier: Apache-2.0
"""One Service and its EndpointSlices become service ports: frontends and endpoint sets.

A pure function per service and family; the two families know nothing of each other. The rules are
kube-proxy's (pkg/proxy: endpointslicecache.go, serviceport.go, topology.go, nftables/proxier.go).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from bpfdp_agent.layouts import BackendFlag, FrontendFlag
from bpfdp_agent.model.addresses import cidr, contains, packed
from bpfdp_agent.model.protocols import PROTOCOLS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from bpfdp_agent.model.nodes import NodeIndex, NodeInfo
    from bpfdp_agent.watch import wire

HEADLESS_LABEL = "service.kubernetes.io/headless"
PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"
DEFAULT_AFFINITY_SECONDS = 10800


class ServicePortKey(NamedTuple):
    """What identifies a service port: one port number may carry several protocols."""

    namespace: str
    service: str
    port_name: str
    protocol: int


class Frontend(msgspec.Struct, frozen=True):
    """An address, port and protocol that clients ask for. NodePorts have an all-zero address.

    `rank` decides between services that claim the same: addresses that the API server allocates
    go before load balancers', and those before externalIPs, which anyone may write (CVE-2020-8554).
    """

    address: bytes
    port: int
    protocol: int
    flags: FrontendFlag
    rank: int = 0


class Backend(msgspec.Struct, frozen=True, order=True):
    """Where a connection goes. `node` is the tunnel address (16 bytes), empty: local or unknown."""

    address: bytes
    port: int
    flags: BackendFlag
    node: bytes


class ServicePort(msgspec.Struct, frozen=True):
    """One port of a service in one family: everything its map entries are made from.

    `cluster` is the Cluster set; empty too when nothing may use it. `local` is the Local set,
    empty unless a traffic policy or outside clients (the node a tunnel leads to) need it.
    Both are sorted and without duplicates. `source_ranges`: (prefix length, network).
    """

    key: ServicePortKey
    frontends: tuple[Frontend, ...]
    cluster: tuple[Backend, ...]
    local: tuple[Backend, ...]
    affinity_seconds: int
    source_ranges: tuple[tuple[int, bytes], ...]
    created: str
    kept: tuple[Backend, ...] = ()
    """Of UDP: endpoints that serve. Flows to them go on though no new one may choose them."""


class SliceProblem(NamedTuple):
    """What of an EndpointSlice was left out."""

    slice: wire.ObjectKey
    problem: str


class ServiceView(msgspec.Struct, frozen=True):
    """A service in one family. The problems say what of it, and of its slices, was left out."""

    ports: tuple[ServicePort, ...] = ()
    cluster_ip: bytes = b""
    problems: tuple[str, ...] = ()
    slice_problems: tuple[SliceProblem, ...] = ()


class Candidate(msgspec.Struct, frozen=True):
    """An endpoint of one port before any choice. `local`: its nodeName is this node's."""

    backend: Backend
    local: bool
    ready: bool
    serving: bool
    terminating: bool
    zones: frozenset[str] = frozenset()
    nodes: frozenset[str] = frozenset()

    @property
    def leaving(self) -> bool:
        """Serving while terminating: the last resort (KEP-1669)."""
        return self.serving and self.terminating


class EndpointSets(msgspec.Struct, frozen=True):
    """The outcome of `categorize`."""

    cluster: tuple[Backend, ...]
    local: tuple[Backend, ...]
    any: bool
    serving: tuple[Backend, ...] = ()


def skipped(service: wire.Service) -> bool:
    """Services that are not ours (proxy/util ShouldSkipService, and the informer's selectors)."""
    labels = service.metadata.labels
    return (
        service.spec.type == "ExternalName"
        or service.spec.cluster_ip in ("", "None")
        or HEADLESS_LABEL in labels
        or PROXY_NAME_LABEL in labels
    )


def service_view(
    service: wire.Service | None,
    slices: Sequence[wire.EndpointSlice],
    family: int,
    nodes: NodeIndex,
) -> ServiceView:
    """The service in one family; nothing when it is gone, not ours, or has no ClusterIP in it."""
    if service is None or skipped(service):
        return ServiceView()
    cluster_ip = _cluster_ip(service.spec, family)
    if not cluster_ip:
        return ServiceView()
    problems: list[str] = []
    reader = _EndpointReader(slices, family, nodes)
    ports = tuple(
        _service_port(service, port, cluster_ip, reader, problems)
        for port in service.spec.ports
        if _known_protocol(port, problems)
    )
    return ServiceView(
        ports, cluster_ip, tuple(dict.fromkeys(problems)), tuple(dict.fromkeys(reader.problems))
    )


def _cluster_ip(spec: wire.ServiceSpec, family: int) -> bytes:
    for text in spec.cluster_ips or (spec.cluster_ip,):
        address = packed(text)
        if address is not None and _is_family(address, family):
            return address
    return b""


def _is_family(address: bytes, family: int) -> bool:
    return len(address) == (4 if family == 4 else 16)


def _known_protocol(port: wire.ServicePort, problems: list[str]) -> bool:
    if port.protocol in PROTOCOLS and 0 < port.port < 65536:
        return True
    problems.append(f"port {port.name or port.port}: {port.protocol} {port.port} cannot be served")
    return False


# -- one port ---------------------------------------------------------------------------------


def _service_port(
    service: wire.Service,
    port: wire.ServicePort,
    cluster_ip: bytes,
    reader: _EndpointReader,
    problems: list[str],
) -> ServicePort:
    family = reader.family
    protocol = PROTOCOLS[port.protocol]
    outside = _outside_addresses(service, family, problems)
    accessible = bool(outside) or bool(port.node_port)
    internal_local = service.spec.internal_traffic_policy == "Local"
    external_local = accessible and service.spec.external_traffic_policy == "Local"
    sets = categorize(
        reader.candidates(port.name, port.protocol),
        uses_cluster=not internal_local or accessible,
        uses_local=internal_local or accessible,
        node=reader.nodes.own,
        zone=reader.nodes.zone,
    )
    ranges = _source_ranges(service, family, reader.nodes, problems)
    verdicts = _Verdicts(internal_local, external_local, sets.any, bool(ranges))
    frontends = _frontends(port, protocol, cluster_ip, outside, verdicts)
    if port.protocol == "SCTP":
        frontends = _without_translation(port, frontends, sets, problems)
    return ServicePort(
        key=ServicePortKey(service.metadata.namespace, service.metadata.name, port.name, protocol),
        frontends=frontends,
        cluster=sets.cluster,
        local=sets.local,
        affinity_seconds=_affinity(service.spec),
        source_ranges=ranges if any(r == _LOAD_BALANCER for _, r in outside) else (),
        created=service.metadata.creation_timestamp or "",
        kept=sets.serving if port.protocol == "UDP" else (),
    )


def _affinity(spec: wire.ServiceSpec) -> int:
    if spec.session_affinity != "ClientIP":
        return 0
    config = spec.session_affinity_config
    seconds = config.client_ip.timeout_seconds if config and config.client_ip else None
    return seconds or DEFAULT_AFFINITY_SECONDS


_ALLOCATED, _LOAD_BALANCER, _EXTERNAL_IP = 0, 1, 2


def _outside_addresses(
    service: wire.Service, family: int, problems: list[str]
) -> tuple[tuple[bytes, int], ...]:
    """Load balancer VIPs and externalIPs of this family with their rank.

    Hostname-only ingress and ipMode Proxy (KEP-1860) are not intercepted; addresses of the other
    family are silently dropped (serviceport.go).
    """
    found: dict[bytes, int] = {}
    listed = [
        (i.ip, _LOAD_BALANCER)
        for i in service.status.load_balancer.ingress
        if i.ip and i.ip_mode in (None, "VIP")
    ]
    listed += [(ip, _EXTERNAL_IP) for ip in service.spec.external_ips]
    for text, rank in listed:
        address = packed(text)
        if address is None:
            problems.append(f"{text!r} is no address")
        elif _is_family(address, family):
            found.setdefault(address, rank)
    return tuple(found.items())


def _source_ranges(
    service: wire.Service, family: int, nodes: NodeIndex, problems: list[str]
) -> tuple[tuple[int, bytes], ...]:
    """`loadBalancerSourceRanges` of this family, whitespace trimmed (TestLoadBalancer).

    Where one contains an address of this node, the VIPs are implied sources too: a node that has
    the VIP as a local address may talk to it from it (nftables/proxier.go).
    """
    found: set[tuple[int, bytes]] = set()
    for text in service.spec.load_balancer_source_ranges:
        network = cidr(text)
        if network is None:
            problems.append(f"loadBalancerSourceRanges: {text!r} is no CIDR")
        elif _is_family(network[1], family):
            found.add(network)
    if any(contains(network, own) for network in found for own in nodes.own_addresses):
        vips = _outside_addresses(service, family, [])
        found.update((len(a) * 8, a) for a, rank in vips if rank == _LOAD_BALANCER)
    return tuple(sorted(found))


class _Verdicts(NamedTuple):
    """What decides a frontend's flags."""

    internal_local: bool
    external_local: bool
    any_endpoints: bool
    has_ranges: bool


def _frontends(
    port: wire.ServicePort,
    protocol: int,
    cluster_ip: bytes,
    outside: tuple[tuple[bytes, int], ...],
    verdicts: _Verdicts,
) -> tuple[Frontend, ...]:
    """ClusterIP, NodePort, load balancer and external addresses of one port.

    internalTrafficPolicy is the ClusterIP's alone and holds for every client of it;
    externalTrafficPolicy is the others' alone and only for outside clients: pods and nodes are
    short-circuited to the Cluster set (TestInternalExternalMasquerade). An empty Local set is a
    DROP while there are endpoints elsewhere, a REJECT when there are none.
    """
    flag = FrontendFlag
    inside = flag.CLUSTER_IP
    if verdicts.internal_local:
        inside |= flag.INTERNAL_LOCAL | flag.EXTERNAL_LOCAL
        if verdicts.any_endpoints:
            inside |= flag.INTERNAL_DROP | flag.EXTERNAL_DROP
    external = flag.EXTERNAL
    if verdicts.external_local:
        external |= flag.EXTERNAL_LOCAL
        if verdicts.any_endpoints:
            external |= flag.EXTERNAL_DROP
    found = [Frontend(cluster_ip, port.port, protocol, inside)]
    if port.node_port:
        found.append(Frontend(bytes(len(cluster_ip)), port.node_port, protocol, external))
    for address, rank in outside:
        guarded = rank == _LOAD_BALANCER and verdicts.has_ranges
        flags = external | flag.SOURCE_RANGES if guarded else external
        found.append(Frontend(address, port.port, protocol, flags, rank))
    return tuple(found)


def _without_translation(
    port: wire.ServicePort,
    frontends: tuple[Frontend, ...],
    sets: EndpointSets,
    problems: list[str],
) -> tuple[Frontend, ...]:
    """The frontends whose port every endpoint has too.

    A new port would need a new SCTP checksum (CRC32c over the whole packet), which a program at tc
    cannot compute; it does not cover addresses. What is left out is a problem that is named.
    """
    ports = sorted({backend.port for backend in (*sets.cluster, *sets.local)})
    kept = tuple(f for f in frontends if ports in ([], [f.port]))
    for refused in sorted({f.port for f in frontends if f not in kept}):
        listed = ", ".join(map(str, ports))
        kind = "nodePort" if refused == port.node_port else "port"
        problems.append(
            f"port {port.name or port.port}: SCTP {kind} {refused} is not served, its endpoints"
            f" listen on {listed}: ports of SCTP packets cannot be changed;"
            f" let {kind} and targetPort be the same"
        )
    return kept


# -- endpoints --------------------------------------------------------------------------------


def categorize(
    candidates: Sequence[Candidate],
    *,
    uses_cluster: bool,
    uses_local: bool,
    node: str,
    zone: str,
) -> EndpointSets:
    """Cluster and Local sets, and whether there is any endpoint (topology.go CategorizeEndpoints).

    Cluster: the ready ones that topology allows; when there are none, the serving ones that
    terminate, whatever the topology. Local: the same among this node's own, never by topology.
    """
    ready = [c for c in candidates if c.ready]
    leaving = [c for c in candidates if not c.ready and c.leaving]
    cluster: Iterable[Candidate] = ()
    local: Iterable[Candidate] = ()
    if uses_cluster:
        allowed = _topology(ready, node, zone)
        cluster = [c for c in ready if allowed(c)] or leaving
    if uses_local:
        local = [c for c in ready if c.local] or [c for c in leaving if c.local]
    return EndpointSets(
        cluster=tuple(sorted(c.backend for c in cluster)),
        local=tuple(sorted(c.backend for c in local)),
        any=bool(ready or leaving),
        serving=tuple(sorted(c.backend for c in candidates if c.serving)),
    )


def _topology(ready: Sequence[Candidate], node: str, zone: str) -> Callable[[Candidate], bool]:
    """Which ready endpoints hints allow: one without hints disables all (topologyModeFromHints)."""
    if all(c.nodes for c in ready) and any(node in c.nodes for c in ready):
        return lambda c: node in c.nodes
    if zone and all(c.zones for c in ready) and any(zone in c.zones for c in ready):
        return lambda c: zone in c.zones
    return lambda _: True


class _EndpointReader:
    """A service's slices, read port by port."""

    def __init__(
        self,
        slices: Sequence[wire.EndpointSlice],
        family: int,
        nodes: NodeIndex,
    ) -> None:
        self.family = family
        self.nodes = nodes
        self._slices = [s for s in slices if s.address_type == f"IPv{family}"]
        self.problems: list[SliceProblem] = []

    def candidates(self, port_name: str, protocol: str) -> list[Candidate]:
        """The endpoints of all slices for one port, one for each address and port.

        Only the first address counts. Of duplicates the local one wins, then the ready one
        (endpointslicecache.go; the second rule makes the outcome independent of the order).
        """
        found: dict[tuple[bytes, int], Candidate] = {}
        for slice_ in self._slices:
            for number in self._port_numbers(slice_, port_name, protocol):
                for endpoint in slice_.endpoints or ():
                    candidate = self._candidate(slice_, endpoint, number)
                    if candidate is None:
                        continue
                    place = (candidate.backend.address, number)
                    other = found.get(place)
                    if other is None or _preference(candidate) > _preference(other):
                        found[place] = candidate
        return list(found.values())

    def _port_numbers(self, slice_: wire.EndpointSlice, port_name: str, protocol: str) -> list[int]:
        numbers = []
        for port in slice_.ports or ():
            if port.name is None or not port.port or not 0 < port.port < 65536:
                self.problems.append(
                    SliceProblem(slice_.key, "a port without a name or number is ignored")
                )
            elif port.name == port_name and (port.protocol or "TCP") == protocol:
                numbers.append(port.port)
        return numbers

    def _candidate(
        self, slice_: wire.EndpointSlice, endpoint: wire.Endpoint, port: int
    ) -> Candidate | None:
        text = endpoint.addresses[0] if endpoint.addresses else ""
        address = packed(text)
        if address is None or not _is_family(address, self.family):
            self.problems.append(
                SliceProblem(slice_.key, f"endpoint {text!r} is no IPv{self.family} address")
            )
            return None
        conditions, hints = endpoint.conditions, endpoint.hints
        return Candidate(
            backend=self._backend(address, port, endpoint.node_name or ""),
            local=endpoint.node_name == self.nodes.own,
            ready=conditions.ready is not False,
            serving=conditions.serving is not False,
            terminating=conditions.terminating is True,
            zones=frozenset(z.name for z in hints.for_zones) if hints else frozenset(),
            nodes=frozenset(n.name for n in hints.for_nodes) if hints else frozenset(),
        )

    def _backend(self, address: bytes, port: int, node_name: str) -> Backend:
        """The backend with what the packet path asks: on this node? a node's own address? where?"""
        at: NodeInfo | None = self.nodes.at(address)
        name = node_name or (at.name if at else "")
        flags = BackendFlag.HOST if at else BackendFlag(0)
        if name == self.nodes.own:
            return Backend(address, port, flags | BackendFlag.LOCAL, b"")
        node = self.nodes.get(name)
        return Backend(address, port, flags, node.tunnel if node else b"")


def _preference(candidate: Candidate) -> tuple[bool, bool, bool, Backend]:
    return candidate.local, candidate.ready, candidate.leaving, candidate.backend

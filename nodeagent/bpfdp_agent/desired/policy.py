# SPDX-License-Identifier: Apache-2.0
"""NetworkPolicy → the normal form of what a pod may receive or send.

The policies that select a pod add up (pure union), so the normal form is: the peers allowed on
every port and protocol, and for each protocol disjoint port ranges with the peers allowed there.
Equal policies, however written, have equal normal forms.
"""

from __future__ import annotations

import ipaddress
import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from bpfdp_agent.model.policies import Direction, Problem, read_subject
from bpfdp_agent.model.protocols import PROTOCOLS
from bpfdp_agent.model.selectors import EVERYTHING, InvalidSelector, Selector, read_selector

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from bpfdp_agent.model.pods import NamedPort
    from bpfdp_agent.watch.wire import (
        IPBlock,
        NetworkPolicy,
        NetworkPolicyPeer,
        NetworkPolicyPort,
        ObjectKey,
    )

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
LAST_PORT = 65535


# -- peers ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Anything:
    """Every address, of pods or not."""

    key: str = "anything"


@dataclass(frozen=True, slots=True)
class Pods:
    """Pods by their labels, in the one namespace named or in those that `namespaces` selects."""

    namespace: str
    namespaces: Selector
    pods: Selector

    @property
    def key(self) -> str:
        """Canonical text."""
        where = self.namespace or f"({self.namespaces.key})"
        return f"pods {where} ({self.pods.key})"


@dataclass(frozen=True, slots=True)
class Block:
    """Addresses of a CIDR, except those of others inside it."""

    cidr: Network
    excepts: tuple[Network, ...] = ()

    @property
    def key(self) -> str:
        """Canonical text."""
        return f"block {self.cidr} {' '.join(map(str, self.excepts))}"


Peer: TypeAlias = Anything | Pods | Block
ANYTHING = Anything()


# -- ports ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ports:
    """Destination ports lo..hi (inclusive) of an IP protocol number."""

    protocol: int
    lo: int
    hi: int


@dataclass(frozen=True, slots=True)
class PortName:
    """The port the destination pod gives this name for this protocol."""

    protocol: int
    name: str


@dataclass(frozen=True, slots=True)
class EveryPort:
    """Every protocol, those without ports included."""


PortTest: TypeAlias = Ports | PortName | EveryPort


@dataclass(frozen=True, slots=True)
class Rule:
    """One ingress or egress rule: any of the peers on any of the ports."""

    peers: tuple[Peer, ...]
    ports: tuple[PortTest, ...]


@dataclass(frozen=True, slots=True)
class PolicyRules:
    """One policy, read. With problems its rules are not to be used."""

    key: ObjectKey
    rules: Mapping[Direction, tuple[Rule, ...]]
    problems: tuple[Problem, ...] = ()


class PolicyRefused(Exception):
    """Policies that cannot be enforced as written, one problem or more."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = tuple(problems)


# -- reading ----------------------------------------------------------------------------------


class _Invalid(ValueError):
    def __init__(self, at: str, problem: str) -> None:
        super().__init__(f"{at}: {problem}")
        self.at = at
        self.problem = problem


def read_policy(policy: NetworkPolicy) -> PolicyRules:
    """The rules of both directions. Problems of every rule and of the subject are collected."""
    key, problems = policy.key, list(read_subject(policy).problems)
    rules: dict[Direction, tuple[Rule, ...]] = {}
    sources = (
        (Direction.INGRESS, "from", [(r.from_, r.ports) for r in policy.spec.ingress]),
        (Direction.EGRESS, "to", [(r.to, r.ports) for r in policy.spec.egress]),
    )
    for direction, peer_field, written in sources:
        read = []
        for position, (peers, ports) in enumerate(written):
            at = f"spec.{direction}[{position}]"
            try:
                read.append(
                    Rule(
                        _peers(f"{at}.{peer_field}", peers, policy.metadata.namespace),
                        _ports(f"{at}.ports", ports),
                    )
                )
            except _Invalid as error:
                problems.append(Problem(key, error.at, error.problem))
        rules[direction] = tuple(read)
    return PolicyRules(key, rules, tuple(problems))


def _peers(at: str, peers: Sequence[NetworkPolicyPeer], namespace: str) -> tuple[Peer, ...]:
    if not peers:
        return (ANYTHING,)
    return tuple(_peer(f"{at}[{i}]", peer, namespace) for i, peer in enumerate(peers))


def _peer(at: str, peer: NetworkPolicyPeer, namespace: str) -> Peer:
    by_labels = peer.pod_selector is not None or peer.namespace_selector is not None
    if peer.ip_block is not None:
        if by_labels:
            raise _Invalid(at, "has ipBlock beside selectors; make them two peers")
        return _block(f"{at}.ipBlock", peer.ip_block)
    if not by_labels:
        raise _Invalid(at, "names no peer; use podSelector, namespaceSelector or ipBlock")
    try:
        pods = read_selector(peer.pod_selector)
    except InvalidSelector as error:
        raise _Invalid(f"{at}.podSelector.{error.field}", error.problem) from error
    if peer.namespace_selector is None:
        return Pods(namespace, EVERYTHING, pods)
    try:
        return Pods("", read_selector(peer.namespace_selector), pods)
    except InvalidSelector as error:
        raise _Invalid(f"{at}.namespaceSelector.{error.field}", error.problem) from error


def _block(at: str, block: IPBlock) -> Block:
    cidr = _network(f"{at}.cidr", block.cidr)
    excepts = set()
    for position, text in enumerate(block.except_):
        inner = _network(f"{at}.except[{position}]", text)
        if inner.version != cidr.version or not _strictly_inside(inner, cidr):
            raise _Invalid(f"{at}.except[{position}]", f"{text} must lie inside {block.cidr}")
        excepts.add(inner)
    return Block(cidr, tuple(sorted(excepts, key=str)))


def _network(at: str, text: str) -> Network:
    try:
        if "/" not in text:
            raise ValueError("has no prefix length")
        network = ipaddress.ip_network(text, strict=False)
    except ValueError as error:
        remedy = "write a CIDR like 192.0.2.0/24 or 2001:db8::/32, without leading zeros"
        raise _Invalid(at, f"{text!r} is no CIDR ({error}); {remedy}") from error
    mapped = network.network_address
    if isinstance(mapped, ipaddress.IPv6Address) and mapped.ipv4_mapped is not None:
        raise _Invalid(at, f"{text!r} is an IPv4-mapped IPv6 CIDR; write it as an IPv4 CIDR")
    return network


def _strictly_inside(inner: Network, outer: Network) -> bool:
    return (
        inner.prefixlen > outer.prefixlen
        and inner.supernet(new_prefix=outer.prefixlen).network_address == outer.network_address
    )


def _ports(at: str, ports: Sequence[NetworkPolicyPort]) -> tuple[PortTest, ...]:
    if not ports:
        return (EveryPort(),)
    return tuple(_port(f"{at}[{i}]", port) for i, port in enumerate(ports))


def _port(at: str, port: NetworkPolicyPort) -> PortTest:
    protocol = PROTOCOLS.get(port.protocol)
    if protocol is None:
        problem = f"{port.protocol!r} is unknown; use one of {', '.join(PROTOCOLS)}"
        raise _Invalid(f"{at}.protocol", problem)
    if port.end_port is not None and not isinstance(port.port, int):
        raise _Invalid(f"{at}.endPort", "needs a numeric port beside it")
    if port.port is None:
        return Ports(protocol, 0, LAST_PORT)
    if isinstance(port.port, str):
        return PortName(protocol, port.port)
    last = port.port if port.end_port is None else port.end_port
    if not 1 <= port.port <= LAST_PORT:
        raise _Invalid(f"{at}.port", f"{port.port} is not within 1..{LAST_PORT}")
    if not port.port <= last <= LAST_PORT:
        raise _Invalid(f"{at}.endPort", f"{last} is not within {port.port}..{LAST_PORT}")
    return Ports(protocol, port.port, last)


# -- the normal form --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PortRange:
    """Peers allowed on destination ports lo..hi of a protocol."""

    protocol: int
    lo: int
    hi: int
    peers: frozenset[Peer]


@dataclass(frozen=True, slots=True)
class NamedRule:
    """Peers allowed on the port they themselves give this name (egress only)."""

    protocol: int
    name: str
    peers: frozenset[Peer]


@dataclass(frozen=True, slots=True)
class NormalRules:
    """What an isolated pod may exchange in one direction.

    `ranges` are disjoint and sorted within a protocol; no peer of `every_port` is repeated in
    them; where `ANYTHING` is among peers it is alone.
    """

    direction: Direction
    every_port: frozenset[Peer] = frozenset()
    ranges: tuple[PortRange, ...] = ()
    named: tuple[NamedRule, ...] = ()
    policies: tuple[ObjectKey, ...] = field(default=(), compare=False)

    @property
    def allows_all(self) -> bool:
        """Isolated in name only: everything is allowed."""
        return ANYTHING in self.every_port

    @property
    def denies_all(self) -> bool:
        """Nothing is allowed."""
        return not (self.every_port or self.ranges or self.named)


def normal_rules(
    policies: Iterable[PolicyRules],
    direction: Direction,
    pod_ports: Iterable[NamedPort],
) -> NormalRules:
    """The union of the policies that isolate a pod in a direction.

    `pod_ports`: the selected pod's own; a name in an ingress rule that is not among them matches
    nothing. Raises PolicyRefused when a policy has problems.
    """
    policies = sorted(policies, key=lambda p: p.key)
    problems = [problem for policy in policies for problem in policy.problems]
    if problems:
        raise PolicyRefused(problems)
    numbers = {PortName(p.protocol, p.name): p.port for p in pod_ports}
    every_port: set[Peer] = set()
    ranges: defaultdict[int, list[tuple[Ports, tuple[Peer, ...]]]] = defaultdict(list)
    named: defaultdict[PortName, set[Peer]] = defaultdict(set)
    for rule in (r for policy in policies for r in policy.rules[direction]):
        for port in rule.ports:
            if isinstance(port, EveryPort):
                every_port.update(rule.peers)
            elif isinstance(port, Ports):
                ranges[port.protocol].append((port, rule.peers))
            elif direction is Direction.EGRESS:
                # Only pods name ports: a CIDR has none to resolve.
                named[port].update(p for p in rule.peers if not isinstance(p, Block))
            elif (number := numbers.get(port)) is not None:
                resolved = Ports(port.protocol, number, number)
                ranges[port.protocol].append((resolved, rule.peers))
    everywhere = _collapse(every_port, frozenset())
    return NormalRules(
        direction,
        everywhere,
        tuple(r for p in sorted(ranges) for r in _disjoint(p, ranges[p], everywhere)),
        tuple(
            NamedRule(port.protocol, port.name, peers)
            for port in sorted(named, key=lambda n: (n.protocol, n.name))
            if (peers := _collapse(named[port], everywhere))
        ),
        tuple(policy.key for policy in policies),
    )


def _collapse(peers: Iterable[Peer], everywhere: frozenset[Peer]) -> frozenset[Peer]:
    """Without what is allowed anyway; ANYTHING swallows the rest."""
    if ANYTHING in everywhere:
        return frozenset()
    left = frozenset(peers) - everywhere
    return frozenset([ANYTHING]) if ANYTHING in left else left


def _disjoint(
    protocol: int,
    rules: Iterable[tuple[Ports, tuple[Peer, ...]]],
    everywhere: frozenset[Peer],
) -> list[PortRange]:
    """Overlapping port ranges → disjoint ones, each with all peers that any of them allows."""
    starts: defaultdict[int, list[Peer]] = defaultdict(list)
    ends: defaultdict[int, list[Peer]] = defaultdict(list)
    for ports, peers in rules:
        starts[ports.lo].extend(peers)
        ends[ports.hi + 1].extend(peers)
    active: Counter[Peer] = Counter()
    result: list[PortRange] = []
    edges = sorted(starts.keys() | ends.keys())
    for lo, following in itertools.pairwise(edges):
        active.update(starts[lo])
        active.subtract(ends[lo])
        active = +active
        allowed = _collapse(active, everywhere)
        if allowed and result and (result[-1].hi, result[-1].peers) == (lo - 1, allowed):
            lo = result.pop().lo  # noqa: PLW2901
        if allowed:
            result.append(PortRange(protocol, lo, following - 1, allowed))
    return result

# SPDX-License-Identifier: Apache-2.0
"""Normal rules → a policy program, and which identity has which of its peer bits.

The program depends on the rules alone. Who the peers are is map content: `Membership` computes it
whole for a new program and as deltas when identities or namespaces change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from bpfdp_agent.desired.policy import (
    ANYTHING,
    Anything,
    Block,
    Network,
    NormalRules,
    Peer,
    Pods,
    PolicyRefused,
)
from bpfdp_agent.desired.programspec import (
    WORD,
    NameTest,
    Peers,
    Prefix,
    ProgramSpec,
    ProtocolTest,
    RangeTest,
    mask_of,
)
from bpfdp_agent.model.policies import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from bpfdp_agent.desired.identities import Identity

MAX_PEERS = 1024
MAX_TESTS = 2000
MAX_PREFIXES = 65536

Terms: TypeAlias = tuple[Pods | Block, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """A program with the meaning of its bits: terms[i] is bit i, names[i] is port name i."""

    spec: ProgramSpec
    terms: Terms
    names: tuple[tuple[str, int], ...]

    @property
    def selects_namespaces(self) -> bool:
        """Whether a namespace's labels matter to it."""
        return any(isinstance(term, Pods) and not term.namespace for term in self.terms)


def program_of(rules: NormalRules) -> Program:
    """The program of a pod's rules in one direction.

    Raises PolicyRefused when it is larger than a straight-line program may be.
    """
    terms = _terms(rules)
    bit = {term: position for position, term in enumerate(terms)}
    names = tuple(sorted({(n.name, n.protocol) for n in rules.named}))
    spec = ProgramSpec(
        direction=str(rules.direction),
        words=-(-len(terms) // WORD),
        by_identity=bool(names) or any(isinstance(term, Pods) for term in terms),
        every_port=_peers(rules.every_port, bit) if rules.every_port else None,
        protocols=tuple(
            ProtocolTest(
                protocol,
                tuple(
                    RangeTest(r.lo, r.hi, _peers(r.peers, bit))
                    for r in rules.ranges
                    if r.protocol == protocol
                ),
            )
            for protocol in sorted({r.protocol for r in rules.ranges})
        ),
        names=tuple(
            NameTest(n.protocol, names.index((n.name, n.protocol)), _peers(n.peers, bit))
            for n in rules.named
        ),
        name_count=len(names),
        prefixes4=_prefixes(terms, 4),
        prefixes6=_prefixes(terms, 6),
        terms=tuple(t.key for t in terms) + tuple(f"port {n} {p}" for n, p in names),
        policies=tuple(map(str, rules.policies)),
    ).sealed()
    _check_size(rules, spec, len(terms))
    return Program(spec, terms, names)


def _terms(rules: NormalRules) -> Terms:
    """Every peer but ANYTHING once, in canonical order."""
    sets = (rules.every_port, *(r.peers for r in rules.ranges), *(n.peers for n in rules.named))
    found = {peer for peers in sets for peer in peers if not isinstance(peer, Anything)}
    return tuple(sorted(found, key=lambda peer: peer.key))


def _peers(peers: frozenset[Peer], bit: Mapping[Pods | Block, int]) -> Peers:
    if ANYTHING in peers:
        return Peers(anything=True)
    return Peers(False, mask_of(bit[p] for p in peers if not isinstance(p, Anything)))


def _check_size(rules: NormalRules, spec: ProgramSpec, terms: int) -> None:
    prefixes = max(len(spec.prefixes4), len(spec.prefixes6))
    for what, size, limit in (
        ("different peers", terms, MAX_PEERS),
        ("port and peer tests", spec.tests, MAX_TESTS),
        ("different CIDRs of one family", prefixes, MAX_PREFIXES),
    ):
        if size > limit:
            together = " together with the others that select the same pod"
            problem = (
                f"needs {size} {what}{together if len(rules.policies) > 1 else ''}, the limit is "
                f"{limit}; use fewer, wider rules (CIDRs, port ranges, label selectors)"
            )
            raise PolicyRefused(
                [Problem(p, f"spec.{rules.direction}", problem) for p in rules.policies]
            )


def _prefixes(terms: Terms, family: int) -> tuple[Prefix, ...]:
    """CIDR map content: each prefix with every block that holds at its addresses.

    Prefixes nest or are disjoint, so walking them in order with a stack of the enclosing ones
    gives each its parent, from whose blocks it differs by those that begin or are excepted at it.
    """
    begins: dict[Network, set[int]] = {}
    excepted: dict[Network, set[int]] = {}
    for bit, term in enumerate(terms):
        if isinstance(term, Block) and term.cidr.version == family:
            begins.setdefault(term.cidr, set()).add(bit)
            for inner in term.excepts:
                excepted.setdefault(inner, set()).add(bit)
    ordered = sorted(
        begins.keys() | excepted.keys(), key=lambda n: (int(n.network_address), n.prefixlen)
    )
    enclosing: list[tuple[Network, frozenset[int]]] = []
    result = []
    for network in ordered:
        while enclosing and int(enclosing[-1][0].broadcast_address) < int(network.network_address):
            enclosing.pop()
        inherited = enclosing[-1][1] if enclosing else frozenset()
        bits = (inherited | begins.get(network, set())) - excepted.get(network, set())
        enclosing.append((network, bits))
        result.append(Prefix(network.network_address.packed, network.prefixlen, mask_of(bits)))
    return tuple(result)


Values: TypeAlias = dict[int, bytes]
Deltas: TypeAlias = dict[str, dict[int, bytes | None]]
"""By program key: identity id → new value, None where the entry is to be deleted."""


@dataclass(frozen=True, slots=True)
class _Known:
    """An identity, its labels and ports by name."""

    namespace: str
    labels: Mapping[str, str]
    ports: Mapping[tuple[str, int], int]


class Membership:
    """Identities and namespaces, seen through the programs in use.

    Values of an identity that has no bit and no named port are left out of the maps. Order, so
    that no packet is wrongly judged: write the deltas of `set_identity` before an address maps to
    it, and those of `delete_identity` after no address does any more.
    """

    def __init__(self) -> None:
        self._identities: dict[int, _Known] = {}
        self._namespaces: dict[str, Mapping[str, str]] = {}
        self._programs: dict[str, Program] = {}

    def add_program(self, program: Program) -> Values:
        """Follow a program from now on; returns its whole identity map."""
        self._programs[program.spec.key] = program
        return self.values(program)

    def delete_program(self, key: str) -> None:
        """Stop following a program."""
        self._programs.pop(key, None)

    def programs(self, keys: Iterable[str]) -> list[Program]:
        """Those of the programs that are followed, by spec key."""
        return [self._programs[key] for key in keys if key in self._programs]

    def values(self, program: Program) -> Values:
        """The identity map of a program."""
        if not program.spec.by_identity:
            return {}
        values = ((i, self._value(program, identity)) for i, identity in self._identities.items())
        return {i: value for i, value in values if value is not None}

    def set_identity(self, number: int, identity: Identity) -> Deltas:
        """Add an identity (an id is never reused while an address still maps to it)."""
        before = self._seen([number], self._programs.values())
        ports = {(p.name, p.protocol): p.port for p in identity.ports}
        self._identities[number] = _Known(identity.namespace, dict(identity.labels), ports)
        return self._changed(before)

    def delete_identity(self, number: int) -> Deltas:
        """Forget an identity."""
        before = self._seen([number], self._programs.values())
        self._identities.pop(number, None)
        return self._changed(before)

    def set_namespace(self, name: str, labels: Mapping[str, str] | None) -> Deltas:
        """A namespace's labels (None: it is gone); returns what that changes for its identities."""
        if self._namespaces.get(name) == labels:
            return {}
        within = [i for i, identity in self._identities.items() if identity.namespace == name]
        before = self._seen(within, (p for p in self._programs.values() if p.selects_namespaces))
        if labels is None:
            del self._namespaces[name]
        else:
            self._namespaces[name] = dict(labels)
        return self._changed(before)

    def _seen(self, numbers: Sequence[int], programs: Iterable[Program]) -> Deltas:
        """What the programs' identity maps say about some identities."""
        return {p.spec.key: self._some(p, numbers) for p in programs if p.spec.by_identity}

    def _some(self, program: Program, numbers: Sequence[int]) -> dict[int, bytes | None]:
        known = self._identities
        return {i: self._value(program, known[i]) if i in known else None for i in numbers}

    def _changed(self, before: Deltas) -> Deltas:
        changed: Deltas = {}
        for key, values in before.items():
            now = self._some(self._programs[key], list(values))
            if different := {i: value for i, value in now.items() if value != values[i]}:
                changed[key] = different
        return changed

    def _value(self, program: Program, identity: _Known) -> bytes | None:
        mask = mask_of(
            bit
            for bit, term in enumerate(program.terms)
            if isinstance(term, Pods) and self._selects(term, identity)
        )
        ports = [identity.ports.get(name, 0) for name in program.names]
        if not mask and not any(ports):
            return None
        return program.spec.identity_value(mask, ports)

    def _selects(self, term: Pods, identity: _Known) -> bool:
        if term.namespace:
            return term.namespace == identity.namespace and term.pods.matches(identity.labels)
        labels = self._namespaces.get(identity.namespace)
        return (
            labels is not None
            and term.namespaces.matches(labels)
            and term.pods.matches(identity.labels)
        )

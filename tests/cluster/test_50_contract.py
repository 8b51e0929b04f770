# SPDX-License-Identifier: Apache-2.0
"""The contract (tests/contract) as packets: a pod, the node it is on, and the outside client ask.

Every vector becomes a Service without a selector and EndpointSlices of ours; `y` is the server on
the clients' node, `z` the one on the next. TCP, both families; UDP is asked of the programs alone.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from cluster import workloads
from cluster.dataplane import get, wait_for
from cluster.places import NODE, OUTSIDE, POD, Places
from cluster.probes import host_of
from cluster.testbed import Testbed
from contract.vectors import (
    OTHER_PORT,
    PORT,
    Flow,
    Vector,
    service_object,
    slice_object,
    transitions,
    vectors,
)

FAMILIES = (4, 6)
TRIES, TRIES_UNANSWERED = 10, 2
AT_ONCE = 10
REFUSED, TIMED_OUT = 7, 28
SETTLED_WITHIN = 20.0
NETWORKS = {4: "198.51.100.0/24", 6: "2001:db8:7::/64"}
EULER = "ABACADBCBDCDA"
"""Every change between four types once."""


@dataclass(frozen=True, slots=True)
class Case:
    """One flow of one vector in one family."""

    vector: str
    flow: Flow
    family: int


class Stage:
    """The vectors' objects on the cluster, and who is who."""

    def __init__(self, shop: Places) -> None:
        self.shop = shop
        self.bed = shop.bed
        first, second = shop.nodes[:2]
        self.backends = {f"web-{first}": "y", f"web-{second}": "z"}
        self.hosts = {
            f: {
                "y": (shop.pod_addresses(f"web-{first}")[f], first),
                "z": (shop.pod_addresses(f"web-{second}")[f], second),
            }
            for f in FAMILIES
        }
        self.clients = {
            "pod": shop.pod_addresses(f"client-{first}"),
            "outside": {f: shop.client_address(f) for f in FAMILIES},
        }
        self.ranges = service_ranges(self.bed)
        self.services: dict[str, dict[str, Any]] = {}

    def name(self, number: int) -> str:
        return f"contract-{number}"

    def outside_address(self, number: int, which: str, family: int) -> str:
        """A load balancer's or external address that belongs to nobody else."""
        offset = number * 2 + (which == "external-ip") + 1
        return str(ipaddress.ip_network(NETWORKS[family])[offset])

    def objects(self, number: int, vector: Vector) -> list[dict[str, Any]]:
        """The Service and its slices, for both families."""
        name = self.name(number)
        vector = self.localised(vector)
        body = service_object(vector, {"cluster-ip": "", "load-balancer": ""}, name=name)
        spec = body["spec"]
        for field in ("externalIPs", "loadBalancerSourceRanges"):
            if field in spec:
                spec[field] = [a for each in spec[field] for a in self.both(number, each)]
        if spec["clusterIP"] != "None":
            del spec["clusterIP"], spec["clusterIPs"]
        for port in spec["ports"]:
            port.pop("nodePort", None)
        spec["ipFamilyPolicy"] = "PreferDualStack"
        body["metadata"]["namespace"] = workloads.NAMESPACE
        found = [{"apiVersion": "v1", "kind": "Service", **body}]
        for family in FAMILIES:
            part = slice_object(vector, self.hosts[family], family, name=name)
            part["metadata"]["namespace"] = workloads.NAMESPACE
            found.append({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", **part})
        return found

    def both(self, number: int, name: str) -> list[str]:
        """A name of the vectors in both families."""
        who = name.strip()
        if who == "external-ip":
            return [self.outside_address(number, who, f) for f in FAMILIES]
        blanks = name.split(who)
        cidrs = [f"{self.clients[who][f]}/{32 if f == 4 else 128}" for f in FAMILIES]
        return [f"{blanks[0]}{cidr}{blanks[1]}" for cidr in cidrs]

    def localised(self, vector: Vector) -> Vector:
        """Zones and node names of the vectors become the cluster's."""
        text = json.dumps(
            {name: [list(e.zones), list(e.nodes)] for name, e in vector.endpoints.items()}
        )
        if vector.zone:
            text = text.replace(f'"{vector.zone}"', f'"zone-{self.shop.nodes[0]}"')
        for letter, node in zip("AB", self.shop.nodes, strict=False):
            text = text.replace(f'"{letter}"', f'"{node}"')
        hints = json.loads(text)
        endpoints = {
            name: msgspec.structs.replace(
                e, zones=tuple(hints[name][0]), nodes=tuple(hints[name][1])
            )
            for name, e in vector.endpoints.items()
        }
        return msgspec.structs.replace(vector, endpoints=endpoints)

    def target(self, number: int, flow: Flow, family: int) -> tuple[str, int] | None:
        """Where the flow goes; None where the cluster has no such address."""
        spec = self.services[self.name(number)]["spec"]
        own = {6 if ":" in ip else 4: ip for ip in spec.get("clusterIPs", []) if ip != "None"}
        node_port = spec["ports"][0].get("nodePort")
        outside = self.outside_address(number, flow.to, family)
        match flow.to:
            case "cluster-ip" | "other-port" if family in own:
                return own[family], PORT if flow.to == "cluster-ip" else OTHER_PORT
            case "node-port" if node_port:
                return self.shop.node_address(self.shop.nodes[0], family), node_port
            case "load-balancer" | "external-ip":
                return outside, PORT
            case "load-balancer-other-port":
                return self.outside_address(number, "load-balancer", family), OTHER_PORT
            case "unallocated":
                network = ipaddress.ip_network(self.ranges[family])
                return str(network[min(network.num_addresses, 65536) - 7]), PORT
            case _:
                return None

    def balance(self, number: int, vector: Vector) -> None:
        """What a cloud's controller would write."""
        mode = vector.ip_mode or "VIP"
        ips = [self.outside_address(number, "load-balancer", f) for f in FAMILIES]
        status = {"status": {"loadBalancer": {"ingress": [{"ip": i, "ipMode": mode} for i in ips]}}}
        self.bed.kubectl(
            "patch", "-n", workloads.NAMESPACE, f"service/{self.name(number)}",
            "--subresource=status", "--type=merge", "-p", json.dumps(status),
        )  # fmt: skip

    def read_services(self) -> None:
        items = get(self.bed, "-n", workloads.NAMESPACE, "services")["items"]
        self.services = {s["metadata"]["name"]: s for s in items}


def service_ranges(bed: Testbed) -> dict[int, str]:
    """The cluster's service ranges by family."""
    items = get(bed, "servicecidrs")["items"]
    return {6 if ":" in c else 4: c for item in items for c in item["spec"]["cidrs"]}


def ask_all(
    stage: Stage, place: str, wanted: list[tuple[Case, tuple[str, int], int]]
) -> dict[Case, set[str]]:
    """What each flow meets at a place, several times over."""
    seen: dict[Case, set[str]] = {}
    for start in range(0, len(wanted), AT_ONCE):
        chunk = wanted[start : start + AT_ONCE]
        lines = []
        for index, (_, (address, port), tries) in enumerate(chunk):
            url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
            get = "curl -gs -w ' ' --fail-early --connect-timeout 1.5 -m 4"
            curl = f"r=$({get} {url}/hostname {url}/clientip); echo {index} $? $r"
            lines.append(f"( for i in $(seq {tries}); do {curl}; done ) &")
        for line in stage.shop.place(place)("\n".join([*lines, "wait"])).splitlines():
            number, code, *answer = line.split()
            case = chunk[int(number)][0]
            seen.setdefault(case, set()).add(_meaning(stage, case, int(code), answer))
    return seen


def _meaning(stage: Stage, case: Case, code: int, answer: list[str]) -> str:
    if code == 0 and answer:
        return _who(stage, case, *answer)
    if case.flow.verdict == "untouched":
        return "untouched"  # nobody of ours answers; what the network says is its own affair
    # a node's process is told at once that there is nobody (EHOSTUNREACH)
    return {REFUSED: "reject", TIMED_OUT: "drop"}.get(code, f"curl exit code {code}")


def _who(stage: Stage, case: Case, hostname: str, client: str) -> str:
    """The backend; where it sees another than the client, that too. A node has many addresses."""
    name = stage.backends.get(hostname, hostname)
    own = stage.clients.get(case.flow.from_)
    if own and host_of(client) != own[case.family]:
        return f"{name} that sees {host_of(client)}"
    return name


def met(case: Case, seen: set[str]) -> bool:
    """As the contract says?"""
    expected = case.flow.expected
    if expected == "drop" and case.flow.from_ == "node":
        return seen <= {"drop", "reject"}  # curl has one code for both errors of connect()
    return seen == ({expected} if isinstance(expected, str) else set(expected))


@pytest.fixture(scope="module")
def stage(shop: Places) -> Iterator[Stage]:
    """Every vector's objects in place, and routes for the outside client."""
    made = Stage(shop)
    items = [o for n, v in enumerate(vectors()) for o in made.objects(n, v)]
    manifest = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    shop.apply(manifest)
    for number, vector in enumerate(vectors()):
        if vector.type == "LoadBalancer":
            made.balance(number, vector)
    made.read_services()
    routes = [
        (network, shop.node_address(shop.nodes[0], family))
        for family in FAMILIES
        for network in (NETWORKS[family], made.ranges[family])
    ]
    for network, via in routes:
        shop.bed.client_exec(["ip", "route", "replace", network, "via", via])
    yield made
    for network, _ in routes:
        shop.bed.client_exec(["ip", "route", "del", network], check=False)
    shop.delete(manifest)


@pytest.mark.parametrize("place", [POD, NODE, OUTSIDE])
def test_every_vector(stage: Stage, place: str) -> None:
    wanted = []
    for number, vector in enumerate(vectors()):
        for flow in vector.flows:
            for family in FAMILIES if flow.from_ == place else ():
                address = stage.target(number, flow, family)
                tries = TRIES if flow.backends else TRIES_UNANSWERED
                if address:
                    wanted.append((Case(vector.name, flow, family), address, tries))

    def as_wanted() -> bool:
        seen = ask_all(stage, place, wanted)
        wrong = {case: got for case, got in seen.items() if not met(case, got)}
        if wrong:
            wanted[:] = [each for each in wanted if each[0] in wrong]
            raise ValueError(
                "\n".join(
                    f"{c.vector}: IPv{c.family} {c.flow.from_} → {c.flow.to}: {sorted(got)}, not"
                    f" {c.flow.expected}"
                    for c, got in wrong.items()
                )
            )
        return bool(seen)

    wait_for(f"the contract at the {place}", as_wanted, SETTLED_WITHIN)


def test_every_change_of_type(stage: Stage) -> None:
    shop, number = stage.shop, len(vectors())
    by_type = {t.before.type: t.before for t in transitions()}
    letters = dict(zip("ABCD", sorted(by_type), strict=True))
    first = by_type[letters[EULER[0]]]
    manifest = json.dumps(
        {"apiVersion": "v1", "kind": "List", "items": stage.objects(number, first)}
    )
    shop.apply(manifest)
    stage.read_services()
    targets: dict[tuple[str, int], tuple[str, int]] = {}
    try:
        for letter in EULER:
            change_type(stage, number, by_type[letters[letter]])
            check_type(stage, number, by_type[letters[letter]], targets)
    finally:
        shop.delete(manifest)


def change_type(stage: Stage, number: int, vector: Vector) -> None:
    """Patch the type, and what the API server wants to go with it."""
    gone = vector.type == "ExternalName"
    spec: dict[str, Any] = {
        "type": vector.type,
        "externalName": "example.org" if gone else None,
        "externalTrafficPolicy": None,
    }
    if gone:
        fields = (
            "clusterIP",
            "clusterIPs",
            "ipFamilies",
            "ipFamilyPolicy",
            "internalTrafficPolicy",
        )
        spec |= dict.fromkeys(fields)
    else:
        spec["ipFamilyPolicy"] = "PreferDualStack"
    if vector.type in ("ClusterIP", "ExternalName"):
        spec["ports"] = [{"name": "p", "port": PORT, "nodePort": None}]
    stage.bed.kubectl(
        "patch", "-n", workloads.NAMESPACE, f"service/{stage.name(number)}",
        "--type=merge", "-p", json.dumps({"spec": spec}),
    )  # fmt: skip
    if vector.type == "LoadBalancer":
        stage.balance(number, vector)
    stage.read_services()


def check_type(
    stage: Stage, number: int, vector: Vector, targets: dict[tuple[str, int], tuple[str, int]]
) -> None:
    """All flows of a type, to where the service is or was last."""
    for flow in vector.flows:
        for family in FAMILIES:
            if found := stage.target(number, flow, family):
                targets[flow.to, family] = found

    def as_wanted() -> bool:
        for flow in vector.flows:
            asked = [
                (Case(vector.type, flow, f), targets[flow.to, f], 6 if flow.backends else 1)
                for f in FAMILIES
                if (flow.to, f) in targets
            ]
            for case, got in ask_all(stage, flow.from_, asked).items():
                if not (
                    got <= set(case.flow.backends) and got if flow.backends else met(case, got)
                ):
                    raise ValueError(f"{case}: {got}")
        return True

    wait_for(f"a service of type {vector.type}", as_wanted, SETTLED_WITHIN)

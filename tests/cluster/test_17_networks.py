# SPDX-License-Identifier: Apache-2.0
"""Other networks than the plain one: an overlay between pods, two networks, strict nodes.

`make cluster-test-setups` brings the setups up one after the other; on another cluster these are
deselected (conftest.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from cluster import workloads
from cluster.dataplane import get, wait_for
from cluster.places import NODE, OUTSIDE, POD, Places
from cluster.probes import Answer, Request, ask, ask_one
from cluster.testbed.settings import CLIENT, GATEWAY, OVERLAY, SECOND_V4, SECOND_V6

FAMILIES = (4, 6)
PROTOCOLS = ("tcp", "udp")
ADDED = {4: str(SECOND_V4[200]), 6: str(SECOND_V6[200])}


@pytest.fixture
def overlay(shop: Places) -> Places:
    """The shop, where pods' packets go from node to node in the CNI's VXLAN."""
    return shop


@pytest.fixture
def networks(shop: Places) -> Places:
    """The shop, where nodes have two networks."""
    return shop


@pytest.fixture
def strict(shop: Places) -> Iterator[Places]:
    """The shop, on nodes with a strict reverse path filter; the first has no default route now."""
    gateways = {4: GATEWAY.v4, 6: GATEWAY.v6}
    for family in FAMILIES:
        shop.bed.node_exec(shop.nodes[0], ["ip", f"-{family}", "route", "del", "default"])
    yield shop
    for family, gateway in gateways.items():
        add = ["ip", f"-{family}", "route", "replace", "default", "via", gateway]
        shop.bed.node_exec(shop.nodes[0], add)


def second(shop: Places, node: str, family: int) -> str:
    """A node's address on the second network."""
    found = shop.bed.node(node)
    return found.second_v4 if family == 4 else found.second_v6


def hooks(shop: Places, node: str) -> dict[str, set[str]]:
    """What the node says is attached, by interface."""
    found = get(shop.bed, f"bpfnodes/{node}")["status"]["interfaces"]
    return {each["name"]: set(each["hooks"]) for each in found}


def packets(shop: Places, node: str, chain: str) -> int:
    """Packets of the overlay that netfilter has seen."""
    rules = shop.bed.node_exec(node, ["iptables", "-t", "mangle", "-L", chain, "-v", "-x", "-n"])
    return sum(int(r.split()[0]) for r in rules.stdout.splitlines() if "bypass-test" in r)


@contextmanager
def watched(shop: Places, node: str) -> Iterator[None]:
    """Netfilter counts what the stack forwards to or from the overlay."""
    rules = [
        ["FORWARD", way, OVERLAY, "-m", "comment", "--comment", "bypass-test"]
        for way in ("-i", "-o")
    ]
    for rule in rules:
        shop.bed.node_exec(node, ["iptables", "-w", "-t", "mangle", "-A", *rule])
    try:
        yield
    finally:
        for rule in rules:
            shop.bed.node_exec(node, ["iptables", "-w", "-t", "mangle", "-D", *rule])


def test_the_overlay_is_passed_by_the_stack(overlay: Places) -> None:
    """Pod to pod and ClusterIP to a pod on another node: in at one veth, out of the VXLAN."""
    near, far = overlay.nodes[:2]
    for node in (near, far):
        assert {"from_net", "to_net"} <= hooks(overlay, node)[OVERLAY]
    service = overlay.service(f"web-{far}")
    requests = [
        Request("tcp", overlay.pod_addresses(f"web-{far}")[4], workloads.POD_TCP),
        *(Request(p, service.addresses[4], service.ports[p]) for p in PROTOCOLS),
    ]
    with watched(overlay, near), watched(overlay, far):
        answers = ask(overlay.place(POD), requests)
        seen = [packets(overlay, node, "FORWARD") for node in (near, far)]
    assert {a.hostname for a in answers.values()} == {f"web-{far}"}
    assert seen == [0, 0], "packets went through the stack"


@pytest.mark.parametrize("family", FAMILIES)
def test_large_answers_fit_the_overlay(overlay: Places, family: int) -> None:
    """Full segments both ways, from pods and from outside clients with a larger MTU."""
    far = f"web-{overlay.nodes[1]}"
    service = overlay.service(far)
    host = {4: "{}", 6: "[{}]"}[family].format
    text = "x" * 3000
    at_cluster = f"{host(service.addresses[family])}:{service.ports['tcp']}"
    node = overlay.node_address(overlay.nodes[0], family)
    at_node = f"{host(node)}:{service.node_ports['tcp']}"
    for kind, place in ((POD, at_cluster), (NODE, at_cluster), (OUTSIDE, at_node)):
        got = overlay.place(kind)(f"curl -gs -m 5 'http://{place}/echo?msg={text}'")
        assert got == text, kind


def test_the_tunnel_has_another_port_than_the_overlay(overlay: Places) -> None:
    """A port that the CNI's VXLAN has is refused with what to do, and traffic goes on."""
    shop, port = overlay, 8472
    spec = get(shop.bed, "bpfdataplanes/default")["spec"]
    before = spec.get("tunnel", {}).get("port", 4789)
    assert before != port
    with patched(shop, {"tunnel": {"port": port}}, {"tunnel": {"port": before}}):
        wait_for("the node to say that the port is taken", lambda: errors_about(shop, OVERLAY))
        assert reaches_everyone(shop, 4)
    wait_for("the error to go", lambda: not errors_about(shop, OVERLAY))


def errors_about(shop: Places, word: str) -> list[str]:
    """Nodes' last errors that contain the word."""
    found = [n["status"].get("lastError") or {} for n in get(shop.bed, "bpfnodes")["items"]]
    return [e["message"] for e in found if word in e.get("message", "")]


@contextmanager
def patched(shop: Places, spec: dict[str, Any], back: dict[str, Any]) -> Iterator[None]:
    """The config is so within the block."""
    change(shop, spec)
    try:
        yield
    finally:
        change(shop, back)


def change(shop: Places, spec: dict[str, Any]) -> None:
    """Without waiting."""
    patch = json.dumps({"spec": spec})
    shop.bed.kubectl("patch", "bpfdataplanes", "default", "--type=merge", "-p", patch)


def reaches_everyone(shop: Places, family: int) -> bool:
    """A pod reaches each node's server through its ClusterIP."""
    services = {n: shop.service(f"web-{n}") for n in shop.nodes}
    wanted = {Request("tcp", s.addresses[family], s.ports["tcp"]): n for n, s in services.items()}
    got = ask(shop.place(POD), wanted)
    return all(got[r].hostname == f"web-{n}" for r, n in wanted.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [OUTSIDE, NODE, POD])
def test_nodeports_on_the_second_network(networks: Places, kind: str, family: int) -> None:
    """Every backend, and from outside: answers from the address that was asked, client kept.

    A pod knows the second addresses of its own node only: those of others are no node's to it.
    """
    backends = [f"{role}-{node}" for role in ("web", "host") for node in networks.nodes[:2]]
    address = second(networks, networks.nodes[0], family)
    requests = {
        Request(proto, address, networks.service(name).node_ports[proto]): name
        for name in backends
        for proto in PROTOCOLS
    }
    got = ask(networks.place(kind), requests)
    client = CLIENT.second_v4 if family == 4 else CLIENT.second_v6
    for request, name in requests.items():
        assert got[request].hostname == name.removeprefix("host-"), request
        if kind == OUTSIDE:
            assert got[request].client == client, "the client's address is kept"


@pytest.mark.parametrize("family", FAMILIES)
def test_nodeport_addresses_choose_the_network(networks: Places, family: int) -> None:
    service = networks.service(f"web-{networks.nodes[1]}")
    node, port = networks.nodes[0], service.node_ports["tcp"]
    first = Request("tcp", networks.node_address(node, family), port)
    other = Request("tcp", second(networks, node, family), port)
    outside = networks.place(OUTSIDE)
    only = {"services": {"nodePortAddresses": [str(SECOND_V4), str(SECOND_V6)]}}
    with patched(networks, only, {"services": {"nodePortAddresses": []}}):
        wait_for("the first network to be left out", lambda: not ask_one(outside, first).arrived)
        assert ask_one(outside, other).arrived
    wait_for("it to be back", lambda: ask_one(outside, first).arrived)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_address_serves_nodeports_until_it_goes(networks: Places, family: int) -> None:
    service = networks.service(f"web-{networks.nodes[1]}")
    node, address = networks.nodes[0], ADDED[family]
    size = f"{address}/{24 if family == 4 else 64}"
    request = Request("tcp", address, service.node_ports["tcp"])

    def asked() -> Answer:
        return ask_one(networks.place(OUTSIDE), request)

    add = ["ip", "addr", "add", size, "dev", "eth1", *(["nodad"] if family == 6 else [])]
    networks.bed.node_exec(node, add)
    try:
        wait_for("the new address to serve", lambda: asked().arrived, 15)
        networks.bed.kubectl("get", f"bpfnodes/{node}")
    finally:
        networks.bed.node_exec(node, ["ip", "addr", "del", size, "dev", "eth1"])
    wait_for("the address to be forgotten", lambda: address not in addresses(networks, node), 15)


def addresses(shop: Places, node: str) -> list[str]:
    """What the node says are its own."""
    return list(get(shop.bed, f"bpfnodes/{node}")["status"]["addresses"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frontend", ["clusterip", "nodeport"])
def test_a_strict_node_reaches_services(strict: Places, frontend: str, family: int) -> None:
    """Its own NodePorts and every ClusterIP, without a route to any of them."""
    route = strict.bed.node_exec(strict.nodes[0], ["ip", f"-{family}", "route", "show", "default"])
    assert not route.stdout.strip()
    requests: dict[Request, str] = {}
    for name in (f"{role}-{node}" for role in ("web", "host") for node in strict.nodes[:2]):
        service = strict.service(name)
        for proto in PROTOCOLS:
            if frontend == "clusterip":
                request = Request(proto, service.addresses[family], service.ports[proto])
            else:
                own = strict.node_address(strict.nodes[0], family)
                request = Request(proto, own, service.node_ports[proto])
            requests[request] = name.removeprefix("host-")
    got = ask(strict.place(NODE), requests)
    assert {r: a.hostname for r, a in got.items()} == requests

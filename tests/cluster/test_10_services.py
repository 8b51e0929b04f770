# SPDX-License-Identifier: Apache-2.0
"""With kube-proxy gone: TCP and UDP through ClusterIP and NodePort, for everyone, to every backend.

The clients are on the first node (or outside); "local" is that node, "remote" another one.
"""

from __future__ import annotations

import itertools
import json

import pytest
from cluster import dataplane, workloads
from cluster.places import NODE, OUTSIDE, POD, Places
from cluster.probes import Answer, Request, ask, ask_one
from cluster.testbed.settings import BIN

BACKENDS = ("web-local", "web-remote", "host-local", "host-remote")
PROTOCOLS = ("tcp", "udp")
FAMILIES = (4, 6)

Case = tuple[str, str, str, str, int]


def cases() -> list[Case]:
    """(client, frontend, backend, protocol, family), less what cannot be: ClusterIPs from outside."""
    every = itertools.product(
        (POD, NODE, OUTSIDE), ("clusterip", "nodeport"), BACKENDS, PROTOCOLS, FAMILIES
    )
    return [c for c in every if not (c[0] == OUTSIDE and c[1] == "clusterip")]


def server_name(shop: Places, backend: str) -> str:
    """`web-local` → `web-NODE`."""
    role, where = backend.split("-")
    return f"{role}-{shop.nodes[0 if where == 'local' else 1]}"


def request(shop: Places, case: Case, services: dict[str, object]) -> Request:
    """The request of a case."""
    _, frontend, backend, proto, family = case
    service = services[backend]
    if frontend == "clusterip":
        return Request(proto, service.addresses[family], service.ports[proto])
    return Request(proto, shop.node_address(shop.nodes[0], family), service.node_ports[proto])


@pytest.fixture(scope="module")
def answers(shop: Places) -> dict[Case, Answer]:
    """All cases asked, one script a client."""
    services = {b: shop.service(server_name(shop, b)) for b in BACKENDS}
    result: dict[Case, Answer] = {}
    for kind in (POD, NODE, OUTSIDE):
        mine = {c: request(shop, c, services) for c in cases() if c[0] == kind}
        got = ask(shop.place(kind), mine.values())
        result |= {c: got[r] for c, r in mine.items()}
    return result


@pytest.mark.parametrize("case", cases(), ids=lambda c: "-".join(map(str, c)))
def test_reaches_its_backend(shop: Places, answers: dict[Case, Answer], case: Case) -> None:
    client, _, backend, _, family = case
    name = server_name(shop, backend)
    wanted = name if name.startswith("web") else name.removeprefix("host-")
    assert answers[case].hostname == wanted
    if client == OUTSIDE:
        assert answers[case].client == shop.client_address(family), "the client's address is kept"
    if client == POD and backend.startswith("web"):
        pod = shop.pod_addresses(f"client-{shop.nodes[0]}")
        assert answers[case].client == pod[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_nodeport_of_another_node_from_a_pod(shop: Places, family: int) -> None:
    service = shop.service(f"web-{shop.nodes[1]}")
    address = shop.node_address(shop.nodes[2 % len(shop.nodes)], family)
    for proto in PROTOCOLS:
        answer = ask_one(shop.place(POD), Request(proto, address, service.node_ports[proto]))
        assert answer.hostname == f"web-{shop.nodes[1]}"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_node_reaches_its_nodeports_over_loopback(shop: Places, address: str) -> None:
    service = shop.service(f"web-{shop.nodes[1]}")
    answer = ask_one(shop.place(NODE), Request("tcp", address, service.node_ports["tcp"]))
    assert answer.hostname == f"web-{shop.nodes[1]}"


@pytest.mark.parametrize("family", FAMILIES)
def test_pod_to_pod(shop: Places, family: int) -> None:
    requests = {
        Request("tcp", shop.pod_addresses(f"web-{n}")[family], workloads.POD_TCP): n
        for n in shop.nodes
    }
    got = ask(shop.place(POD), requests)
    assert {r: a.hostname for r, a in got.items()} == {r: f"web-{n}" for r, n in requests.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_backend_gets_its_share(shop: Places, family: int) -> None:
    service = shop.service("web")
    url = service.addresses[family]
    host = f"[{url}]" if family == 6 else url
    script = f"for i in $(seq 40); do curl -gs -m 5 http://{host}/hostname; echo; done"
    seen = set(shop.place(POD)(script).split())
    assert seen == {f"web-{n}" for n in shop.nodes}


@pytest.mark.parametrize("family", FAMILIES)
def test_hairpin(shop: Places, family: int) -> None:
    name = f"web-{shop.nodes[0]}"
    service = shop.service(name)
    for proto in PROTOCOLS:
        request = Request(proto, service.addresses[family], service.ports[proto])
        assert ask_one(shop.from_pod(name), request).hostname == name


def test_dns(shop: Places) -> None:
    out = shop.place(POD)("dig +short +time=3 +tries=1 kubernetes.default.svc.cluster.local A")
    assert out.split(), "the cluster DNS answers through its ClusterIP"


@pytest.mark.parametrize("family", FAMILIES)
def test_pods_reach_outside_through_the_cnis_masquerade(shop: Places, family: int) -> None:
    agnhost = str(BIN / "agnhost")
    server = shop.bed.client_start([agnhost, "netexec", "--http-port=8099", "--udp-port=8098"])
    try:
        address = shop.client_address(family)
        host = f"[{address}]" if family == 6 else address
        script = f"curl -gs --connect-timeout 3 -m 5 http://{host}:8099/clientip"
        seen = dataplane.wait_for("an answer from outside", lambda: shop.place(POD)(script), 15)
    finally:
        server.terminate()
        server.wait(10)
    node = shop.node_address(shop.nodes[0], family)
    assert seen.strip().rpartition(":")[0].strip("[]").removeprefix("::ffff:") == node


def test_cni_host_port(shop: Places) -> None:
    pod = workloads.server("hostport", shop.nodes[1], host_network=False)
    pod["spec"]["containers"][0]["ports"][0]["hostPort"] = 28080
    shop.apply(json.dumps(pod))
    shop.wait_ready()
    try:
        request = Request("tcp", shop.node_address(shop.nodes[1], 4), 28080)
        assert ask_one(shop.from_outside(), request).hostname == "hostport"
        assert ask_one(shop.from_pod(f"client-{shop.nodes[0]}"), request).hostname == "hostport"
    finally:
        shop.delete(json.dumps(pod))


def test_no_endpoints_is_refused_at_once(shop: Places) -> None:
    shop.apply(json.dumps(workloads.service("nobody", {"app": "nobody"})))
    try:
        service = shop.service("nobody")
        for kind in (POD, NODE):
            script = (
                f"timeout 3 nc -z -w 3 {service.addresses[4]} {service.ports['tcp']}"
                " >/dev/null 2>&1; echo $?"
            )
            dataplane.wait_for(
                f"a refusal to the {kind}",
                lambda k=kind, s=script: shop.place(k)(s).strip() == "1",
                5,
            )
    finally:
        shop.bed.kubectl("delete", "-n", workloads.NAMESPACE, "service", "nobody")

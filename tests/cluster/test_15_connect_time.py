# SPDX-License-Identifier: Apache-2.0
"""Pods' sockets at connect time: each mode, the change between them, and UDP whose backend goes.

What a socket was told shows in /proc/net of the pod: the peer is the backend, or the service.
"""

from __future__ import annotations

import ipaddress
import itertools
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from cluster import workloads
from cluster.dataplane import CR, get, wait_for
from cluster.places import NODE, POD, Places
from cluster.probes import Answer, Request, Run, ask, ask_one

FAMILIES = (4, 6)
PROTOCOLS = ("tcp", "udp")
MODES = {"Disabled": set(), "TCP": {"tcp"}, "Enabled": {"tcp", "udp"}}
"""What each translates for pods; TCP is the default and left in place at the end."""
REQUESTS = 8


def switch(shop: Places, mode: str) -> None:
    """Set the mode and wait until every node has it."""
    patch = {"spec": {"services": {"connectTimeLoadBalancing": mode}}}
    shop.bed.kubectl("patch", CR, "--type=merge", "-p", json.dumps(patch))
    generation = get(shop.bed, CR)["metadata"]["generation"]

    def followed() -> bool:
        nodes = get(shop.bed, "bpfnodes")["items"]
        return all(n["status"].get("observedConfigGeneration") == generation for n in nodes)

    wait_for(f"mode {mode} on every node", followed, 30)
    time.sleep(0.5)


@pytest.fixture(scope="module")
def modes(shop: Places) -> Iterator[Places]:
    """The shop; the default mode afterwards."""
    yield shop
    switch(shop, "TCP")


def kernel_peer(address: str, port: int) -> str:
    """As /proc/net/{tcp,udp}{,6} writes a peer."""
    packed = ipaddress.ip_address(address).packed
    words = [packed[i : i + 4][::-1].hex() for i in range(0, len(packed), 4)]
    return f"{''.join(words)}:{port:04x}".upper()


def peers(run: Run, targets: list[tuple[str, str, int]]) -> str:
    """The pod's tables while it has a socket connected to each (protocol, address, port)."""
    lines = [
        f"( sleep 2 | timeout 4 nc {'-u' if proto == 'udp' else ''} {address} {port} ) &"
        for proto, address, port in targets
    ]
    tables = "cat /proc/net/tcp /proc/net/tcp6 /proc/net/udp /proc/net/udp6"
    return run("\n".join([*lines, "sleep 1", tables, "wait", "true"]))


@pytest.mark.parametrize("mode", MODES)
def test_who_translates(modes: Places, mode: str) -> None:
    """What a pod's sockets were told, and that pods and the node are served in each mode."""
    switch(modes, mode)
    backend = f"web-{modes.nodes[1]}"
    service, addresses = modes.service(backend), modes.pod_addresses(backend)
    ports = {"tcp": workloads.POD_TCP, "udp": workloads.POD_UDP}
    both = list(itertools.product(PROTOCOLS, FAMILIES))
    asked = {(p, f): (service.addresses[f], service.ports[p]) for p, f in both}
    table = peers(modes.place(POD), [(p, *asked[p, f]) for p, f in both])
    for proto, family in both:
        translated = proto in MODES[mode]
        told = (addresses[family], ports[proto]) if translated else asked[proto, family]
        assert kernel_peer(*told) in table, (proto, family)

    requests = [Request(proto, *asked[proto, family]) for proto, family in both]
    requests += [
        Request(p, modes.node_address(modes.nodes[0], f), service.node_ports[p]) for p, f in both
    ]
    for place in (POD, NODE):
        answers = ask(modes.place(place), requests)
        assert {a.hostname for a in answers.values()} == {backend}, place

    itself = f"web-{modes.nodes[0]}"
    own = modes.service(itself)
    hairpins = {Request(p, own.addresses[f], own.ports[p]): f for p, f in both}
    for request, answer in ask(modes.from_pod(itself), hairpins).items():
        node = modes.node_address(modes.nodes[0], hairpins[request])
        assert answer == Answer(itself, node), "a pod that is its own backend sees the node"


def test_a_live_connection_outlives_each_change(modes: Places) -> None:
    """Opened in each mode and asked on while the mode changes: every answer comes."""
    service = modes.service(f"web-{modes.nodes[1]}")
    ask_on = (
        f"for i in $(seq {REQUESTS}); do printf 'GET /hostname HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n';"
        f" sleep 1; done | timeout {REQUESTS + 3} nc {service.addresses[4]}"
        f" {service.ports['tcp']}; true"
    )
    run = modes.place(POD)
    with ThreadPoolExecutor(2) as pool:
        switch(modes, "Disabled")
        per_packet = pool.submit(run, ask_on)
        time.sleep(2)
        switch(modes, "Enabled")
        at_connect = pool.submit(run, ask_on)
        time.sleep(2)
        switch(modes, "TCP")
        switch(modes, "Disabled")
        for each in (per_packet, at_connect):
            assert each.result(40).count("200 OK") == REQUESTS


@pytest.fixture(scope="module")
def spare(modes: Places) -> Iterator[None]:
    """A server on each of two nodes that no other service has."""
    pods = [
        workloads.server(f"swap-{node}", node, host_network=False)
        | {"metadata": {"name": f"swap-{node}", "namespace": workloads.NAMESPACE}}
        for node in modes.nodes[:2]
    ]
    manifest = json.dumps({"apiVersion": "v1", "kind": "List", "items": pods})
    modes.apply(manifest)
    modes.bed.kubectl(
        "wait", "-n", workloads.NAMESPACE, "--for=condition=Ready", "--timeout=60s",
        *(f"pod/{pod['metadata']['name']}" for pod in pods),
    )  # fmt: skip
    yield
    modes.bed.kubectl(
        "delete", "-n", workloads.NAMESPACE, "--wait=false",
        *(f"pod/{pod['metadata']['name']}" for pod in pods),
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["Enabled", "TCP"])
def test_a_connected_udp_socket_whose_backend_goes(modes: Places, spare: None, mode: str) -> None:
    """It is told at once, where it was translated; else its next datagram goes to the new one."""
    switch(modes, mode)
    names = [f"swap-{node}" for node in modes.nodes[:2]]
    places = [modes.pod_addresses(name)[4] for name in names]
    meta = {"name": "swap", "namespace": workloads.NAMESPACE}
    port = {"name": "udp", "port": 81, "protocol": "UDP"}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": meta,
        "spec": {"ports": [{**port, "targetPort": workloads.POD_UDP}]},
    }
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {**meta, "labels": {"kubernetes.io/service-name": "swap"}},
        "addressType": "IPv4",
        "ports": [{**port, "port": workloads.POD_UDP}],
    }

    def to(address: str) -> str:
        ready = {"addresses": [address], "conditions": {"ready": True}}
        return json.dumps({**endpoints, "endpoints": [ready]})

    modes.apply(json.dumps(service))
    try:
        modes.apply(to(places[0]))
        address = modes.service("swap").addresses[4]
        request = Request("udp", address, 81)
        wait_for("swap", lambda: ask_one(modes.place(POD), request).hostname == names[0])
        ask_twice = "( echo hostname; sleep 5; echo hostname; sleep 1 )"
        script = (
            f"( {ask_twice} | timeout 8 nc -u {address} 81 ) & sleep 5.5;"
            " echo; cat /proc/net/udp; wait; true"
        )
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(modes.place(POD), script)
            time.sleep(2)
            modes.apply(to(places[1]))
            seen = asking.result(30)
        assert names[0] in seen
        assert kernel_peer(places[0], workloads.POD_UDP) not in seen, "it is on the dead backend"
        if mode == "TCP":
            assert names[1] in seen
        assert ask_one(modes.place(POD), request).hostname == names[1]
    finally:
        modes.delete(json.dumps({"apiVersion": "v1", "kind": "List", "items": [service]}))

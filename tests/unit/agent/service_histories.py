# SPDX-License-Identifier: Apache-2.0
"""Services, slices, nodes and what befalls them, for property tests; small, so that they collide."""

from __future__ import annotations

from hypothesis import strategies as st
from unit.agent.kube_objects import added, deleted, endpoint, endpoint_slice, node, service

names = st.sampled_from(["web", "api"])
node_names = st.sampled_from(["node1", "node2"])
zones = st.sampled_from(["", "east", "west"])
CLUSTER_IPS = (["10.96.0.1", "fd96::1"], ["10.96.0.2", "fd96::2"], ["10.96.0.1"])
SUBNETS = {4: "10.0.0.", 6: "fd00::"}


@st.composite
def services(draw):
    spec = {}
    if draw(st.booleans()):
        spec |= {
            "type": "NodePort",
            "externalTrafficPolicy": draw(st.sampled_from(["Local", "Cluster"])),
        }
    if draw(st.booleans()):
        spec["internalTrafficPolicy"] = "Local"
    if draw(st.booleans()):
        spec["sessionAffinity"] = "ClientIP"
    if draw(st.booleans()):
        ranges = st.sampled_from([[], ["10.0.0.0/8", "fd00::/8"], ["192.168.0.0/16"]])
        spec |= {
            "externalIPs": ["9.9.9.9", "2001:db8::9"],
            "loadBalancerSourceRanges": draw(ranges),
            "status": {"loadBalancer": {"ingress": [{"ip": "5.6.7.8"}, {"ip": "2001:db8::5"}]}},
        }
    number = draw(st.sampled_from([80, 81]))
    port = {
        "name": "http",
        "port": number,
        "protocol": draw(st.sampled_from(["TCP", "UDP"])),
        "nodePort": 30000 + number if "type" in spec else 0,
    }
    return service(draw(names), draw(st.sampled_from(CLUSTER_IPS)), ports=[port], **spec)


@st.composite
def slices(draw):
    family = draw(st.sampled_from([4, 4, 6]))
    ends = [
        endpoint(
            f"{SUBNETS[family]}{n}",
            draw(st.one_of(node_names, st.none())),
            ready=draw(st.booleans()),
            serving=draw(st.booleans()),
            terminating=draw(st.booleans()),
            zones=tuple(filter(None, [draw(zones)])),
        )
        for n in draw(st.lists(st.integers(1, 6), max_size=5))
    ]
    ports = [{"name": "http", "port": 8080, "protocol": p} for p in ("TCP", "UDP")]
    of = draw(names)
    part = draw(st.sampled_from("xy"))
    return endpoint_slice(ends, of, name=f"{of}-{family}{part}", ports=ports, family=family)


# 10.0.0.1 and fd00::1 are endpoints too: a node may come to hold one
nodes = st.builds(
    lambda name, last, zone: node(name, (f"192.168.0.{last}", f"{SUBNETS[6]}{last}"), zone),
    node_names,
    st.integers(1, 3),
    zones,
)
objects = st.one_of(services(), slices(), slices(), nodes)
events = st.lists(
    st.builds(lambda make, found: make(found), st.sampled_from([added, added, deleted]), objects),
    max_size=25,
)
batches = st.lists(events, max_size=5)

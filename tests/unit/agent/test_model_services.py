# SPDX-License-Identifier: Apache-2.0
"""Services as kube-proxy sees them: upstream's tables, as a pure function.

Names in docstrings are upstream's (pkg/proxy/topology_test.go, nftables/proxier_test.go).
"""

from __future__ import annotations

import pytest
from bpfdp_agent.layouts import BackendFlag, FrontendFlag
from bpfdp_agent.model.addresses import cidr, contains, mapped, packed
from bpfdp_agent.model.nodes import NodeIndex, node_info
from bpfdp_agent.model.services import service_view
from unit.agent.kube_objects import endpoint, endpoint_slice, node, service

F = FrontendFlag


def index(*nodes, own="node1"):
    found = NodeIndex(own)
    for each in nodes or (node("node1"), node("node2", ("192.168.0.2", "fd00:1::2"))):
        found.put(node_info(each))
    return found


def view(svc, *slices, family=4, nodes=None):
    return service_view(svc, slices, family, nodes or index())


def only(svc, *slices, **kw):
    (port,) = view(svc, *slices, **kw).ports
    return port


def text(backends):
    return [f"{'.'.join(map(str, b.address))}:{b.port}" for b in backends]


def last(backends):
    return [b.address[3] for b in backends]


def flags(port):
    return [f.flags for f in port.frontends]


def test_a_cluster_ip():
    """TestClusterIPGeneral, multiple endpoints."""
    port = only(service(), endpoint_slice([endpoint("10.0.0.2", "node2"), endpoint("10.0.0.1")]))
    assert text(port.cluster) == ["10.0.0.1:8080", "10.0.0.2:8080"]
    assert port.local == ()
    (frontend,) = port.frontends
    assert (frontend.address, frontend.port, frontend.protocol, frontend.flags) == (
        packed("10.96.0.1"),
        80,
        6,
        F.CLUSTER_IP,
    )
    near, far = port.cluster
    assert (near.flags, near.node) == (BackendFlag.LOCAL, b"")
    assert (far.flags, far.node) == (BackendFlag(0), mapped(packed("192.168.0.2")))


def test_one_number_three_protocols():
    ports = [{"name": n.lower(), "port": 53, "protocol": n} for n in ("TCP", "UDP", "SCTP")]
    slice_ = endpoint_slice(
        [endpoint("10.0.0.1")],
        ports=[
            {"name": n.lower(), "port": port, "protocol": n}
            for n, port in (("TCP", 1000), ("UDP", 1001), ("SCTP", 53))
        ],
    )
    found = view(service(ports=ports), slice_).ports
    assert [(p.key.protocol, p.frontends[0].port, p.cluster[0].port) for p in found] == [
        (6, 53, 1000),
        (17, 53, 1001),
        (132, 53, 53),
    ]


def sctp(target, **spec):
    ports = [{"name": "s", "port": 80, "nodePort": 30080, "protocol": "SCTP"}]
    slice_ = endpoint_slice(
        [endpoint("10.0.0.1")] if target else [],
        ports=[{"name": "s", "port": target, "protocol": "SCTP"}] if target else [],
    )
    return view(service(ports=ports, type="NodePort", **spec), slice_)


def test_sctp_is_served_where_its_ports_stay():
    found = sctp(80)
    assert [f.port for f in found.ports[0].frontends] == [80]
    (problem,) = found.problems
    assert "nodePort 30080 is not served" in problem
    assert "let nodePort and targetPort be the same" in problem
    assert [f.port for f in sctp(30080).ports[0].frontends] == [30080]
    assert len(sctp(8080).problems) == 2


def test_sctp_without_endpoints_is_refused_by_every_frontend():
    found = sctp(0)
    assert [f.port for f in found.ports[0].frontends] == [80, 30080]
    assert found.problems == ()


def test_families_know_nothing_of_each_other():
    svc = service(ip=["10.96.0.1", "fd00:96::1"], externalIPs=["1.2.3.4", "2001:db8::1"])
    slices = (
        endpoint_slice([endpoint("10.0.0.1")]),
        endpoint_slice([endpoint("fd00::1", "node2")], family=6),
    )
    four, six = (only(svc, *slices, family=f) for f in (4, 6))
    assert [f.address for f in four.frontends] == [packed("10.96.0.1"), packed("1.2.3.4")]
    assert [f.address for f in six.frontends] == [packed("fd00:96::1"), packed("2001:db8::1")]
    assert [b.address for b in six.cluster] == [packed("fd00::1")]
    assert six.cluster[0].node == mapped(packed("192.168.0.2"))  # one outer address for both
    assert view(service(), *slices, family=6).ports == ()


@pytest.mark.parametrize(
    "svc",
    [
        service(type="ExternalName"),
        service(ip="None"),
        service(ip=""),
        service(meta={"labels": {"service.kubernetes.io/headless": ""}}),
        service(meta={"labels": {"service.kubernetes.io/service-proxy-name": "other"}}),
        None,
    ],
)
def test_services_that_are_not_ours(svc):
    found = view(svc, endpoint_slice([endpoint("10.0.0.1")]))
    assert (found.ports, found.cluster_ip) == ((), b"")


def test_slices_are_merged_and_duplicates_dropped_local_wins():
    slices = [
        endpoint_slice([endpoint("10.0.0.1", "node2"), endpoint("10.0.0.2", "node2")], name="a"),
        endpoint_slice([endpoint("10.0.0.1", "node1"), endpoint("10.0.0.3", "node2")], name="b"),
    ]
    for order in (slices, slices[::-1]):
        port = only(service(internalTrafficPolicy="Local"), *order)
        assert last(port.local) == [1]
        assert last(only(service(), *order).cluster) == [1, 2, 3]


def test_only_the_first_address_counts_and_fqdn_slices_do_not():
    extra = endpoint("10.0.0.1") | {"addresses": ["10.0.0.1", "10.0.0.9"]}
    assert last(only(service(), endpoint_slice([extra])).cluster) == [1]


def test_named_target_ports_may_differ_by_slice():
    slices = [
        endpoint_slice(
            [endpoint(f"10.0.0.{n}")], name=str(n), ports=[{"name": "http", "port": 8000 + n}]
        )
        for n in (1, 2)
    ]
    assert text(only(service(), *slices).cluster) == ["10.0.0.1:8001", "10.0.0.2:8002"]


def test_bad_parts_are_named_and_left_out():
    slice_ = endpoint_slice(
        [endpoint("300.0.0.1"), endpoint("10.0.0.1"), {"addresses": []}],
        ports=[{"port": 1}, {"name": "http", "port": None}, {"name": "http", "port": 8080}],
    )
    svc = service(externalIPs=["nonsense"], loadBalancerSourceRanges=["10.0.0.0/99"])
    found = view(svc, slice_)
    assert last(found.ports[0].cluster) == [1]
    problems = "\n".join(
        [*found.problems, *(f"{p.slice} {p.problem}" for p in found.slice_problems)]
    )
    for named in ("ns/web-v4", "300.0.0.1", "without a name or number", "nonsense", "10.0.0.0/99"):
        assert named in problems


def test_leading_zeros_are_decimal_as_in_kubernetes():
    assert last(only(service(), endpoint_slice([endpoint("010.000.0.001")])).cluster) == [1]


# -- CategorizeEndpoints ----------------------------------------------------------------------

ZONED = (node("node1", zone="a"), node("node2", ("192.168.0.2",), zone="b"))


@pytest.mark.parametrize(
    ("name", "endpoints", "cluster"),
    [
        (
            "hints, this zone",
            [endpoint("10.0.0.1", zones=("a",)), endpoint("10.0.0.2", "node2", zones=("b",))],
            [1],
        ),
        (
            "hints, this zone listed among others",
            [endpoint("10.0.0.1", zones=("b", "a")), endpoint("10.0.0.2", "node2", zones=("b",))],
            [1],
        ),
        (
            "one without hints disables all",
            [endpoint("10.0.0.1", zones=("a",)), endpoint("10.0.0.2", "node2")],
            [1, 2],
        ),
        (
            "no hint names this zone",
            [endpoint("10.0.0.1", zones=("c",)), endpoint("10.0.0.2", "node2", zones=("b",))],
            [1, 2],
        ),
        (
            "unready ones do not count for hints",
            [
                endpoint("10.0.0.1", zones=("a",)),
                endpoint("10.0.0.2", "node2", zones=("b",)),
                endpoint("10.0.0.3", "node2", ready=False),
            ],
            [1],
        ),
        (
            "unready ones in this zone do not help",
            [
                endpoint("10.0.0.1", zones=("a",), ready=False),
                endpoint("10.0.0.2", "node2", zones=("b",)),
            ],
            [2],
        ),
        (
            "node hints go first",
            [
                endpoint("10.0.0.1", zones=("a",), nodes=("node1",)),
                endpoint("10.0.0.2", "node2", zones=("a",), nodes=("node2",)),
            ],
            [1],
        ),
        (
            "no node hint names this node: zones",
            [
                endpoint("10.0.0.1", zones=("a",), nodes=("node3",)),
                endpoint("10.0.0.2", "node2", zones=("b",), nodes=("node2",)),
            ],
            [1],
        ),
        (
            "terminating ones only, topology ignored",
            [
                endpoint("10.0.0.1", ready=False, serving=True, terminating=True, zones=("a",)),
                endpoint(
                    "10.0.0.2", "node2", ready=False, serving=True, terminating=True, zones=("b",)
                ),
            ],
            [1, 2],
        ),
        (
            "a ready one beats terminating ones",
            [
                endpoint("10.0.0.1", ready=False, serving=True, terminating=True),
                endpoint("10.0.0.2", "node2"),
            ],
            [2],
        ),
        (
            "terminating and not serving: never",
            [endpoint("10.0.0.1", ready=False, serving=False, terminating=True)],
            [],
        ),
        ("unknown conditions mean ready", [endpoint("10.0.0.1", ready=None)], [1]),
        ("no endpoints", [], []),
    ],
)
def test_categorize_cluster(name, endpoints, cluster):
    """TestCategorizeEndpoints, Cluster traffic policy."""
    assert last(only(service(), endpoint_slice(endpoints), nodes=index(*ZONED)).cluster) == cluster


def leaving(address, node_name="node1"):
    return endpoint(address, node_name, ready=False, serving=True, terminating=True)


@pytest.mark.parametrize(
    ("spec", "endpoints", "cluster", "local", "drop"),
    [
        # internalTrafficPolicy: Local, not reachable from outside: the Cluster set is not used
        (
            {"internalTrafficPolicy": "Local"},
            [endpoint("10.0.0.1"), endpoint("10.0.0.2", "node2")],
            [],
            [1],
            True,
        ),
        ({"internalTrafficPolicy": "Local"}, [endpoint("10.0.0.2", "node2")], [], [], True),
        ({"internalTrafficPolicy": "Local"}, [], [], [], False),
        (
            {"internalTrafficPolicy": "Local"},
            [leaving("10.0.0.1"), endpoint("10.0.0.2", "node2")],
            [],
            [1],
            True,
        ),
        (
            {"internalTrafficPolicy": "Local"},
            [leaving("10.0.0.1"), endpoint("10.0.0.3")],
            [],
            [3],
            True,
        ),
        # and with a NodePort both
        (
            {"internalTrafficPolicy": "Local", "type": "NodePort"},
            [endpoint("10.0.0.1"), endpoint("10.0.0.2", "node2")],
            [1, 2],
            [1],
            True,
        ),
    ],
)
def test_internal_traffic_policy_local(spec, endpoints, cluster, local, drop):
    ports = [{"name": "http", "port": 80, "nodePort": 30080 if "type" in spec else 0}]
    port = only(service(ports=ports, **spec), endpoint_slice(endpoints))
    assert (last(port.cluster), last(port.local)) == (cluster, local)
    inside = port.frontends[0].flags
    assert F.INTERNAL_LOCAL | F.EXTERNAL_LOCAL in inside
    assert (F.INTERNAL_DROP in inside) == (F.EXTERNAL_DROP in inside) == drop
    if "type" in spec:
        assert port.frontends[1].flags == F.EXTERNAL  # never affects NodePorts


def lb(**spec):
    ports = [{"name": "http", "port": 80, "nodePort": 30080}]
    ingress = spec.pop("ingress", [{"ip": "5.6.7.8", "ipMode": "VIP"}])
    return service(
        type="LoadBalancer", ports=ports, status={"loadBalancer": {"ingress": ingress}}, **spec
    )


@pytest.mark.parametrize(
    ("endpoints", "local", "drop"),
    [
        ([endpoint("10.0.0.1"), endpoint("10.0.0.2", "node2")], [1], True),
        ([endpoint("10.0.0.2", "node2")], [], True),  # some elsewhere: DROP
        ([leaving("10.0.0.2", "node2")], [], True),
        ([leaving("10.0.0.1"), endpoint("10.0.0.2", "node2")], [1], True),
        ([], [], False),  # none anywhere: REJECT
        ([endpoint("10.0.0.2", "node2", ready=False)], [], False),
    ],
)
def test_external_traffic_policy_local(endpoints, local, drop):
    """TestExternalTrafficPolicyLocal: ClusterIP is not affected, inside clients use the Cluster set."""
    port = only(lb(externalTrafficPolicy="Local"), endpoint_slice(endpoints))
    assert last(port.local) == local
    outside = F.EXTERNAL | F.EXTERNAL_LOCAL | (F.EXTERNAL_DROP if drop else F(0))
    assert flags(port) == [F.CLUSTER_IP, outside, outside]


def test_external_traffic_policy_means_nothing_without_an_outside_frontend():
    port = only(service(externalTrafficPolicy="Local"), endpoint_slice([endpoint("10.0.0.1")]))
    assert (flags(port), port.local) == ([F.CLUSTER_IP], ())


def test_outside_frontends_and_the_local_list_for_the_tunnel():
    port = only(
        lb(externalIPs=["9.9.9.9", "5.6.7.8"]),
        endpoint_slice([endpoint("10.0.0.1"), endpoint("10.0.0.2", "node2")]),
    )
    assert [(f.address, f.port, f.flags) for f in port.frontends] == [
        (packed("10.96.0.1"), 80, F.CLUSTER_IP),
        (bytes(4), 30080, F.EXTERNAL),
        (packed("5.6.7.8"), 80, F.EXTERNAL),
        (packed("9.9.9.9"), 80, F.EXTERNAL),
    ]
    assert (last(port.cluster), last(port.local)) == ([1, 2], [1])


@pytest.mark.parametrize(
    "ingress",
    [[{"ip": "5.6.7.8", "ipMode": "Proxy"}], [{"hostname": "lb.example"}], [{"ip": "2001:db8::1"}]],
)
def test_ingress_that_is_not_intercepted(ingress):
    """TestLoadBalancerIngressRouteTypeProxy."""
    assert len(only(lb(ingress=ingress), endpoint_slice([endpoint("10.0.0.1")])).frontends) == 2


def test_node_ports_may_be_left_out():
    svc = service(
        type="LoadBalancer",
        allocateLoadBalancerNodePorts=False,
        status={"loadBalancer": {"ingress": [{"ip": "5.6.7.8"}]}},
    )
    assert [f.port for f in only(svc).frontends] == [80, 80]


def test_source_ranges_guard_load_balancers_alone():
    """TestLoadBalancer: whitespace is trimmed, other families are dropped."""
    port = only(
        lb(externalIPs=["9.9.9.9"], loadBalancerSourceRanges=[" 203.0.113.7/24", "2001:db8::/32"]),
        endpoint_slice([endpoint("10.0.0.1")]),
    )
    assert port.source_ranges == ((24, packed("203.0.113.0")),)
    assert [F.SOURCE_RANGES in f for f in flags(port)] == [False, False, True, False]


def test_a_range_with_the_nodes_address_implies_the_vip():
    port = only(lb(loadBalancerSourceRanges=["192.168.0.0/24"]))
    assert port.source_ranges == ((24, packed("192.168.0.0")), (32, packed("5.6.7.8")))


def test_ranges_without_a_load_balancer_or_of_the_other_family_guard_nothing():
    assert only(service(loadBalancerSourceRanges=["10.0.0.0/8"])).source_ranges == ()
    assert F.SOURCE_RANGES not in flags(only(lb(loadBalancerSourceRanges=["2001:db8::/32"])))[2]


@pytest.mark.parametrize(
    ("spec", "seconds"),
    [
        ({}, 0),
        ({"sessionAffinity": "ClientIP"}, 10800),
        (
            {
                "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 7}},
            },
            7,
        ),
        (
            {
                "sessionAffinity": "None",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 7}},
            },
            0,
        ),
    ],
)
def test_session_affinity(spec, seconds):
    assert only(service(**spec)).affinity_seconds == seconds


def test_host_network_backends_near_and_far_and_without_a_node_name():
    slice_ = endpoint_slice(
        [
            endpoint("192.168.0.1", "node1"),
            endpoint("192.168.0.2", None),
            endpoint("10.9.9.9", None),
        ]
    )
    outer, near, far = only(service(), slice_).cluster
    assert (outer.flags, outer.node) == (BackendFlag(0), b"")
    assert (near.flags, near.node) == (BackendFlag.LOCAL | BackendFlag.HOST, b"")
    assert (far.flags, far.node) == (BackendFlag.HOST, mapped(packed("192.168.0.2")))


def test_an_endpoint_without_a_node_name_is_never_local_for_policy():
    port = only(
        service(internalTrafficPolicy="Local"), endpoint_slice([endpoint("192.168.0.1", None)])
    )
    assert port.local == ()


# -- addresses --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    ["", "1.2.3", "1.2.3.4.5", "1.2.3.256", "a.b.c.d", "::g", "1.2.3.4/8", "१.2.3.4", "1.2.3.\x00"],
)
def test_bad_addresses(bad):
    assert packed(bad) is None


def test_mapped_addresses_are_ipv4():
    assert packed("::ffff:1.2.3.4") == packed("1.2.3.4")


@pytest.mark.parametrize(
    "bad", ["10.0.0.0", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/", "x/8", "fd00::/129"]
)
def test_bad_cidrs(bad):
    assert cidr(bad) is None


def test_cidrs_are_masked_and_contain_their_own_family():
    network = cidr("10.1.2.3/8")
    assert network == (8, packed("10.0.0.0"))
    assert contains(network, packed("10.255.0.1"))
    assert not contains(network, packed("11.0.0.1"))
    assert not contains(cidr("0.0.0.0/0"), packed("::1"))
    assert contains(cidr("::/0"), packed("::1"))

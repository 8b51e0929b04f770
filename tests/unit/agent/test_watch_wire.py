# SPDX-License-Identifier: Apache-2.0
"""Objects as the API server writes them, good and bad."""

from __future__ import annotations

import msgspec
import pytest
from bpfdp_agent.watch import wire


def test_null_lists_of_an_endpoint_slice_are_empty():
    raw = b'{"metadata":{"name":"s","namespace":"n"},"addressType":"IPv4","endpoints":null,"ports":null}'
    found = wire.decode(wire.Kind.ENDPOINT_SLICE, raw)
    assert (found.endpoints, found.ports) == (None, None)


def test_absent_and_empty_selectors_differ():
    raw = b'{"metadata":{"name":"p","namespace":"n"},"spec":{"podSelector":{},"ingress":[{"from":[{"namespaceSelector":{}},{"ipBlock":{"cidr":"10.0.0.0/8","except":["10.1.0.0/16"]}}],"ports":[{"port":"http"},{"port":80,"endPort":90,"protocol":"UDP"}]}]}}'
    policy = wire.decode(wire.Kind.NETWORK_POLICY, raw)
    rule = policy.spec.ingress[0]
    assert rule.from_[0].pod_selector is None
    assert rule.from_[0].namespace_selector == wire.LabelSelector()
    assert rule.from_[1].ip_block == wire.IPBlock(cidr="10.0.0.0/8", except_=("10.1.0.0/16",))
    assert [(p.protocol, p.port, p.end_port) for p in rule.ports] == [
        ("TCP", "http", None),
        ("UDP", 80, 90),
    ]


def test_the_config_keeps_its_spec_as_bytes_of_its_own():
    body = bytearray(
        b'{"metadata":{"name":"default","generation":7},"spec":{"paused":true},"status":{"agents":{"mode":"Detach"},"kubeProxy":{"state":"Disabled"}}}'
    )
    found = wire.decode(wire.Kind.CONFIG, bytes(body))
    assert bytes(found.spec) == b'{"paused":true}'
    assert (found.metadata.generation, found.status.agents.mode, found.status.kube_proxy.state) == (
        7,
        "Detach",
        "Disabled",
    )


def test_a_config_without_status_means_attach():
    found = wire.decode(wire.Kind.CONFIG, b'{"metadata":{"name":"default"}}')
    assert (found.status.agents.mode, found.status.kube_proxy.state) == ("Attach", "")


@pytest.mark.parametrize(
    ("kind", "raw", "where"),
    [
        (
            wire.Kind.ENDPOINT_SLICE,
            b'{"metadata":{"name":"s"},"addressType":"IPv4","endpoints":[{"addresses":"10.0.0.1"}]}',
            "$.endpoints[0].addresses",
        ),
        (
            wire.Kind.NETWORK_POLICY,
            b'{"metadata":{"name":"s"},"spec":{"podSelector":[]}}',
            "$.spec.podSelector",
        ),
        (
            wire.Kind.SERVICE,
            b'{"metadata":{"name":"s"},"spec":{"ports":[{"port":"80"}]}}',
            "$.spec.ports[0].port",
        ),
    ],
)
def test_a_wrong_field_is_named_and_the_key_still_read(kind, raw, where):
    with pytest.raises(msgspec.DecodeError, match=r"\$") as error:
        wire.decode(kind, raw)
    assert where in str(error.value)
    assert wire.stamp(raw)[0].name == "s"


def test_versions_that_differ_in_nothing_we_use_are_equal():
    old, new = (
        wire.decode(
            wire.Kind.POD,
            b'{"metadata":{"name":"a","resourceVersion":"%d","managedFields":[{}]}}' % n,
        )
        for n in (1, 2)
    )
    assert old == new

# SPDX-License-Identifier: Apache-2.0
"""Finding the API server without kube-proxy."""

from __future__ import annotations

import msgspec
from bpfdp_operator import world as w
from bpfdp_operator.endpoint import ApiEndpoint, find, parse
from unit.control.fakecluster import FakeCluster, cluster, kubernetes_slice


def known(fake: FakeCluster, endpoint: str) -> None:
    assert fake.config is not None
    status = w.ConfigStatus(api_server=w.ApiServerStatus(endpoint=endpoint))
    fake.config = msgspec.structs.replace(fake.config, status=status)


def test_from_the_slice() -> None:
    assert find(cluster().world()) == ApiEndpoint("192.0.2.10", 6443, "EndpointSlice")


def test_ipv4_before_ipv6_and_lowest_first() -> None:
    fake = cluster()
    fake.slices = (kubernetes_slice("2001:db8::1"), kubernetes_slice("192.0.2.20", "192.0.2.3"))
    found = find(fake.world())
    assert found is not None
    assert found.host == "192.0.2.20", "any stable order will do"


def test_one_in_use_stays_in_use() -> None:
    fake = cluster()
    fake.slices = (kubernetes_slice("192.0.2.1", "192.0.2.2"),)
    known(fake, "192.0.2.2:6443")
    found = find(fake.world())
    assert found is not None
    assert found.host == "192.0.2.2"


def test_one_no_longer_listed_is_left() -> None:
    fake = cluster()
    known(fake, "192.0.2.99:6443")
    found = find(fake.world())
    assert found is not None
    assert found.host == "192.0.2.10"


def test_last_known_good_when_nothing_is_listed() -> None:
    fake = cluster()
    fake.slices = (kubernetes_slice(),)
    known(fake, "[2001:db8::1]:6443")
    assert find(fake.world()) == ApiEndpoint("2001:db8::1", 6443, "EndpointSlice")


def test_explicit_wins() -> None:
    fake = cluster(api_server=w.ApiServerSpec(mode="Explicit", host="api.example.com", port=443))
    fake.override = w.ConfigMap(
        metadata=w.Metadata(),
        data={"KUBERNETES_SERVICE_HOST": "192.0.2.7", "KUBERNETES_SERVICE_PORT": "6443"},
    )
    assert find(fake.world()) == ApiEndpoint("api.example.com", 443, "Explicit")
    fake.edit(api_server=w.ApiServerSpec())
    assert find(fake.world()) == ApiEndpoint("192.0.2.7", 6443, "ConfigMap")


def test_unusable_is_passed_over() -> None:
    fake = cluster()
    fake.slices = (kubernetes_slice("127.0.0.1", "::1", "0.0.0.0", "not-an-address"),)
    assert find(fake.world()) is None
    dead = w.Endpoint(addresses=("192.0.2.4",), conditions=w.EndpointConditions(ready=False))
    fake.slices = (msgspec.structs.replace(fake.slices[0], endpoints=(dead,)),)
    assert find(fake.world()) is None
    fake.slices = (msgspec.structs.replace(fake.slices[0], endpoints=None, ports=None),)
    assert find(fake.world()) is None


def test_text_and_parse_are_inverse() -> None:
    for text in ("192.0.2.1:6443", "[2001:db8::1]:6443", "api.example.com:443"):
        found = parse(text, "x")
        assert found is not None
        assert found.text == text
    for text in ("", "host", "host:", ":1", "host:port"):
        assert parse(text, "x") is None

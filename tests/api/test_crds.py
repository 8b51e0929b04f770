# SPDX-License-Identifier: Apache-2.0
"""The CRDs in a real API server: defaults, refusals with their messages, printed columns."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

NOW = "2026-01-02T03:04:05Z"


def config(spec: dict[str, Any] | None = None, name: str = "default") -> dict[str, Any]:
    return {
        "apiVersion": "bpfdataplane.io/v1alpha1",
        "kind": "BpfDataplaneConfig",
        "metadata": {"name": name},
        "spec": spec or {},
    }


@pytest.fixture(autouse=True)
def no_config_left_behind(api: Any) -> None:
    """Another test's config, with a finalizer that nobody answers here, would be what is changed."""
    patch = json.dumps({"metadata": {"finalizers": None}})
    if api.kubectl("patch", "bpfdp", "default", "--type=merge", "-p", patch).returncode == 0:
        api.kubectl("delete", "bpfdp", "default", "--ignore-not-found")


@pytest.fixture
def default(api: Any) -> Iterator[dict[str, Any]]:
    """The CR with nothing said, as the API server stores it."""
    result = api.apply(config())
    assert result.returncode == 0, result.stderr
    yield api.get("bpfdp", "default")
    api.kubectl("delete", "bpfdp", "default", "--wait=true")


INVALID = [
    ("another name", config(name="second"), "set metadata.name to 'default'"),
    (
        "explicit without host",
        config({"apiServer": {"mode": "Explicit", "port": 6443}}),
        "needs apiServer.host and apiServer.port",
    ),
    (
        "explicit without port",
        config({"apiServer": {"mode": "Explicit", "host": "192.0.2.1"}}),
        "needs apiServer.host and apiServer.port",
    ),
    (
        "host without explicit",
        config({"apiServer": {"host": "192.0.2.1"}}),
        "set apiServer.mode to Explicit, or remove both",
    ),
    (
        "host with a scheme",
        config({"apiServer": {"mode": "Explicit", "host": "https://api", "port": 443}}),
        "without scheme, port or brackets",
    ),
    (
        "opt-out without DSR",
        config({"services": {"dsrOptOutCIDRs": ["192.0.2.0/24"]}}),
        "set services.externalServiceMode to DSR, or remove dsrOptOutCIDRs",
    ),
    (
        "a connect-time mode that does not exist",
        config({"services": {"connectTimeLoadBalancing": "UDP"}}),
        'supported values: "TCP", "Enabled", "Disabled"',
    ),
    (
        "not a CIDR",
        config({"services": {"externalServiceMode": "DSR", "dsrOptOutCIDRs": ["192.0.2.300/24"]}}),
        "'192.0.2.300/24' is not a CIDR",
    ),
    (
        "an address for a CIDR",
        config({"services": {"nodePortAddresses": ["2001:db8::1"]}}),
        "'2001:db8::1' is not a CIDR",
    ),
    (
        "host bits in a CIDR",
        config({"services": {"nodePortAddresses": ["10.1.2.3/8"]}}),
        "'10.1.2.3/8' has bits set beyond its prefix length: set them to zero",
    ),
    (
        "the same port for health and metrics",
        config({"observability": {"metricsPort": 9099}}),
        "give each its own port",
    ),
    (
        "the same port for healthz and metrics",
        config({"services": {"healthzPort": 9091}}),
        "give each its own port",
    ),
    (
        "the operator's port",
        config({"observability": {"healthPort": 9098}}),
        "port 9098 is the operator's own health port",
    ),
    (
        "a port among the NodePorts",
        config({"services": {"healthzPort": 31000}}),
        "choose a port outside of the range",
    ),
    (
        "the tunnel among the NodePorts",
        config({"tunnel": {"port": 30500}}),
        "tunnel.port lies inside services.nodePortRange",
    ),
    (
        "a range backwards",
        config({"services": {"nodePortRange": "32767-30000"}}),
        "must be FIRST-LAST with 1 <= FIRST <= LAST <= 65535",
    ),
    (
        "a range beyond the ports",
        config({"services": {"nodePortRange": "30000-70000"}}),
        "must be FIRST-LAST with 1 <= FIRST <= LAST <= 65535",
    ),
    (
        "an MTU too small for IPv6",
        config({"tunnel": {"mtu": 900}}),
        "must be 0 (detect it) or at least 1280",
    ),
    (
        "an unknown enum value",
        config({"dataplane": "On"}),
        'supported values: "Enabled", "Disabled"',
    ),
    (
        "a value out of bounds",
        config({"conntrack": {"maxEntries": 10}}),
        "should be greater than or equal to 1024",
    ),
    (
        "rollingUpdate for OnDelete",
        config({"nodeAgent": {"updateStrategy": {"type": "OnDelete", "rollingUpdate": {}}}}),
        "set type to RollingUpdate, or remove rollingUpdate",
    ),
    (
        "a pace that is none",
        config({"nodeAgent": {"updateStrategy": {"rollingUpdate": {"maxUnavailable": "all"}}}}),
        "a percentage such as 10%",
    ),
    (
        "a field that does not exist",
        config({"services": {"externalServicesMode": "DSR"}}),
        "field not declared in schema",
    ),
]  # fmt: skip

VALID = [
    ("nothing", {}),
    ("takeover", {"kubeProxyManagement": "Enabled"}),
    ("explicit v4", {"apiServer": {"mode": "Explicit", "host": "192.0.2.1", "port": 6443}}),
    ("explicit v6", {"apiServer": {"mode": "Explicit", "host": "2001:db8::1", "port": 6443}}),
    ("explicit name", {"apiServer": {"mode": "Explicit", "host": "api.example.com", "port": 443}}),
    ("DSR", {"services": {"externalServiceMode": "DSR", "dsrOptOutCIDRs": ["192.0.2.0/24", "2001:db8::/32"]}}),
    ("no connect-time translation", {"services": {"connectTimeLoadBalancing": "Disabled"}}),
    ("closed ports", {"services": {"healthzPort": 0}, "observability": {"metricsPort": 0}}),
    ("a range elsewhere", {"services": {"nodePortRange": "20000-22767", "healthzPort": 31000}}),
    ("a pace in percent", {"nodeAgent": {"updateStrategy": {"rollingUpdate": {"maxUnavailable": "10%"}}}}),
    ("a pace in nodes", {"nodeAgent": {"updateStrategy": {"rollingUpdate": {"maxUnavailable": 3}}}}),
    ("resources", {"nodeAgent": {"resources": {"requests": {"cpu": 1, "memory": "1Gi"}, "limits": {"memory": "2Gi"}}}}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("refused", "message"), [case[1:] for case in INVALID], ids=[case[0] for case in INVALID]
)
def test_invalid_config_is_refused_with_what_to_do(
    api: Any, refused: dict[str, Any], message: str
) -> None:
    result = api.apply(refused, dry_run=True)
    assert result.returncode != 0
    assert message in result.stderr, result.stderr


@pytest.mark.parametrize("spec", [case[1] for case in VALID], ids=[case[0] for case in VALID])
def test_valid_config_is_accepted(api: Any, spec: dict[str, Any]) -> None:
    result = api.apply(config(spec), dry_run=True)
    assert result.returncode == 0, result.stderr


def test_nothing_said_means_the_defaults(default: dict[str, Any]) -> None:
    spec = default["spec"]
    assert (spec["dataplane"], spec["kubeProxyManagement"], spec["paused"]) == (
        "Enabled",
        "Disabled",
        False,
    )
    assert spec["apiServer"] == {"mode": "Auto"}
    assert spec["services"] == {
        "externalServiceMode": "Tunnel",
        "algorithm": "Random",
        "connectTimeLoadBalancing": "TCP",
        "dsrOptOutCIDRs": [],
        "nodePortRange": "30000-32767",
        "nodePortAddresses": [],
        "healthzPort": 10256,
    }
    assert spec["tunnel"] == {"port": 4789, "vni": 4096, "mtu": 0}
    assert spec["observability"] == {"logLevel": "Info", "metricsPort": 9091, "healthPort": 9099}
    assert spec["nodeAgent"]["tolerations"] == [{"operator": "Exists"}]
    assert spec["nodeAgent"]["updateStrategy"] == {"type": "RollingUpdate"}


def condition(kind: str, status: str, message: str) -> dict[str, Any]:
    return {
        "type": kind,
        "status": status,
        "reason": "AllNodesProgrammed",
        "message": message,
        "lastTransitionTime": NOW,
    }


def table(api: Any, resource: str) -> dict[str, str]:
    """The printed row by column; columns are as wide as their heading or value, two blanks apart."""
    result = api.kubectl("get", resource)
    assert result.returncode == 0, result.stderr
    head, row = result.stdout.splitlines()[:2]
    headings = list(re.finditer(r"\S+", head))
    names = [heading.group() for heading in headings]
    starts = [heading.start() for heading in headings]
    ends = [*starts[1:], None]
    return {
        name: row[start:end].strip() for name, start, end in zip(names, starts, ends, strict=True)
    }


@pytest.mark.usefixtures("default")
def test_config_columns_tell_the_state(api: Any) -> None:
    status = {
        "message": "3 of 3 nodes are programmed",
        "nodes": {"desired": 3, "ready": 3, "updated": 3, "unsupported": 0, "summary": "3/3"},
        "kubeProxy": {"state": "Disabled", "mode": "iptables"},
        "agents": {"mode": "Attach"},
        "conditions": [
            condition("Available", "True", "all"),
            condition("Progressing", "False", "none"),
            condition("Degraded", "False", "none"),
        ],
    }
    patch = json.dumps({"status": status})
    result = api.kubectl(
        "patch", "bpfdp", "default", "--subresource=status", "--type=merge", "-p", patch
    )
    assert result.returncode == 0, result.stderr
    row = table(api, "bpfdataplanes")
    assert list(row) == [
        "NAME", "AVAILABLE", "PROGRESSING", "DEGRADED", "NODES", "KUBE-PROXY", "MODE", "SINCE", "MESSAGE",
    ]  # fmt: skip
    since = row.pop("SINCE")
    assert since.endswith("d"), since
    assert row == {
        "NAME": "default",
        "AVAILABLE": "True",
        "PROGRESSING": "False",
        "DEGRADED": "False",
        "NODES": "3/3",
        "KUBE-PROXY": "Disabled",
        "MODE": "Tunnel",
        "MESSAGE": "3 of 3 nodes are programmed",
    }


@pytest.mark.usefixtures("default")
def test_status_is_a_subresource(api: Any) -> None:
    patch = json.dumps({"status": {"message": "from the spec's side"}})
    assert api.kubectl("patch", "bpfdp", "default", "--type=merge", "-p", patch).returncode == 0
    assert "status" not in api.get("bpfdp", "default")


@pytest.mark.usefixtures("default")
def test_an_unknown_kube_proxy_state_is_refused(api: Any) -> None:
    patch = json.dumps({"status": {"kubeProxy": {"state": "Gone"}}})
    result = api.kubectl(
        "patch", "bpfdp", "default", "--subresource=status", "--type=merge", "-p", patch
    )
    assert "Unsupported value" in result.stderr


def test_node_columns_tell_the_state(api: Any) -> None:
    node = {
        "apiVersion": "bpfdataplane.io/v1alpha1",
        "kind": "BpfNode",
        "metadata": {"name": "node-1"},
    }
    status = {
        "kernel": "6.18.0",
        "attachType": "TCX",
        "pods": 4,
        "services": 7,
        "backends": 9,
        "policies": 2,
        "conditions": [condition("Ready", "True", "the node runs what the API server says")],
        "features": [{"name": "tcx", "supported": True}],
        "interfaces": [{"name": "eth0", "hooks": ["from_net", "to_net"]}],
        "maps": [{"name": "frontends4", "usedPercent": 5, "maxEntries": 65536}],
    }
    assert api.apply(node).returncode == 0
    patch = json.dumps({"status": status})
    result = api.kubectl(
        "patch", "bpfn", "node-1", "--subresource=status", "--type=merge", "-p", patch
    )
    assert result.returncode == 0, result.stderr
    row = table(api, "bpfnodes")
    del row["AGE"]
    assert row == {
        "NAME": "node-1",
        "READY": "True",
        "KERNEL": "6.18.0",
        "ATTACH": "TCX",
        "PODS": "4",
        "SERVICES": "7",
        "POLICIES": "2",
        "MESSAGE": "the node runs what the API server says",
    }

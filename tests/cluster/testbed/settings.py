# SPDX-License-Identifier: Apache-2.0
"""Versions, folders and the address plan: what the rest of the testbed takes as given."""

from __future__ import annotations

import os
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

from cluster.testbed.errors import TestbedError

REPO = Path(__file__).resolve().parents[3]
TOOLS_MODULE = REPO / "tests/cluster/tools"
MANIFESTS = Path(__file__).resolve().parent / "manifests"

CACHE = Path(os.environ.get("TESTBED_CACHE", "/var/cache/bpfdp-testbed"))
BIN = CACHE / "bin"
STATE = REPO / "build/testbed"
LOGS = STATE / "logs"
PKI = STATE / "pki"
KUBECONFIG = STATE / "kubeconfig"
RUN = Path("/run/bpfdp-testbed")
CGROUP = "bpfdp-testbed"

HELM_VERSION = "v3.22.0"
COREDNS_VERSION = "v1.15.0"
PAUSE_IMAGE = "registry.k8s.io/pause:3.10.2"
AGNHOST_IMAGE = "registry.k8s.io/e2e-test-images/agnhost:2.63.0"
BUSYBOX_IMAGE = "registry.k8s.io/e2e-test-images/busybox:1.37.0-1"
DNS_TESTING_IMAGE = "registry.k8s.io/e2e-test-images/glibc-dns-testing:2.0.0"
CONNTRACK_PEER = "regression-issue-74839"
"""Upstream's server for its test of netfilter's INVALID packets: program and image name."""
CONNTRACK_PEER_IMAGE = f"registry.k8s.io/e2e-test-images/{CONNTRACK_PEER}:1.4"
BASE_IMAGE = "localhost/debian:bookworm-slim"

FABRIC_V4 = IPv4Network("172.30.0.0/24")
FABRIC_V6 = IPv6Network("fd00:172:30::/64")
SECOND_V4 = IPv4Network("172.31.0.0/24")
SECOND_V6 = IPv6Network("fd00:172:31::/64")
"""The second network, of nodes and client alone (NETWORKS=2)."""
OVERLAY = "flannel.1"
OVERLAY_PORT = 8472
OVERLAY_MTU = 1450
"""The pod network's VXLAN device (CNI=overlay), named and set up as flannel does it."""
PODS_V4 = IPv4Network("10.244.0.0/16")
PODS_V6 = IPv6Network("fd00:10:244::/56")
SERVICES_V4 = IPv4Network("10.96.0.0/16")
SERVICES_V6 = IPv6Network("fd00:10:96::/112")
DNS_V4 = str(SERVICES_V4[10])
DNS_V6 = str(SERVICES_V6[10])

API_PORT = 6443
FORWARD_PORT = 16443
MAX_NODES = 50


@dataclass(frozen=True)
class Host:
    """A namespace set on the fabric: a node, the control plane or the outside client."""

    name: str
    v4: str
    v6: str
    v4_link: str
    v6_link: str
    second_v4: str
    second_v6: str
    """On the second network, where there is one."""


@dataclass(frozen=True)
class Node(Host):
    """A cluster node with its share of the pod ranges."""

    pods_v4: IPv4Network
    pods_v6: IPv6Network


@dataclass(frozen=True)
class Settings:
    """What a caller may choose about the cluster."""

    nodes: int = 3
    cni: str = "ptp"
    proxy: str = "iptables"
    networks: int = 1
    strict: bool = False
    """Nodes check the reverse path strictly."""

    @classmethod
    def from_env(cls) -> Settings:
        """Read the variables of the same names; raises TestbedError on one that cannot work."""
        settings = cls(
            _number("NODES", 3),
            os.environ.get("CNI") or "ptp",
            os.environ.get("PROXY") or "iptables",
            _number("NETWORKS", 1),
            _number("STRICT", 0) == 1,
        )
        if not 1 <= settings.nodes <= MAX_NODES:
            raise TestbedError(f"NODES={settings.nodes} is not in 1..{MAX_NODES}")
        if settings.cni not in ("ptp", "bridge", "overlay"):
            raise TestbedError(f"CNI={settings.cni} is unknown: use ptp, bridge or overlay")
        if settings.networks not in (1, 2):
            raise TestbedError(f"NETWORKS={settings.networks} cannot be: use 1 or 2")
        if settings.proxy not in ("iptables", "nftables"):
            raise TestbedError(f"PROXY={settings.proxy} is unknown: use iptables or nftables")
        return settings


def _number(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name) or default)
    except ValueError as error:
        raise TestbedError(f"{name} must be a number, e.g. {name}={default}") from error


def _addresses(index: int) -> tuple[str, str, str, str, str, str]:
    v4, v6 = str(FABRIC_V4[index]), str(FABRIC_V6[index])
    links = f"{v4}/{FABRIC_V4.prefixlen}", f"{v6}/{FABRIC_V6.prefixlen}"
    return v4, v6, *links, str(SECOND_V4[index]), str(SECOND_V6[index])


GATEWAY = Host("fabric", *_addresses(1))
CONTROL_PLANE = Host("controlplane", *_addresses(2))
CLIENT = Host("client", *_addresses(3))


def nodes(count: int) -> list[Node]:
    """Node 1 is .11 on the fabric and owns the pod ranges number 1, and so on."""
    v4_ranges = list(PODS_V4.subnets(new_prefix=24))
    v6_ranges = list(PODS_V6.subnets(new_prefix=64))
    return [
        Node(f"node{i}", *_addresses(10 + i), v4_ranges[i], v6_ranges[i])
        for i in range(1, count + 1)
    ]

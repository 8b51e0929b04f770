# SPDX-License-Identifier: Apache-2.0
"""What a cluster has before anybody installs anything: kube-proxy and CoreDNS."""

from __future__ import annotations

from string import Template

from cluster.testbed import images
from cluster.testbed.settings import (
    API_PORT,
    CONTROL_PLANE,
    DNS_V4,
    DNS_V6,
    MANIFESTS,
    PODS_V4,
    PODS_V6,
)


def manifests(proxy: str) -> str:
    """Both addons' manifests, with kube-proxy in the given mode."""
    kube_proxy = _rendered(
        "kube-proxy",
        pods=f"{PODS_V4},{PODS_V6}",
        mode=proxy,
        image=images.kube_proxy_image(),
        server=f"https://{CONTROL_PLANE.v4}:{API_PORT}",
    )
    coredns = _rendered("coredns", image=images.coredns_image(), dns_v4=DNS_V4, dns_v6=DNS_V6)
    return f"{kube_proxy}---\n{coredns}"


def _rendered(name: str, **values: str) -> str:
    return Template((MANIFESTS / f"{name}.yaml").read_text()).substitute(values)

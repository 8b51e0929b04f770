# SPDX-License-Identifier: Apache-2.0
"""Reading kube-proxy's state, and the one key by which it goes and comes back."""

from __future__ import annotations

import json

import msgspec
import pytest
from bpfdp_operator import kubeproxy
from bpfdp_operator import world as w
from unit.control.fakecluster import cluster, kube_proxy


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        ("", ""),
        ("kind: KubeProxyConfiguration", "iptables"),
        ('mode: ""', "iptables"),
        ("mode: ipvs", "ipvs"),
        ("mode: nftables", "nftables"),
        ("mode: [", ""),
        ("just text", "iptables"),
    ],
)
def test_mode_from_the_config_map(config: str, mode: str) -> None:
    assert kubeproxy.mode_of(kube_proxy(), config) == mode


def test_mode_from_the_flag() -> None:
    daemonset = msgspec.convert(
        {
            "metadata": {"name": "kube-proxy"},
            "spec": {
                "template": {
                    "spec": {"containers": [{"command": ["kube-proxy", "--proxy-mode=ipvs"]}]}
                }
            },
        },
        w.DaemonSet,
    )
    assert kubeproxy.mode_of(daemonset, "mode: iptables") == "ipvs"


def test_managed_by_none_is_nobody() -> None:
    assert not kubeproxy.owner_of(kube_proxy(labels={"app.kubernetes.io/managed-by": "none"}))
    assert not kubeproxy.owner_of(kube_proxy())


def test_the_command_is_the_patch() -> None:
    text = kubeproxy.command("true").split(" -p ")[1].strip("'")
    assert json.loads(text) == kubeproxy.selector_patch("true")
    keys = kubeproxy.selector_patch(None)["spec"]["template"]["spec"]["nodeSelector"]
    assert keys == {w.KUBE_PROXY_LABEL: None}


def test_pods_that_end_still_serve() -> None:
    fake = cluster()
    fake.set_proxy_selector({w.KUBE_PROXY_LABEL: "true"})
    seen = kubeproxy.observe(fake.world())
    assert seen.removed
    assert not seen.gone
    assert seen.serving == ("node-1", "node-2", "node-3")


def test_not_ready_before_the_controller_has_looked() -> None:
    fake = cluster()
    fake.set_proxy_selector({"kubernetes.io/os": "linux"})
    assert not kubeproxy.observe(fake.world()).ready


def test_a_node_that_is_down_is_not_waited_for() -> None:
    fake = cluster()
    fake.node("node-2").ready = False
    assert kubeproxy.observe(fake.world()).ready

# SPDX-License-Identifier: Apache-2.0
"""The fabric: one bridge in a namespace of its own, and a veth pair to each host.

Nothing connects it to the machine's network. The gateway that nodes have as their default
route forwards nothing: it is there so that a route to any address exists, as on real nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.testbed import hosts
from cluster.testbed.errors import TestbedError
from cluster.testbed.settings import CLIENT, CONTROL_PLANE, GATEWAY, Host, Node

# what a Debian with systemd has: loose reverse path filter
NODE_SYSCTLS = {
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "2",
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
    "net/ipv6/conf/default/accept_dad": "0",
    "net/bridge/bridge-nf-call-iptables": "1",
    "net/bridge/bridge-nf-call-ip6tables": "1",
}

# frames that the bridge forwards are no business of the gateway's netfilter
_BRIDGE = """
ip link add fabric type bridge
for call in /proc/sys/net/bridge/bridge-nf-call-*; do [ ! -e $call ] || echo 0 >$call; done
"""


def connect(nodes: Sequence[Node]) -> None:
    """Wire gateway, control plane, client and nodes; the hosts must be up."""
    _shell(GATEWAY, _BRIDGE + _own(GATEWAY))
    for host in (CONTROL_PLANE, CLIENT, *nodes):
        _plug(host)
    # the API server proxies to pods and calls webhooks in them
    _shell(CONTROL_PLANE, _own(CONTROL_PLANE) + _pod_routes(nodes))
    _shell(CLIENT, _own(CLIENT) + _default_routes())
    for node in nodes:
        others = [other for other in nodes if other != node]
        _shell(node, _sysctls() + _own(node) + _default_routes() + _pod_routes(others))


def _plug(host: Host) -> None:
    pid = hosts.init_pid(host.name)
    _shell(
        GATEWAY,
        f"ip link add {host.name} type veth peer name eth0 netns {pid}\n"
        f"ip link set {host.name} master fabric up\n",
    )


def _own(host: Host) -> str:
    device = "fabric" if host == GATEWAY else "eth0"
    return (
        f"ip addr add {host.v4_link} dev {device}\n"
        f"ip addr add {host.v6_link} dev {device} nodad\n"
        f"ip link set {device} up\n"
    )


def _default_routes() -> str:
    return f"ip route add default via {GATEWAY.v4}\nip -6 route add default via {GATEWAY.v6}\n"


def _pod_routes(nodes: Sequence[Node]) -> str:
    return "".join(
        f"ip route add {node.pods_v4} via {node.v4}\nip -6 route add {node.pods_v6} via {node.v6}\n"
        for node in nodes
    )


def _sysctls() -> str:
    """eth0 exists already, so it is told as well; bridge settings exist only with br_netfilter."""
    settings = {**NODE_SYSCTLS, "net/ipv4/conf/eth0/rp_filter": "2"}
    return "".join(
        f"[ ! -e /proc/sys/{key} ] || echo {value} >/proc/sys/{key}\n"
        for key, value in settings.items()
    )


def _shell(host: Host, script: str) -> None:
    done = hosts.execute(host.name, ["sh", "-ec", script])
    if done.returncode:
        raise TestbedError(f"network of {host.name}: {done.stderr.strip()}")

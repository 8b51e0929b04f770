# SPDX-License-Identifier: Apache-2.0
"""The fabric: a bridge in a namespace of its own, and a veth pair to each host.

Nodes and client may have a second network on a second bridge, and the pods' packets may go from
node to node through a VXLAN of the pod network's (`overlay`).

Nothing connects it to the machine's network. The gateway that nodes have as their default
route forwards nothing: it is there so that a route to any address exists, as on real nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.testbed import hosts
from cluster.testbed.errors import TestbedError
from cluster.testbed.settings import (
    CLIENT,
    CONTROL_PLANE,
    GATEWAY,
    OVERLAY,
    OVERLAY_MTU,
    OVERLAY_PORT,
    SECOND_V4,
    SECOND_V6,
    Host,
    Node,
    Settings,
)

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


_SECOND_BRIDGE = """
ip link add fabric2 type bridge
ip link set fabric2 up
"""


def connect(nodes: Sequence[Node], settings: Settings) -> None:
    """Wire gateway, control plane, client and nodes; the hosts must be up."""
    _shell(GATEWAY, _BRIDGE + _own(GATEWAY))
    for host in (CONTROL_PLANE, CLIENT, *nodes):
        _plug(host, "eth0", "fabric")
    if settings.networks > 1:
        _shell(GATEWAY, _SECOND_BRIDGE)
        for host in (CLIENT, *nodes):
            _plug(host, "eth1", "fabric2")
            _shell(host, _second(host))
    # the API server proxies to pods and calls webhooks in them
    _shell(CONTROL_PLANE, _own(CONTROL_PLANE) + _pod_routes(nodes))
    _shell(CLIENT, _own(CLIENT) + _default_routes())
    for node in nodes:
        others = [other for other in nodes if other != node]
        _shell(node, _sysctls(settings) + _own(node) + _default_routes())
        overlay = settings.cni == "overlay"
        _shell(node, _overlay(node, others) if overlay else _pod_routes(others))


def _plug(host: Host, device: str, bridge: str) -> None:
    pid = hosts.init_pid(host.name)
    port = host.name if device == "eth0" else f"{host.name}.2"
    _shell(
        GATEWAY,
        f"ip link add {port} type veth peer name {device} netns {pid}\n"
        f"ip link set {port} master {bridge} up\n",
    )


def _second(host: Host) -> str:
    return (
        f"ip addr add {host.second_v4}/{SECOND_V4.prefixlen} dev eth1\n"
        f"ip addr add {host.second_v6}/{SECOND_V6.prefixlen} dev eth1 nodad\n"
        "ip link set eth1 up\n"
    )


def _overlay(node: Node, others: Sequence[Node]) -> str:
    """As flannel does it: the other nodes' devices, their hardware addresses and ranges by hand.

    The device has the first address of the node's range, and is the next hop to it.
    """
    script = (
        f"ip link add {OVERLAY} address {_hardware(node)} mtu {OVERLAY_MTU} type vxlan id 1"
        f" dev eth0 local {node.v4} dstport {OVERLAY_PORT} nolearning\n"
        f"ip addr add {node.pods_v4[0]}/32 dev {OVERLAY}\n"
        f"ip addr add {node.pods_v6[0]}/128 dev {OVERLAY} nodad\n"
        f"ip link set {OVERLAY} up\n"
    )
    for other in others:
        mac = _hardware(other)
        script += f"bridge fdb append {mac} dev {OVERLAY} dst {other.v4}\n"
        for pods in (other.pods_v4, other.pods_v6):
            script += (
                f"ip neigh replace {pods[0]} lladdr {mac} dev {OVERLAY} nud permanent\n"
                f"ip -{pods.version} route add {pods} via {pods[0]} dev {OVERLAY} onlink\n"
            )
    return script


def _hardware(node: Node) -> str:
    return f"02:00:0a:f4:00:{node.pods_v4.network_address.packed[2]:02x}"


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


def _sysctls(settings: Settings) -> str:
    """Devices that exist already are told as well; bridge settings exist only with br_netfilter."""
    check = "1" if settings.strict else "2"
    wanted = dict(NODE_SYSCTLS)
    wanted |= {f"net/ipv4/conf/{each}/rp_filter": check for each in ("default", "eth0", "eth1")}
    return "".join(
        f"[ ! -e /proc/sys/{key} ] || echo {value} >/proc/sys/{key}\n"
        for key, value in wanted.items()
    )


def _shell(host: Host, script: str) -> None:
    done = hosts.execute(host.name, ["sh", "-ec", script])
    if done.returncode:
        raise TestbedError(f"network of {host.name}: {done.stderr.strip()}")

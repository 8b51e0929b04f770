# SPDX-License-Identifier: Apache-2.0
"""What makes a host a cluster node: containerd, CNI and kubelet, with their ordinary paths."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from cluster.testbed import archive, hosts, images, pki
from cluster.testbed.commands import wait_for
from cluster.testbed.errors import TestbedError
from cluster.testbed.settings import (
    BIN,
    DNS_V4,
    GATEWAY,
    LOGS,
    OVERLAY_MTU,
    PAUSE_IMAGE,
    PKI,
    PODS_V4,
    PODS_V6,
    Node,
)

_CTR = ("ctr", "--namespace", "k8s.io")
_SOCKET = "/run/containerd/containerd.sock"
_CONTAINERD = f"""version = 2
[grpc]
  address = "{_SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
"""


def start_runtime(node: Node, seed: Path, cni: str) -> None:
    """Start containerd with the images of `seed`, and configure the pod network."""
    etc = hosts.files(node.name) / "etc"
    images.copy_seed(seed, hosts.files(node.name) / "containerd")
    write = {
        "containerd/config.toml": _CONTAINERD,
        "cni/net.d/10-testbed.conflist": json.dumps(_cni(node, cni), indent=2),
        # nothing answers there, but it says so at once
        "resolv.conf": f"nameserver {GATEWAY.v4}\n",
        "kubernetes/kubelet.json": json.dumps(_kubelet(node), indent=2),
    }
    for name, text in write.items():
        _write_inside(node, f"/etc/{name}", text)
    _write_inside(node, "/etc/kubernetes/kubelet.conf", _kubeconfig(node, etc))
    if cni == "bridge":
        _masquerade(node)
    hosts.start_daemon(node.name, "containerd", ["containerd"])


def _write_inside(node: Node, path: str, text: str) -> None:
    """Through the host itself: files below a mounted overlay must not be changed behind it."""
    script = 'rm -f "$1" && mkdir -p "$(dirname "$1")" && cat >"$1"'
    done = hosts.execute(node.name, ["sh", "-ec", script, "write", path], stdin=text)
    if done.returncode:
        raise TestbedError(f"{path} on {node.name}: {done.stderr.strip()}")


def _kubeconfig(node: Node, etc: Path) -> str:
    scratch = etc.parent / "kubelet.conf"
    text = pki.kubeconfig(scratch, node.name).read_text()
    scratch.unlink()
    return text


def _cni(node: Node, cni: str) -> dict[str, object]:
    """ptp gives pods the cluster-wide prefix, so that its masquerading spares all pods."""
    wide = cni in ("ptp", "overlay")
    ranges = [
        [
            {
                "subnet": str(everyone if wide else own),
                "rangeStart": str(own[2]),
                "rangeEnd": str(own[250]),
                "gateway": str(own[1]),
            }
        ]
        for own, everyone in ((node.pods_v4, PODS_V4), (node.pods_v6, PODS_V6))
    ]
    ipam = {
        "type": "host-local",
        "ranges": ranges,
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
    }
    main: dict[str, object] = {"type": "ptp" if wide else "bridge", "ipam": ipam}
    if cni == "overlay":
        main["mtu"] = OVERLAY_MTU
    if wide:
        main["ipMasq"] = True
    else:
        main |= {"bridge": "cni0", "isGateway": True, "hairpinMode": True}
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    return {"cniVersion": "0.4.0", "name": "pods", "plugins": [main, portmap]}


def _masquerade(node: Node) -> None:
    """The bridge plugin would masquerade between nodes too; this rule spares all pods."""
    for tables, own, everyone in (
        ("iptables", node.pods_v4, PODS_V4),
        ("ip6tables", node.pods_v6, PODS_V6),
    ):
        rule = ["-s", str(own), "!", "-d", str(everyone), "-j", "MASQUERADE"]
        done = hosts.execute(node.name, [tables, "-w", "-t", "nat", "-A", "POSTROUTING", *rule])
        if done.returncode:
            raise TestbedError(f"{tables} on {node.name}: {done.stderr.strip()}")


def start_kubelet(node: Node) -> None:
    """Start the kubelet, which registers itself with the API server."""
    ready = Path(f"/proc/{hosts.init_pid(node.name)}/root{_SOCKET}")
    log = LOGS / f"{node.name}-containerd.log"
    wait_for(f"containerd of {node.name}", ready.exists, 30, f"See {log}")
    flags = [
        "--config=/etc/kubernetes/kubelet.json",
        "--kubeconfig=/etc/kubernetes/kubelet.conf",
        f"--hostname-override={node.name}",
        f"--node-ip={node.v4},{node.v6}",
    ]
    hosts.start_daemon(node.name, "kubelet", [BIN / "kubelet", *flags])


def _kubelet(node: Node) -> dict[str, object]:
    """The testbed shares one kernel and one disk between nodes: no limits on the node's own part."""
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": f"unix://{_SOCKET}",
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": False,
        "failSwapOn": False,
        "enforceNodeAllocatable": [],
        "featureGates": {"KubeletInUserNamespace": True},
        "localStorageCapacityIsolation": True,
        "makeIPTablesUtilChains": False,
        "evictionHard": {
            "memory.available": "0%",
            "nodefs.available": "0%",
            "nodefs.inodesFree": "0%",
            "imagefs.available": "0%",
        },
        "imageGCHighThresholdPercent": 100,
        "clusterDNS": [DNS_V4],
        "clusterDomain": "cluster.local",
        "resolvConf": "/etc/resolv.conf",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{PKI}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": f"{PKI}/{node.name}.crt",
        "tlsPrivateKeyFile": f"{PKI}/{node.name}.key",
        "syncFrequency": "10s",
        "nodeStatusUpdateFrequency": "5s",
        "serializeImagePulls": True,
        "registerNode": True,
    }


def manifest(node: Node) -> dict[str, object]:
    """The Node object, made before its kubelet starts, so that its pod ranges are known."""
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": node.name,
            "labels": {
                "kubernetes.io/hostname": node.name,
                "topology.kubernetes.io/region": "testbed",
                "topology.kubernetes.io/zone": f"zone-{node.name}",
            },
        },
        "spec": {
            "podCIDR": str(node.pods_v4),
            "podCIDRs": [str(node.pods_v4), str(node.pods_v6)],
        },
    }


def import_image(node: Node, source: Path) -> None:
    """Import a docker-archive into the node's containerd, unless its images are there already."""
    if all(_image_id(node, name) == wanted for name, wanted in archive.contents(source).items()):
        return
    argv = [*_CTR, "images", "import", str(source.resolve())]
    done = hosts.execute(node.name, argv, timeout=300)
    if done.returncode:
        raise TestbedError(f"{source} on {node.name}: {(done.stdout + done.stderr)[-1000:]}")


def _image_id(node: Node, name: str) -> str | None:
    """The id of the image that the node knows under a name."""
    listed = hosts.execute(node.name, [*_CTR, "images", "list", f"name=={name}"]).stdout
    found = re.search(r"sha256:\w+", listed)
    if not found:
        return None
    manifest = hosts.execute(node.name, [*_CTR, "content", "get", found[0]]).stdout
    return str(json.loads(manifest)["config"]["digest"]).removeprefix("sha256:")


def manifests(nodes: Sequence[Node]) -> str:
    """All Node objects as one document for kubectl."""
    items = [manifest(node) for node in nodes]
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items})

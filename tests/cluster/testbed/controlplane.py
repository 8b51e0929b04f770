# SPDX-License-Identifier: Apache-2.0
"""etcd, API server, controller-manager and scheduler, on a host of their own."""

from __future__ import annotations

from pathlib import Path

from cluster.testbed import hosts, pki
from cluster.testbed.commands import wait_for
from cluster.testbed.settings import (
    API_PORT,
    BIN,
    CONTROL_PLANE,
    LOGS,
    PKI,
    PODS_V4,
    PODS_V6,
    SERVICES_V4,
    SERVICES_V6,
)

_ETCD = "http://127.0.0.1:2379"
_SERVICE_RANGES = f"{SERVICES_V4},{SERVICES_V6}"


def start() -> None:
    """Start all four; they find each other, so the order does not matter."""
    host = CONTROL_PLANE.name
    folder = hosts.files(host)
    hosts.start_daemon(host, "etcd", ["etcd", *_etcd(folder / "etcd")])
    hosts.start_daemon(host, "kube-apiserver", [BIN / "kube-apiserver", *_api_server()])
    for component, flags in (
        ("kube-controller-manager", _controller_manager()),
        ("kube-scheduler", []),
    ):
        config = pki.kubeconfig(folder / f"{component}.kubeconfig", component)
        common = [f"--kubeconfig={config}", "--leader-elect=false", "--profiling=false"]
        # client-go's informers take their time to retry: wait until there is something to list
        until = f"until {_READY}; do sleep 0.2; done; exec"
        argv = ["sh", "-c", f'{until} "$@"', "wait", BIN / component, *common, *flags]
        hosts.start_daemon(host, component, argv)


_READY = (
    f"curl --silent --fail --output /dev/null --cacert {PKI}/ca.crt --cert {PKI}/admin.crt "
    f"--key {PKI}/admin.key https://127.0.0.1:{API_PORT}/readyz"
)


def is_ready() -> bool:
    """Whether the API server says it is ready."""
    return hosts.execute(CONTROL_PLANE.name, ["sh", "-c", _READY]).returncode == 0


def wait_ready() -> None:
    """Wait for the API server; raises TestbedError with the log to read."""
    log = LOGS / f"{CONTROL_PLANE.name}-kube-apiserver.log"
    wait_for("API server", is_ready, 60, f"See {log}")


def _etcd(data: Path) -> list[str]:
    return [
        f"--data-dir={data}",
        "--unsafe-no-fsync",
        f"--listen-client-urls={_ETCD}",
        f"--advertise-client-urls={_ETCD}",
        "--listen-peer-urls=http://127.0.0.1:2380",
        "--logger=zap",
        "--log-level=warn",
    ]


def _api_server() -> list[str]:
    return [
        f"--etcd-servers={_ETCD}",
        f"--advertise-address={CONTROL_PLANE.v4}",
        f"--secure-port={API_PORT}",
        f"--service-cluster-ip-range={_SERVICE_RANGES}",
        "--allow-privileged=true",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        # there is no kube-proxy on this host: webhooks and aggregated APIs go to endpoints
        "--enable-aggregator-routing=true",
        f"--client-ca-file={PKI}/ca.crt",
        f"--tls-cert-file={PKI}/apiserver.crt",
        f"--tls-private-key-file={PKI}/apiserver.key",
        f"--kubelet-client-certificate={PKI}/apiserver-kubelet-client.crt",
        f"--kubelet-client-key={PKI}/apiserver-kubelet-client.key",
        f"--kubelet-certificate-authority={PKI}/ca.crt",
        "--kubelet-preferred-address-types=InternalIP",
        f"--requestheader-client-ca-file={PKI}/front-proxy-ca.crt",
        "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-username-headers=X-Remote-User",
        f"--proxy-client-cert-file={PKI}/front-proxy-client.crt",
        f"--proxy-client-key-file={PKI}/front-proxy-client.key",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-key-file={PKI}/service-account.pub",
        f"--service-account-signing-key-file={PKI}/service-account.key",
        "--profiling=false",
    ]


def _controller_manager() -> list[str]:
    return [
        "--bind-address=127.0.0.1",
        "--allocate-node-cidrs=false",  # each node's ranges are written into its Node object
        f"--cluster-cidr={PODS_V4},{PODS_V6}",
        f"--service-cluster-ip-range={_SERVICE_RANGES}",
        f"--cluster-signing-cert-file={PKI}/ca.crt",
        f"--cluster-signing-key-file={PKI}/ca.key",
        f"--root-ca-file={PKI}/ca.crt",
        f"--service-account-private-key-file={PKI}/service-account.key",
        "--use-service-account-credentials=true",
    ]

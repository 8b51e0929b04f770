# SPDX-License-Identifier: Apache-2.0
"""The cluster's certificates, made with openssl, and kubeconfig files that carry them."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

from cluster.testbed.commands import run
from cluster.testbed.settings import API_PORT, CONTROL_PLANE, PKI, SERVICES_V4, SERVICES_V6, Node

_DAYS = "3650"


def create(nodes: Sequence[Node]) -> None:
    """Make the authorities, the API server's and kubelets' certificates, and all client ones."""
    PKI.mkdir(parents=True, exist_ok=True)
    for name in ("ca", "front-proxy-ca"):
        _key(name)
        run(
            [
                "openssl",
                "req",
                "-x509",
                "-new",
                "-key",
                _path(name, "key"),
                "-days",
                _DAYS,
                "-subj",
                f"/CN={name}",
                "-out",
                _path(name, "crt"),
            ]
        )
    _key("service-account")
    public = ["openssl", "pkey", "-in", _path("service-account", "key"), "-pubout"]
    run([*public, "-out", _path("service-account", "pub")])
    _certificate("apiserver", "kube-apiserver", names=_api_server_names())
    _certificate("apiserver-kubelet-client", "kube-apiserver-kubelet-client", "system:masters")
    _certificate("front-proxy-client", "front-proxy-client", ca="front-proxy-ca")
    _certificate("admin", "kubernetes-admin", "system:masters")
    for component in ("kube-controller-manager", "kube-scheduler"):
        _certificate(component, f"system:{component}")
    for node in nodes:
        names = [f"DNS:{node.name}", f"IP:{node.v4}", f"IP:{node.v6}"]
        _certificate(node.name, f"system:node:{node.name}", "system:nodes", names)


def _api_server_names() -> list[str]:
    service = ["kubernetes", "default", "svc", "cluster", "local"]
    names = [".".join(service[:length]) for length in (1, 2, 3, 5)]
    addresses = [CONTROL_PLANE.v4, CONTROL_PLANE.v6, "127.0.0.1"]
    addresses += [str(SERVICES_V4[1]), str(SERVICES_V6[1])]
    return [f"DNS:{name}" for name in (*names, "localhost")] + [f"IP:{a}" for a in addresses]


def _path(name: str, kind: str) -> Path:
    return PKI / f"{name}.{kind}"


def _key(name: str) -> None:
    curve = ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    run(["openssl", "genpkey", *curve, "-out", _path(name, "key")])


def _certificate(
    name: str, user: str, group: str = "", names: Sequence[str] = (), ca: str = "ca"
) -> None:
    """A certificate for both ends of a connection: Kubernetes reads user and group from it."""
    _key(name)
    subject = (f"/O={group}" if group else "") + f"/CN={user}"
    request = run(["openssl", "req", "-new", "-key", _path(name, "key"), "-subj", subject])
    extensions = _path(name, "ext")
    lines = ["extendedKeyUsage=serverAuth,clientAuth"]
    lines += [f"subjectAltName={','.join(names)}"] if names else []
    extensions.write_text("\n".join(lines))
    run(
        [
            "openssl",
            "x509",
            "-req",
            "-days",
            _DAYS,
            "-extfile",
            extensions,
            "-CA",
            _path(ca, "crt"),
            "-CAkey",
            _path(ca, "key"),
            "-out",
            _path(name, "crt"),
        ],
        stdin=request,
    )


def kubeconfig(target: Path, name: str, server: str = "") -> Path:
    """Write a kubeconfig for the certificate `name`; by default it goes over the fabric."""

    def data(path: Path) -> str:
        return base64.b64encode(path.read_bytes()).decode()

    cluster = {
        "server": server or f"https://{CONTROL_PLANE.v4}:{API_PORT}",
        "certificate-authority-data": data(_path("ca", "crt")),
    }
    user = {
        "client-certificate-data": data(_path(name, "crt")),
        "client-key-data": data(_path(name, "key")),
    }
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "testbed", "cluster": cluster}],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": "testbed", "context": {"cluster": "testbed", "user": name}}],
        "current-context": "testbed",
    }
    target.touch(mode=0o600)
    target.write_text(json.dumps(config, indent=2))
    return target

# SPDX-License-Identifier: Apache-2.0
"""The API server over kept-alive connections: thousands of objects at once, and changes timed."""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

NAMESPACE = "bench"
WORKERS = 16
ENDPOINTS = 5
SERVICES = f"/api/v1/namespaces/{NAMESPACE}/services"
SLICES = f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices"


class ApiError(RuntimeError):
    """The API server refused a request; the message is its answer."""


class Api:
    """A client with one connection per thread."""

    def __init__(self, kubeconfig: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        self._server = urlsplit(cluster["server"])
        self._tls = ssl.create_default_context(cafile=cluster.get("certificate-authority"))
        if "certificate-authority-data" in cluster:
            ca = base64.b64decode(cluster["certificate-authority-data"]).decode()
            self._tls = ssl.create_default_context(cadata=ca)
        self._load_certificate(user)
        self._local = threading.local()

    def _load_certificate(self, user: dict[str, str]) -> None:
        if "client-certificate" in user:
            self._tls.load_cert_chain(user["client-certificate"], user["client-key"])
            return
        with tempfile.NamedTemporaryFile() as pem:
            for part in ("client-certificate-data", "client-key-data"):
                pem.write(base64.b64decode(user[part]) + b"\n")
            pem.flush()
            self._tls.load_cert_chain(pem.name)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """One request; PATCH is a merge patch. Raises ApiError on anything but 2xx."""
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = http.client.HTTPSConnection(
                self._server.hostname or "", self._server.port, context=self._tls, timeout=60
            )
        text = None if body is None else json.dumps(body)
        try:
            connection.request(method, path, text, {"Content-Type": kind})
            answer = connection.getresponse()
            data = answer.read()
        except (http.client.HTTPException, OSError):
            connection.close()
            self._local.connection = None
            raise
        if answer.status >= 300:
            raise ApiError(f"{method} {path}: {answer.status} {data[:500].decode()}")
        return json.loads(data)

    def create_services(self, first: int, last: int) -> None:
        """Services number `first` to `last`-1, each with five endpoints that nobody has."""

        def create(number: int) -> None:
            name = f"filler-{number}"
            self.ask("POST", SERVICES, service(name))
            tail = f"{number >> 8}.{number & 255}"
            addresses = [f"10.{200 + host}.{tail}" for host in range(ENDPOINTS)]
            self.ask("POST", SLICES, endpoint_slice(name, name, addresses))

        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(create, range(first, last)))


def service(name: str, **spec: Any) -> dict[str, Any]:
    """A Service without selector: its endpoints are whoever the slices name."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"ports": [{"name": "p", "port": 80, "protocol": "TCP"}], **spec},
    }


def endpoint_slice(name: str, of: str, addresses: list[str], port: int = 8080) -> dict[str, Any]:
    """A ready EndpointSlice of a service."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": of}},
        "addressType": "IPv4",
        "ports": [{"name": "p", "port": port, "protocol": "TCP"}],
        "endpoints": [{"addresses": [a], "conditions": {"ready": True}} for a in addresses],
    }

# SPDX-License-Identifier: Apache-2.0
"""A connection to the API server: bytes in, bytes out.

kubernetes-asyncio supplies configuration, authentication and TLS; its model layer is not used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec
from kubernetes_asyncio import client, config

if TYPE_CHECKING:
    from collections.abc import Mapping

TIMEOUT_SECONDS = 30.0
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
JSON = "application/json"
_IN_CLUSTER = Path("/var/run/secrets/kubernetes.io/serviceaccount/token").exists()


class ApiError(Exception):
    """The API server refused a request. The message is the server's own."""

    def __init__(self, status: int, method: str, path: str, message: str) -> None:
        super().__init__(f"{method} {path}: {status} {message}")
        self.status = status


class Connection:
    """One session; use as an async context manager."""

    def __init__(self) -> None:
        self._client: client.ApiClient | None = None

    async def __aenter__(self) -> Self:
        """Load the pod's service account, or outside of a cluster the kubeconfig."""
        configuration = client.Configuration()
        try:
            if _IN_CLUSTER:
                config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
            else:
                await config.load_kube_config(client_configuration=configuration)
        except config.ConfigException as error:
            raise OSError(f"no usable credentials, set KUBECONFIG: {error}") from error
        self._client = client.ApiClient(configuration)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the session."""
        if self._client is not None:
            await self._client.close()

    async def get(self, path: str, query: Mapping[str, str] | None = None) -> bytes:
        """GET; raises ApiError."""
        return await self.request("GET", path, query=query)

    async def find(self, path: str) -> bytes | None:
        """GET one object; None where there is none."""
        try:
            return await self.get(path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = JSON,
    ) -> bytes:
        """Send one request and return the response's body; raises ApiError when refused."""
        if self._client is None:
            raise RuntimeError("the connection is not open: use it in `async with`")
        response = await self._client.call_api(
            path,
            method,
            query_params=list((query or {}).items()),
            header_params={"Content-Type": content_type, "Accept": JSON},
            body=body,
            auth_settings=["BearerToken"],
            _preload_content=False,
            _request_timeout=TIMEOUT_SECONDS,
        )
        data: bytes = await response.read()
        if not 200 <= response.status <= 299:
            raise ApiError(response.status, method, path, _reason(data))
        return data


class _Refusal(msgspec.Struct):
    message: str = ""


def _reason(data: bytes) -> str:
    """Return the message out of the Status object that a refusal carries."""
    try:
        return msgspec.json.decode(data, type=_Refusal).message
    except msgspec.MsgspecError:
        return data[:200].decode(errors="replace")

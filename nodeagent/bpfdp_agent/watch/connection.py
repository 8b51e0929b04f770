# SPDX-License-Identifier: Apache-2.0
"""The connection to the API server: kubernetes-asyncio says where and who, aiohttp moves bytes."""

from __future__ import annotations

import contextlib
import os
import ssl
from typing import TYPE_CHECKING

import aiohttp
from kubernetes_asyncio import config
from kubernetes_asyncio.client import Configuration

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

REQUEST_SECONDS = 30
CONNECT_SECONDS = 10

NO_CLUSTER = (
    "no API server is configured: in a pod the service account is used, elsewhere point KUBECONFIG"
    " at a kubeconfig file"
)


class Connection:
    """One pool of connections. `authorize` gives the headers with our token, which rotates."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        host: str,
        authorize: Callable[[], Awaitable[Mapping[str, str]]],
    ) -> None:
        self._session = session
        self._host = host.rstrip("/")
        self._authorize = authorize

    async def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: bytes | None = None,
        content_type: str = "application/json",
    ) -> tuple[int, bytes]:
        """Status code and body. Raises OSError (TimeoutError included) where no answer came."""
        headers = {**await self._authorize(), "Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = content_type
        timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS, connect=CONNECT_SECONDS)
        try:
            async with self._session.request(
                method,
                self._host + path,
                params=params,
                data=body,
                headers=headers,
                timeout=timeout,
            ) as response:
                return response.status, await response.read()
        except aiohttp.ClientError as error:
            raise ConnectionError(f"{method} {path}: {error}") from error

    @contextlib.asynccontextmanager
    async def stream(
        self, path: str, params: Mapping[str, str], inactivity: float
    ) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """Status code and the lines of a watch as they come.

        Raises TimeoutError when nothing arrives for `inactivity` seconds, OSError when it breaks.
        """
        headers = {**await self._authorize(), "Accept": "application/json"}
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=inactivity
        )
        try:
            async with self._session.get(
                self._host + path, params=params, headers=headers, timeout=timeout
            ) as response:
                yield response.status, _lines(response)
        except aiohttp.ClientError as error:
            if isinstance(error, OSError):
                raise
            raise ConnectionError(f"GET {path}: {error}") from error

    async def close(self) -> None:
        """Close every connection of the pool."""
        await self._session.close()


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Lines of any length; StreamReader.readline has a limit that one object may pass."""
    rest = bytearray()
    async for chunk in response.content.iter_any():
        *lines, last = chunk.split(b"\n")
        for line in lines:
            rest += line
            if rest:
                yield bytes(rest)
            rest.clear()
        rest += last


async def connect(kubeconfig: str | None = None) -> Connection:
    """Connect as the given kubeconfig says, else as the pod's service account, else as KUBECONFIG.

    Raises ConnectionError saying what to configure.
    """
    settings = Configuration()
    try:
        if kubeconfig is None and "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]
        else:
            await config.load_kube_config(kubeconfig, client_configuration=settings)
    except (config.ConfigException, OSError) as error:
        raise ConnectionError(f"{NO_CLUSTER} ({error})") from error

    async def authorize() -> dict[str, str]:
        token = await settings.get_api_key_with_prefix("BearerToken")
        return {"Authorization": token} if token else {}

    host = settings.host
    if not host:
        raise ConnectionError(NO_CLUSTER)
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=_tls(settings)), trust_env=True
    )
    return Connection(session, host, authorize)


def _tls(settings: Configuration) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=settings.ssl_ca_cert)
    # cluster CAs are often made without the extensions that Python 3.13 began to insist on
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if settings.cert_file:
        context.load_cert_chain(settings.cert_file, keyfile=settings.key_file)
    if not settings.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context

# SPDX-License-Identifier: Apache-2.0
"""The connection to the API server: where it is, who we are, TLS, and bytes by aiohttp.

In a pod that is the service account's files and two variables, read here: importing
kubernetes-asyncio costs 35 MB and half a second, for model classes that nobody uses. Elsewhere it
reads the kubeconfig.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import time
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

REQUEST_SECONDS = 30
CONNECT_SECONDS = 10
TOKEN_SECONDS = 60
"""How long a token is used before its file is read again (the kubelet rotates it hourly)."""
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

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
    if kubeconfig is None and "KUBERNETES_SERVICE_HOST" in os.environ:
        return _connect_in_cluster(os.environ, SERVICE_ACCOUNT)
    return await _connect_by_kubeconfig(kubeconfig)


def _connect_in_cluster(env: Mapping[str, str], account: Path) -> Connection:
    host, port = env["KUBERNETES_SERVICE_HOST"], env.get("KUBERNETES_SERVICE_PORT", "443")
    name = f"[{host}]" if ":" in host else host
    token = _Token(account / "token")
    try:
        tls = _verifying(str(account / "ca.crt"))
        token.read()
    except OSError as error:
        raise ConnectionError(f"{NO_CLUSTER} ({error})") from error
    return Connection(_session(tls), f"https://{name}:{port}", token.authorize)


class _Token:
    """A service account's token, read again when it may have been rotated."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._text = ""
        self._read_at = 0.0

    def read(self) -> None:
        """Read the file. Raises OSError."""
        self._text = self._path.read_text().strip()
        self._read_at = time.monotonic()

    async def authorize(self) -> dict[str, str]:
        """The header; with the last token where the file cannot be read just now."""
        if time.monotonic() - self._read_at > TOKEN_SECONDS:
            with contextlib.suppress(OSError):
                self.read()
        return {"Authorization": f"Bearer {self._text}"}


async def _connect_by_kubeconfig(kubeconfig: str | None) -> Connection:
    from kubernetes_asyncio import config  # noqa: PLC0415 - see the module's docstring
    from kubernetes_asyncio.client import Configuration  # noqa: PLC0415

    settings = Configuration()
    try:
        await config.load_kube_config(kubeconfig, client_configuration=settings)
    except (config.ConfigException, OSError) as error:
        raise ConnectionError(f"{NO_CLUSTER} ({error})") from error

    async def authorize() -> dict[str, str]:
        token = await settings.get_api_key_with_prefix("BearerToken")
        return {"Authorization": token} if token else {}

    host = settings.host
    if not host:
        raise ConnectionError(NO_CLUSTER)
    tls = _verifying(settings.ssl_ca_cert)
    if settings.cert_file:
        tls.load_cert_chain(settings.cert_file, keyfile=settings.key_file)
    if not settings.verify_ssl:
        tls.check_hostname = False
        tls.verify_mode = ssl.CERT_NONE
    return Connection(_session(tls), host, authorize)


def _session(tls: ssl.SSLContext) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, ssl=tls), trust_env=True)


def _verifying(ca_file: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca_file)
    # cluster CAs are often made without the extensions that Python 3.13 began to insist on
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context

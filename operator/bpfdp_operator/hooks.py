# SPDX-License-Identifier: Apache-2.0
"""What the chart's Jobs do: Helm neither upgrades CRDs nor knows how to take a dataplane down."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import yaml

from bpfdp_operator import observe
from bpfdp_operator import world as w
from bpfdp_operator.connection import APPLY, JSON, ApiError, Connection
from bpfdp_operator.loop import Reconciler

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger("bpfdp.hook")

CRDS_IN_IMAGE = Path("/usr/share/bpfdp/crds")
CRDS_IN_REPOSITORY = Path(__file__).parents[2] / "crds"
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
OPERATOR_NAME = "bpfdp-operator"

ESTABLISH_SECONDS = 60.0
DEAD_SECONDS = 20.0
"""An operator without an available pod for this long does not count on coming back."""
STALLED_SECONDS = 60.0
"""An operator that changes nothing in the status for this long is taken for dead."""
JOB_SECONDS = 220.0
"""The restore Job's deadline where $BPFDP_RESTORE_SECONDS does not say: below Helm's --timeout."""
JOB_MARGIN_SECONDS = 20.0
"""Of those, what a pod needs to start, and to say why it did not finish before it is killed."""
POLL_SECONDS = 2.0


class HookError(Exception):
    """The Job failed; the message says what to do."""


def crd_documents() -> Iterator[dict[str, Any]]:
    """Read the CRDs from $BPFDP_CRDS, the image or the repository."""
    configured = os.environ.get("BPFDP_CRDS")
    candidates = [Path(configured)] if configured else [CRDS_IN_IMAGE, CRDS_IN_REPOSITORY]
    folder = next((path for path in candidates if path.is_dir()), None)
    files = sorted(folder.glob("*.yaml")) if folder else []
    if not files:
        raise HookError(f"no CRDs found in {', '.join(map(str, candidates))}: set BPFDP_CRDS")
    for file in files:
        yield from (d for d in yaml.safe_load_all(file.read_text()) if d)


async def apply_crds() -> None:
    """Server-side-apply every CRD: installs what is missing, upgrades what is there."""
    documents = list(crd_documents())
    async with Connection() as connection:
        for document in documents:
            name = document["metadata"]["name"]
            query = {"fieldManager": w.FIELD_MANAGER, "force": "true"}
            await connection.request(
                "PATCH", f"{CRDS}/{name}", query=query, body=document, content_type=APPLY
            )
            log.info("CRD applied", extra={"object": name})


async def create_default(spec_text: str) -> None:
    """Create the config `default` where none exists; one that exists is left as it is."""
    spec = yaml.safe_load(spec_text) if spec_text.strip() else {}
    if not isinstance(spec, dict):
        raise HookError("BPFDP_DEFAULT_SPEC is not a mapping: set it to the spec as YAML or JSON")
    body = {
        "apiVersion": f"{w.GROUP}/{w.VERSION}",
        "kind": "BpfDataplaneConfig",
        "metadata": {"name": w.CONFIG_NAME},
        "spec": spec,
    }
    deadline = time.monotonic() + ESTABLISH_SECONDS
    async with Connection() as connection:
        while True:
            try:
                await connection.request("POST", observe.CONFIGS, body=body, content_type=JSON)
            except ApiError as error:
                if error.status == 409:
                    log.info("a config exists; it is left as it is")
                    return
                # 404: the API server does not serve the new kind yet.
                if error.status != 404 or time.monotonic() > deadline:
                    raise HookError(str(error)) from error
                await asyncio.sleep(POLL_SECONDS)
            else:
                log.info("config created", extra={"object": w.CONFIG_NAME})
                return


class _Seen(msgspec.Struct):
    """The config's last known message, for when time is up."""

    message: str = "the API server could not be read."


async def restore(deployment: w.Deployment) -> None:
    """Delete the config and see it go; where the operator is dead, do the operator's work here.

    The work is the same plan, carried out by the same code, so it does not matter at which step the
    operator died, nor whether it lives after all. Raises HookError when time is up.
    """
    seen = _Seen()
    limit = asyncio.timeout(restore_seconds())
    try:
        async with limit:
            await _restore(deployment, seen)
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise HookError(_unfinished(seen)) from error


def restore_seconds() -> float:
    """How long `restore` may take in the Job that it runs in."""
    text = os.environ.get("BPFDP_RESTORE_SECONDS", "")
    try:
        return float(text or JOB_SECONDS) - JOB_MARGIN_SECONDS
    except ValueError:
        raise HookError(f"BPFDP_RESTORE_SECONDS is {text!r}: set it to a number") from None


async def _restore(deployment: w.Deployment, seen: _Seen) -> None:
    async with Connection() as connection:
        if await _delete_config(connection):
            log.info("there is no config: nothing to restore")
            return
        if await _operator_does_it(connection, deployment, seen):
            log.info("the operator restored kube-proxy and let the config go")
            return
    log.warning("the operator makes no progress: restoring from this Job")
    reconciler = Reconciler(deployment, refresh_seconds=0.0)
    task = asyncio.create_task(reconciler.run())
    try:
        while not reconciler.config_gone:
            if task.done():
                raise HookError(_unfinished(seen))
            await asyncio.sleep(POLL_SECONDS / 4)
            if config := reconciler.store.get(w.Config, w.CONFIG_NAME):
                seen.message = config.status.message
    finally:
        task.cancel()
    log.info("kube-proxy is restored and the config is gone")


async def _delete_config(connection: Connection) -> bool:
    """Ask for the config's deletion; tell whether there was none."""
    try:
        await connection.request("DELETE", f"{observe.CONFIGS}/{w.CONFIG_NAME}")
    except ApiError as error:
        if error.status == 404:
            return True
        raise
    return False


class _DeploymentStatus(msgspec.Struct, rename="camel"):
    available_replicas: int = 0


class _OperatorDeployment(msgspec.Struct):
    status: _DeploymentStatus = msgspec.field(default_factory=_DeploymentStatus)


async def _operator_does_it(connection: Connection, deployment: w.Deployment, seen: _Seen) -> bool:
    """Wait for the operator; False once it is dead or stalls."""
    path = f"/apis/apps/v1/namespaces/{deployment.namespace}/deployments/{OPERATOR_NAME}"
    seen_alive = seen_moving = time.monotonic()
    version = ""
    while True:
        config = await observe.find(connection, w.Config, f"{observe.CONFIGS}/{w.CONFIG_NAME}")
        if config is None:
            return True
        seen.message = config.status.message
        now = time.monotonic()
        if config.metadata.resource_version != version:
            version, seen_moving = config.metadata.resource_version, now
            log.info("waiting for the operator", extra={"status": config.status.message})
        data = await connection.find(path)
        if data and msgspec.json.decode(data, type=_OperatorDeployment).status.available_replicas:
            seen_alive = now
        if now - seen_alive > DEAD_SECONDS or now - seen_moving > STALLED_SECONDS:
            return False
        await asyncio.sleep(POLL_SECONDS)


def _unfinished(seen: _Seen) -> str:
    return (
        f"not finished in time: {seen.message} When that is mended, run helm uninstall again; "
        "--no-hooks skips this Job and leaves kube-proxy as it is."
    )

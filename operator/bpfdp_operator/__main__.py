# SPDX-License-Identifier: Apache-2.0
"""`bpfdp-operator`: runs the operator, or one of the chart's hooks."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from typing import TYPE_CHECKING, Any, cast

import click

from bpfdp_operator import hooks
from bpfdp_operator.connection import ApiError
from bpfdp_operator.logs import configure
from bpfdp_operator.world import Deployment

if TYPE_CHECKING:
    from collections.abc import Coroutine

HEALTH = "http://127.0.0.1:9098/healthz"


def deployment() -> Deployment:
    """Read the operator's own settings from the environment that the chart gives."""
    return Deployment(
        namespace=os.environ.get("POD_NAMESPACE", "bpf-dataplane"),
        image=os.environ.get("BPFDP_AGENT_IMAGE", "localhost/bpf-dataplane:dev"),
        pull_policy=os.environ.get("BPFDP_AGENT_PULL_POLICY", "IfNotPresent"),
        version=os.environ.get("BPFDP_VERSION", "dev"),
    )


@click.group(invoke_without_command=True)
@click.pass_context
def main(context: click.Context) -> None:
    """Run the BPF dataplane's operator. Without a subcommand it runs until it is stopped."""
    configure(os.environ.get("BPFDP_LOG_LEVEL", "INFO"))
    if context.invoked_subcommand is None:
        asyncio.run(serve())


async def serve() -> None:
    """Run kopf with our handlers until a signal comes."""
    # Imported here: kopf is not wanted, and takes half a second, in the hooks.
    import kopf  # noqa: PLC0415

    from bpfdp_operator import handlers  # noqa: PLC0415
    from bpfdp_operator.loop import Reconciler  # noqa: PLC0415

    await kopf.operator(
        clusterwide=True,
        standalone=True,
        # kopf would make one from the user's name; the image's user has none.
        identity=cast("Any", os.environ.get("POD_NAME", "bpfdp-operator")),
        liveness_endpoint=HEALTH,
        memo=handlers.Memo(Reconciler(deployment())),
    )


@main.group()
def hook() -> None:
    """Do what the chart's Jobs do."""


@hook.command("apply-crds")
def apply_crds() -> None:
    """Apply the CRDs, new or changed (pre-install, pre-upgrade)."""
    _finish(hooks.apply_crds())


@hook.command("create-default")
@click.option(
    "--spec",
    envvar="BPFDP_DEFAULT_SPEC",
    default="{}",
    help="Spec of the config, as YAML or JSON.",
)
def create_default(spec: str) -> None:
    """Create the BpfDataplaneConfig `default` where there is none (post-install)."""
    _finish(hooks.create_default(spec))


@hook.command("restore")
def restore() -> None:
    """Bring kube-proxy back and take the dataplane off every node (pre-delete)."""
    _finish(hooks.restore(deployment()))


def _finish(work: Coroutine[None, None, None]) -> None:
    try:
        asyncio.run(work)
    except (hooks.HookError, ApiError, OSError) as error:
        logging.getLogger("bpfdp.hook").error("the hook failed", extra={"error": str(error)})
        sys.exit(1)


if __name__ == "__main__":
    main()

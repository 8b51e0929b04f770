# SPDX-License-Identifier: Apache-2.0
"""`bpfdp`: the agent's entry point and its windows on this node's dataplane."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bpfdp_agent.readout import Readout

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """BPF dataplane for Kubernetes, on this node. Everything but `agent` reads and returns."""


def output_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`-o table|json`, on every command that prints."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="How to print.",
    )(command)


def show(output: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Rows as a table, or as JSON objects with the columns as names."""
    if output == "json":
        names = [c.lower().replace(" ", "_") for c in columns]
        body = [dict(zip(names, row, strict=True)) for row in rows]
        click.echo(msgspec.json.format(msgspec.json.encode(body)).decode())
        return
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    width = None if sys.stdout.isatty() else 200
    Console(width=width, markup=False, highlight=False).print(table)


@main.command()
def agent() -> None:
    """Run the node agent (the DaemonSet's command). Settings come from the environment."""
    from bpfdp_agent.agent import run_agent  # noqa: PLC0415 - the other commands need no API client
    from bpfdp_agent.config import ConfigError, settings_from_env  # noqa: PLC0415

    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)
    try:
        settings = settings_from_env(os.environ)
        asyncio.run(run_agent(settings))
    except (ConfigError, ConnectionError) as error:
        raise click.ClickException(str(error)) from error


@main.command()
@output_option
def doctor(output: str) -> None:
    """Try every kernel feature the dataplane uses; says what to do about a missing one.

    Exits with 1 when a required feature is missing, or could not be tried for want of privilege.
    """
    from bpfdp_agent.bpf import features  # noqa: PLC0415

    found = features.probe()
    rows = [
        (
            f.name,
            "required" if f.required else "optional",
            "yes" if f.supported else "?" if f.denied else "NO",
            f.message,
        )
        for f in found
    ]
    show(output, ["Feature", "Need", "Works", "What to do"], rows)
    missing = features.missing_required(found)
    if missing:
        if any(f.denied for f in missing):
            raise click.ClickException(
                f"not permitted to try what this kernel has: {features.PRIVILEGE_REMEDY}"
            )
        names = ", ".join(f.name for f in missing)
        click.echo(f"This node cannot run the dataplane: {names}.", err=True)
        sys.exit(1)


@main.command()
@output_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def cleanup(output: str, yes: bool) -> None:
    """Remove every program, link, map, pin and device of ours from this node.

    Services then work on this node only if kube-proxy runs on it. For a node whose agent cannot
    do it by itself any more; `dataplane: Disabled` in the BpfDataplaneConfig is the ordinary way.
    """
    from bpfdp_agent.dataplane.cleanup import clean  # noqa: PLC0415

    if not yes and sys.stdin.isatty():
        click.confirm("Remove the dataplane from this node?", abort=True)
    removed = asyncio.run(clean())
    rows = [
        ("hooks", removed.attachments),
        ("pins", removed.pins),
        ("tunnel device", int(removed.tunnel)),
        ("nat table", int(removed.nat_table)),
    ]
    show(output, ["Removed", "Number"], rows)
    for failure in removed.failures:
        click.echo(f"Not removed: {failure}", err=True)
    if removed.failures:
        sys.exit(1)


# -- windows on the kernel's state ---------------------------------------------------------------


def print_readout(
    output: str, columns: Sequence[str], read: Callable[[Readout], Sequence[Sequence[object]]]
) -> None:
    """Print what `read` finds; says what to do when the dataplane is not on this node."""
    from bpfdp_agent.bpf.errors import BpfError  # noqa: PLC0415
    from bpfdp_agent.readout import Readout  # noqa: PLC0415

    try:
        show(output, columns, read(Readout()))
    except (BpfError, OSError) as error:
        raise click.ClickException(str(error)) from error


@main.command()
@output_option
def status(output: str) -> None:
    """What is attached on this node, and where."""
    columns = ["Where", "Hook", "Family", "How", "Program"]
    print_readout(output, columns, lambda r: asyncio.run(r.attached()))


@main.command()
@output_option
def maps(output: str) -> None:
    """The maps, how full they are."""
    print_readout(output, ["Map", "Entries", "Room"], lambda r: r.maps())


@main.command()
@output_option
def services(output: str) -> None:
    """Service frontends and their backends (* on this node)."""
    columns = ["Frontend", "Protocol", "Kind", "Cluster", "Local", "Affinity", "Backends"]
    print_readout(output, columns, lambda r: r.services())


@main.command()
@output_option
@click.option("--limit", default=200, show_default=True, help="The latest so many.")
def ct(output: str, limit: int) -> None:
    """Connections, the most recently used first; each direction is an entry."""
    columns = ["Protocol", "Comes", "Leaves", "Action", "Packets", "Bytes", "Idle s"]
    print_readout(output, columns, lambda r: r.connections(limit))


@main.command()
@output_option
def endpoints(output: str) -> None:
    """This node's pods: interface, and the slots of the policy programs that judge them."""
    columns = ["Address", "Interface", "Ingress", "Egress"]
    print_readout(output, columns, lambda r: r.endpoints())


@main.command()
@output_option
def policy(output: str) -> None:
    """Policy programs and the pods they judge."""
    columns = ["Slot", "Version", "Ingress of", "Egress of"]
    print_readout(output, columns, lambda r: r.policies())


@main.command()
@output_option
def counters(output: str) -> None:
    """Packets by what became of them."""
    print_readout(output, ["What", "IPv4", "IPv6"], lambda r: r.counters())

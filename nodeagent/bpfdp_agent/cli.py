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
    Console(width=width).print(table)


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

    Exits with 1 when a required feature is missing.
    """
    from bpfdp_agent.bpf import features  # noqa: PLC0415

    found = features.probe()
    rows = [
        (
            f.name,
            "required" if f.required else "optional",
            "yes" if f.supported else "NO",
            f.message,
        )
        for f in found
    ]
    show(output, ["Feature", "Need", "Works", "What to do"], rows)
    missing = features.missing_required(found)
    if missing:
        names = ", ".join(f.name for f in missing)
        click.echo(f"This node cannot run the dataplane: {names}.", err=True)
        sys.exit(1)

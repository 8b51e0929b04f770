# SPDX-License-Identifier: Apache-2.0
"""`make bench-services`: the dataplane beside kube-proxy, in one run on one cluster."""

from __future__ import annotations

from collections.abc import Callable

import click
from cluster.testbed import TestbedError
from versus import agent, changes, connect, packet, throughput
from versus.modes import BARE, Modes
from versus.report import Report, machine, say
from versus.stage import Stage, stage

PARTS = ("connect", "dsr", "changes", "churn", "agent", "throughput", "packet")
FEW, MEDIUM, LARGE = 1000, 5000, 10000


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", default=",".join(PARTS), show_default=True, help="Parts, with commas.")
@click.option("--quick", is_flag=True, help="Few services, rounds and seconds: for development.")
@click.option("--rounds", type=int, default=3, show_default=True, help="Interleaved rounds.")
@click.option("--keep", is_flag=True, help="Leave the cluster up at the end, for a look.")
def main(only: str, quick: bool, rounds: int, keep: bool) -> None:
    """Measure and compare; results go to build/results/bench-services.json and *.svg.

    A cluster of two nodes is brought up for it and taken down at the end.
    """
    parts = set(only.split(","))
    if unknown := parts - set(PARTS):
        raise click.BadParameter(f"{', '.join(sorted(unknown))}: parts are {', '.join(PARTS)}")
    report = Report({"quick": quick, "rounds": rounds, "at_start": machine()})
    try:
        if "packet" in parts:
            packet.run(report, quick)
        if parts - {"packet"}:
            with stage(keep) as made:
                on_cluster(made, report, parts, quick, rounds)
    finally:
        report.write()


def on_cluster(made: Stage, report: Report, parts: set[str], quick: bool, rounds: int) -> None:
    """All parts that need the cluster, from few services to many."""
    few, medium, large = (50, 200, 300) if quick else (FEW, MEDIUM, LARGE)
    modes = Modes(made)
    seconds = 2 if quick else 5
    connects = connect.Connect(made, modes, report, 500 if quick else 4000)
    have = 0

    def grow(size: int) -> None:
        nonlocal have
        if size > have:
            modes.switch(BARE, have)
            say(f"creating services {have + 1} to {size}")
            made.api.create_services(have, size)
            have = size

    def attempt(name: str, part: Callable[[], None]) -> None:
        if name not in parts:
            return
        try:
            part()
        except (RuntimeError, TestbedError, LookupError, OSError) as error:
            report.failed(name, error)

    sizes = connect.Sizes(medium, large)
    attempt("connect", lambda: connect.run_one(connects, rounds, seconds))
    attempt("throughput", lambda: throughput.run(made, modes, report, rounds, seconds))
    if parts & {"dsr"}:
        grow(few)
    attempt("dsr", lambda: connect.run_node_port(connects, report, few, rounds))
    if parts & {"connect", "changes", "churn"}:
        grow(medium)
    attempt("connect", lambda: connect.run_medium(connects, sizes, rounds))
    attempt("changes", lambda: changes.endpoint_change(made, modes, report, medium, quick))
    attempt("churn", lambda: changes.churn(made, modes, report, medium, quick))
    if parts & {"connect", "agent"}:
        grow(large)
    attempt("connect", lambda: connect.run_large(connects, report, sizes, rounds))
    attempt("agent", lambda: agent.run(made, modes, report, large, rounds))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""The testbed's command line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
from cluster.testbed import cluster, hosts, images, machine, packages, tools, verify
from cluster.testbed.errors import TestbedError
from cluster.testbed.settings import BIN, KUBECONFIG, Settings


class _Group(click.Group):
    """Turns the errors made for people into one message and exit code 1."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except TestbedError as error:
            click.echo(f"testbed: {error}", err=True)
            sys.exit(1)


@click.group(cls=_Group)
def main() -> None:
    """A real Kubernetes cluster on one machine, in namespaces of its own."""


@main.command("packages")
def install_packages() -> None:
    """Install the Debian packages that are missing."""
    packages.install()


@main.command("tools")
def provide_tools() -> None:
    """Provide the Go programs: Kubernetes, Helm, CoreDNS."""
    with machine.locked():
        tools.provide()


@main.command("tools-e2e")
def provide_e2e_tools() -> None:
    """Build upstream's e2e.test and ginkgo."""
    with machine.locked():
        tools.provide_e2e()


@main.command("base-image")
def provide_base_image() -> None:
    """Put the Debian base image into buildah's storage."""
    with machine.locked():
        images.base_image()


@main.command("node-images")
def make_node_images() -> None:
    """Make the images every node starts with, and unpack them once."""
    with machine.locked():
        images.seed()


@main.command("up")
@click.option(
    "--preload",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A docker-archive that every node has from the start.",
)
def bring_up(preload: tuple[Path, ...]) -> None:
    """Bring the cluster up (NODES, CNI, PROXY, NETWORKS and STRICT choose what kind)."""
    with machine.locked():
        cluster.up(Settings.from_env(), preload)
    click.echo(f"export KUBECONFIG={KUBECONFIG}")
    click.echo(f'export PATH="{BIN}:$PATH"')


@main.command("down")
def take_down() -> None:
    """Take the cluster down."""
    with machine.locked():
        cluster.down()


@main.command("verify-clean")
def verify_clean() -> None:
    """List what is left of a cluster; exit code 1 when something is."""
    if left := verify.leftovers():
        click.echo("\n".join(left))
        raise TestbedError("the lines above are left over; `make cluster-down` removes them")
    click.echo("nothing is left")


@main.command("exec", context_settings={"ignore_unknown_options": True})
@click.argument("host")
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED)
def execute(host: str, argv: tuple[str, ...]) -> None:
    """Run a program on a node, on `client` or on `controlplane`."""
    command = hosts.enter(host, argv)
    os.execvp(command[0], command)


@main.command("load-image")
@click.argument("archive", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def load_image(archive: Path) -> None:
    """Import a docker-archive on every node."""
    cluster.Testbed().load_image(archive)

# SPDX-License-Identifier: Apache-2.0
"""The testbed's command line."""

from __future__ import annotations

import sys

import click
from cluster.testbed import images, packages, tools
from cluster.testbed.errors import TestbedError


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
    tools.provide()


@main.command("tools-e2e")
def provide_e2e_tools() -> None:
    """Build upstream's e2e.test and ginkgo."""
    tools.provide_e2e()


@main.command("base-image")
def provide_base_image() -> None:
    """Put the Debian base image into buildah's storage."""
    images.base_image()

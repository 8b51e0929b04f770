# SPDX-License-Identifier: Apache-2.0
"""Debian packages the project is built, tested and run with."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.testbed.commands import run
from cluster.testbed.errors import TestbedError
from cluster.testbed.progress import say, step

PACKAGES = (
    "bpftool",
    "buildah",
    "ca-certificates",
    "clang-format",
    "conntrack",
    "containerd",
    "containernetworking-plugins",
    "curl",
    "ethtool",
    "etcd-client",
    "etcd-server",
    "gcc",
    "iperf3",
    "iproute2",
    "ipset",
    "iptables",
    "libc6-dev",
    "linux-libc-dev",
    "mmdebstrap",
    "nftables",
    "openssl",
    "procps",
    "python3-bpfcc",
    "python3-venv",
    "runc",
    "tcpdump",
    "util-linux",
)
POLICY = Path("/usr/sbin/policy-rc.d")


def install() -> None:
    """Install what is missing, and start none of the services that come with it."""
    missing = [package for package in PACKAGES if not _installed(package)]
    if not missing:
        say("Debian packages: all there")
        return
    if os.geteuid():
        raise TestbedError(f"run as root, or install yourself: apt-get install {' '.join(missing)}")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with step("apt-get update"):
        run(["apt-get", "update", "--quiet"], env=env, hint="check /etc/apt/sources.list.d")
    with step(f"installing {' '.join(missing)}"), _no_services():
        run(
            ["apt-get", "install", "--quiet", "--yes", "--no-install-recommends", *missing], env=env
        )


def _installed(package: str) -> bool:
    query = ["dpkg-query", "--show", "--showformat=${db:Status-Status}", package]
    return subprocess.run(query, check=False, capture_output=True, text=True).stdout == "installed"


@contextmanager
def _no_services() -> Iterator[None]:
    """Debian's own switch against starting services; a policy that is there already stays."""
    if POLICY.exists():
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()


if __name__ == "__main__":
    # before there is a virtual environment, so without the command line's dependencies
    try:
        install()
    except TestbedError as failure:
        sys.exit(f"testbed: {failure}")

# SPDX-License-Identifier: Apache-2.0
"""What the tests that need a kernel share: a bpffs of their own, namespaces of their own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from typing import TYPE_CHECKING, TypeVar

import pytest
from bpfdp_agent.bpf.netns import in_new_netns
from bpfdp_agent.dataplane.pins import Pins

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

T = TypeVar("T")


def need(condition: bool, what: str) -> None:
    """Skip, or fail where CI promised it, naming what is missing."""
    if condition:
        return
    if os.environ.get("CI"):
        pytest.fail(f"CI lacks {what}")
    pytest.skip(f"needs {what}")


@contextlib.contextmanager
def private_bpffs(folder: Path) -> Iterator[Pins]:
    """Pins in a bpffs mounted for this test alone; everything pinned goes with it."""
    need(os.geteuid() == 0, "root")
    subprocess.run(["mount", "-t", "bpf", "bpf", folder], check=True)
    try:
        pins = Pins(folder)
        pins.make()
        yield pins
    finally:
        subprocess.run(["umount", folder], check=True)


def in_own_netns(work: Callable[[], Awaitable[T]]) -> T:
    """Run a coroutine function in a fresh network namespace with an event loop of its own."""
    need(os.geteuid() == 0, "root")

    async def call() -> T:
        return await work()

    return in_new_netns(lambda: asyncio.run(call()))


def shell(command: str, given: str | None = None) -> str:
    """Output of a command in the calling thread's namespace."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        input=given,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

# SPDX-License-Identifier: Apache-2.0
"""Running programs and waiting for conditions, with errors that show what was said."""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cluster.testbed.errors import TestbedError


def run(
    argv: Sequence[str | Path],
    *,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float | None = None,
    hint: str = "",
) -> str:
    """Run to the end and return stdout; raises TestbedError with the output's tail."""
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(
            words,
            check=False,
            input=stdin,
            env=env,
            cwd=cwd,
            timeout=timeout,
            text=True,
            capture_output=True,
        )
    except FileNotFoundError as error:
        raise TestbedError(f"{error.filename} is not there; run `make packages tools`") from error
    except subprocess.TimeoutExpired as error:
        raise TestbedError(f"{shlex.join(words)}: no end after {timeout} s. {hint}") from error
    if done.returncode:
        tail = (done.stdout + done.stderr).strip()[-2000:]
        raise TestbedError(f"{shlex.join(words)}: exit {done.returncode}\n{tail}\n{hint}".strip())
    return done.stdout


def wait_for(
    what: str, ready: Callable[[], bool], timeout: float, hint: str, pause: float = 0.2
) -> None:
    """Poll until `ready()`; raises TestbedError with the hint when time is up."""
    end = time.monotonic() + timeout
    while not ready():
        if time.monotonic() > end:
            raise TestbedError(f"{what}: not within {timeout:.0f} s. {hint}")
        time.sleep(pause)

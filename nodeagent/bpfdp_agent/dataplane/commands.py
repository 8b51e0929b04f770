# SPDX-License-Identifier: Apache-2.0
"""Running a program of the image (iptables, nft) and taking its output."""

from __future__ import annotations

import asyncio
import shutil

from bpfdp_agent.bpf.errors import CommandFailed

TIMEOUT = 60.0


def available(program: str) -> bool:
    """Whether the program is on PATH."""
    return shutil.which(program) is not None


async def run(*command: str, given: str = "") -> str:
    """Standard output of the command, `given` on its input. Raises CommandFailed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(given.encode()), TIMEOUT)
    except TimeoutError as error:
        raise CommandFailed(f"{' '.join(command)} took longer than {TIMEOUT:g} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        words = errors.decode(errors="replace").strip()
        raise CommandFailed(f"{' '.join(command)} failed ({process.returncode}): {words}")
    return output.decode(errors="replace")

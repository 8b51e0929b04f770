# SPDX-License-Identifier: Apache-2.0
"""Every process of the testbed lives below one directory of each cgroup hierarchy.

That is how a host's processes, containers included, are found and stopped without a name
or a pattern, and how each host gets a cgroup root of its own.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

from cluster.testbed.errors import TestbedError
from cluster.testbed.settings import CGROUP


@functools.cache
def hierarchies() -> list[Path]:
    """Mount points of all cgroup hierarchies; raises TestbedError without v1 controllers."""
    mounts = Path("/proc/self/mountinfo").read_text()
    found = re.findall(r"^\S+ \S+ \S+ / (/sys/fs/cgroup/\S+) .* - cgroup2? ", mounts, re.M)
    if not any(path.endswith("memory") for path in found):
        raise TestbedError(
            "cgroup v1 controllers are not mounted at /sys/fs/cgroup/*: start the machine with "
            "systemd.unified_cgroup_hierarchy=0 (hybrid), which the nodes' cgroup roots need"
        )
    return [Path(path) for path in dict.fromkeys(found)]


def create(host: str) -> list[Path]:
    """Make a host's directory in every hierarchy; returns the cgroup.procs files to join by."""
    joins = []
    for hierarchy in hierarchies():
        for directory in (hierarchy / CGROUP, hierarchy / CGROUP / host):
            directory.mkdir(exist_ok=True)
            for name in ("cpuset.cpus", "cpuset.mems"):
                if (directory / name).exists() and not (directory / name).read_text().strip():
                    (directory / name).write_text((directory.parent / name).read_text())
        joins.append(hierarchy / CGROUP / host / "cgroup.procs")
    return joins


def processes(host: str = "") -> set[int]:
    """Every process of a host, or of the whole testbed, in any hierarchy."""
    pids: set[int] = set()
    for hierarchy in hierarchies():
        for directory, _, _ in os.walk(hierarchy / CGROUP / host):
            with suppress(OSError):  # a container's directory may go while we look
                procs = Path(directory, "cgroup.procs").read_text()
                pids.update(int(pid) for pid in procs.split())
    return pids - {0, os.getpid()}


def kill_all() -> None:
    """End every process of the testbed at once: nothing it holds is kept."""
    end = time.monotonic() + 20
    while left := processes():
        if time.monotonic() > end:
            raise TestbedError(f"processes {sorted(left)} do not end; look at /proc/PID/stack")
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def remove() -> None:
    """Remove the testbed's directories from every hierarchy; the processes must be gone."""
    for hierarchy in hierarchies():
        top = hierarchy / CGROUP
        if top.exists():
            for directory, _, _ in os.walk(top, topdown=False):
                _rmdir(Path(directory))


def _rmdir(directory: Path) -> None:
    """A cgroup stays busy for a moment after its last process."""
    for _ in range(50):
        try:
            directory.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise TestbedError(f"cannot remove {directory}: see its cgroup.procs")

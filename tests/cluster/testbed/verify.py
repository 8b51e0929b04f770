# SPDX-License-Identifier: Apache-2.0
"""What a testbed left on the machine: nothing, or a list."""

from __future__ import annotations

from pathlib import Path

from cluster.testbed import cgroups
from cluster.testbed.commands import run
from cluster.testbed.settings import CGROUP, RUN, STATE

# the testbed makes its links in its own namespaces; one of these here was made by mistake
_LINKS = ("fabric", "bpfdp")


def leftovers() -> list[str]:
    """One line for each process, cgroup, mount, link, pin or folder of the testbed."""
    found = [f"process {pid}: {_command(pid)}" for pid in sorted(cgroups.processes())]
    found += [
        f"cgroup {hierarchy / CGROUP}"
        for hierarchy in cgroups.hierarchies()
        if (hierarchy / CGROUP).exists()
    ]
    found += [f"process {pid} in {STATE}: {_command(pid)}" for pid in _processes_with_files()]
    found += [
        f"mount {line.split()[4]}"
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if str(STATE) in line or str(RUN) in line
    ]
    links = run(["ip", "-brief", "link"]).splitlines()
    found += [f"link {link.split()[0]}" for link in links if link.startswith(_LINKS)]
    found += [f"pin {pin}" for pin in Path("/sys/fs/bpf").glob("bpfdp*")]
    found += [f"folder {folder}" for folder in (RUN, STATE) if folder.exists()]
    return found


def _processes_with_files() -> list[int]:
    """Processes outside the testbed's cgroups that were started from its folders."""
    inside = cgroups.processes()
    return [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if int(path.parent.name) not in inside
        and f"{STATE}/hosts" in _command(int(path.parent.name))
    ]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return "(gone)"

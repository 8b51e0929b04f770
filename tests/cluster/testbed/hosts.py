# SPDX-License-Identifier: Apache-2.0
"""Hosts: namespace sets with an init process, and running programs inside them."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.testbed import cgroups
from cluster.testbed.commands import wait_for
from cluster.testbed.errors import TestbedError
from cluster.testbed.settings import LOGS, RUN, STATE

INIT = Path(__file__).resolve().parent / "host-init.sh"


def files(host: str) -> Path:
    """The folder with what a host wrote; it is thrown away with the host."""
    return STATE / "hosts" / host


def start(host: str) -> None:
    """Create a host's namespaces and wait until its mounts are made."""
    folder = files(host)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    LOGS.mkdir(parents=True, exist_ok=True)
    namespaces = ["--net", "--mount", "--uts", "--cgroup", "--propagation", "private"]
    argv = [*_joined(host), "unshare", *namespaces, "sh", INIT, host, folder]
    init = _spawn(argv, LOGS / f"{host}.log")
    (RUN / f"{host}.pid").write_text(str(init.pid))
    ready = folder / "ready"
    wait_for(
        f"namespaces of {host}",
        lambda: ready.exists() or init.poll() is not None,
        30,
        f"See {LOGS / host}.log",
        pause=0.02,
    )
    if init.poll() is not None:
        raise TestbedError(f"{host} did not start: {(LOGS / f'{host}.log').read_text()[-1000:]}")


def is_up(host: str) -> bool:
    """Whether the host's init process runs (and is no other process with its number)."""
    pidfile = RUN / f"{host}.pid"
    return pidfile.exists() and int(pidfile.read_text()) in cgroups.processes(host)


def init_pid(host: str) -> str:
    """The process that holds a host's namespaces; raises TestbedError when it is not up."""
    pidfile = RUN / f"{host}.pid"
    if not pidfile.exists():
        raise TestbedError(f"{host} is not up; bring the cluster up with `make cluster`")
    return pidfile.read_text()


def enter(host: str, argv: Sequence[str | Path]) -> list[str]:
    """The command line that runs `argv` inside a host, in its namespaces and its cgroup."""
    target = ["--target", init_pid(host), "--net", "--mount", "--uts", "--cgroup"]
    return [str(word) for word in (*_joined(host), "nsenter", *target, "--", *argv)]


def start_daemon(host: str, name: str, argv: Sequence[str | Path]) -> None:
    """Start a program that stays, with its output in a log of its own.

    It is stopped with everything else in the host's cgroup.
    """
    _spawn(enter(host, argv), LOGS / f"{host}-{name}.log")


def remove_pins(host: str) -> None:
    """Unpin what a host has in its bpffs, one by one.

    The bpffs would go with the host, but Linux 6.18 can deadlock when very many BPF programs
    are freed at the same moment.
    """
    if not is_up(host):
        return
    bpffs = Path(f"/proc/{init_pid(host)}/root/sys/fs/bpf")
    for pin in [path for path in bpffs.rglob("*") if path.is_file() and path.suffix != ".debug"]:
        pin.unlink(missing_ok=True)
        time.sleep(0.005)


def start_outside(host: str, name: str, argv: Sequence[str | Path]) -> None:
    """Start a program in the machine's own namespaces that ends with the host."""
    _spawn([*_joined(host), *argv], LOGS / f"{host}-{name}.log")


def _joined(host: str) -> list[str]:
    """A command prefix that moves itself into the host's cgroups first."""
    joins = " ".join(str(path) for path in cgroups.create(host))
    return ["sh", "-c", f'for join in {joins}; do echo 0 >"$join"; done; exec "$@"', "join"]


def _spawn(argv: Sequence[str | Path], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            [str(word) for word in argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd="/",
        )


def execute(
    host: str,
    argv: Sequence[str | Path],
    *,
    stdin: str | None = None,
    timeout: float | None = 60,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program inside a host to its end; the caller judges its exit code."""
    return subprocess.run(
        enter(host, argv),
        input=stdin,
        timeout=timeout,
        env=env,
        text=True,
        capture_output=True,
        check=False,
        cwd="/",
    )

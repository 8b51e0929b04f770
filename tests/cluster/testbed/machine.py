# SPDX-License-Identifier: Apache-2.0
"""What the testbed needs of the machine, and what it must give back."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.testbed import cgroups
from cluster.testbed.errors import TestbedError
from cluster.testbed.progress import say
from cluster.testbed.settings import CACHE, REPO, RUN

# not per namespace, and the kubelet writes them
_SYSCTLS = (
    "kernel/keys/root_maxbytes",
    "kernel/keys/root_maxkeys",
    "kernel/panic",
    "kernel/panic_on_oops",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
)
_PROGRAMS = ("containerd", "ctr", "curl", "etcd", "ip", "iptables", "nft", "nsenter", "openssl")
_SAVED = RUN / "sysctls.json"
_OWNER = RUN / "checkout"


def check() -> None:
    """Raise TestbedError, saying what to do, when this machine cannot run the testbed."""
    if platform.system() != "Linux":
        raise TestbedError("the testbed needs Linux: its nodes are namespaces of this machine")
    if os.geteuid():
        raise TestbedError("run as root: namespaces, mounts and BPF need it (sudo make …)")
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [program for program in _PROGRAMS if not shutil.which(program, path=path)]
    if not Path("/usr/lib/cni/ptp").exists():
        missing.append("the CNI plugins in /usr/lib/cni")
    if missing:
        raise TestbedError(f"missing: {', '.join(missing)}; run `make packages`")
    cgroups.hierarchies()


@contextmanager
def locked() -> Iterator[None]:
    """One bring-up, take-down or build at a time on this machine; others wait and say so."""
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = os.open(CACHE, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another testbed command that works in {CACHE}")
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def owner() -> Path | None:
    """The checkout whose cluster is up, if any."""
    return Path(_OWNER.read_text()) if _OWNER.exists() else None


def claim() -> None:
    """Take the machine for this checkout; raises TestbedError when another one has it."""
    if (other := owner()) and other != REPO:
        raise TestbedError(
            f"the checkout in {other} has a cluster on this machine: run `make cluster-down` there"
        )
    RUN.mkdir(parents=True, exist_ok=True)
    _OWNER.write_text(str(REPO))
    if not _SAVED.exists():
        values = {key: (Path("/proc/sys") / key).read_text().strip() for key in _SYSCTLS}
        _SAVED.write_text(json.dumps(values))


def release() -> None:
    """Give the machine back: its own kernel settings, and no files under /run."""
    if _SAVED.exists():
        for key, value in json.loads(_SAVED.read_text()).items():
            setting = Path("/proc/sys") / key
            if setting.read_text().strip() != value:
                setting.write_text(value)
    shutil.rmtree(RUN, ignore_errors=True)

# SPDX-License-Identifier: Apache-2.0
"""The agent at many services: cold start, its memory, and the kernel's for its maps."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

from versus.changes import owner_pods
from versus.modes import OURS, Modes
from versus.report import Report, say
from versus.stage import Stage, pod_processes

MAPS = (
    "for m in $(find /sys/fs/bpf/bpfdp -path '*maps*' -type f); do"
    " bpftool map show pinned $m; done 2>/dev/null"
)
READY = "curl --silent --output /dev/null --write-out '%{http_code}' http://127.0.0.1:9099/readyz"


def run(stage: Stage, modes: Modes, report: Report, services: int, rounds: int) -> None:
    """Cold starts, then memory once the last agent has settled."""
    modes.switch(OURS, services)
    for _ in range(rounds):
        report.sample("ours cold start", cold_start(stage, services), "s")
    where = f"{services} services x 5, from exec to /readyz 200, other node's agent idle"
    starts = report.samples["ours cold start"]["values"]
    report.figure("cold_start_s", report.median("ours cold start"), "s", where, starts)
    time.sleep(20)
    pss = [pss_mib(node, uid) for node, uid, _ in owner_pods(stage, OURS)]
    report.figure("agent_pss_mib", max(pss), "MiB", f"{services} services x 5", pss)
    maps = maps_mib(stage, stage.bed.nodes[0].name)
    report.figure("maps_mib", maps, "MiB", f"pinned maps of one node, {services} services x 5")


def cold_start(stage: Stage, services: int) -> float:
    """Seconds from an agent's exec, with nothing of ours in the kernel, to ready.

    The running agent is stopped before its state is removed: it would put it back.
    """
    node, uid, name = owner_pods(stage, OURS)[0]
    agent = next(p for p in sorted(pod_processes(node, uid)) if "agent" in _command(p))
    os.kill(agent, signal.SIGSTOP)
    stage.bed.kubectl("-n", "bpf-dataplane", "exec", name, "--", "bpfdp", "cleanup", "--yes")
    if left := stage.bed.node_exec(node, ["find", "/sys/fs/bpf", "-type", "f"]).stdout:
        raise RuntimeError(f"pins are left after cleanup: {left[:300]}")
    os.kill(agent, signal.SIGKILL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        new = [p for p in pod_processes(node, uid) if p != agent and "agent" in _command(p)]
        if new and stage.bed.node_exec(node, ["sh", "-c", READY], check=False).stdout == "200":
            took = _uptime() - min(_started(p) for p in new)
            say(f"{node}: {services} services programmed")
            return took
        time.sleep(0.05)
    raise TimeoutError(f"the agent on {node} is not ready 120 s after it was killed")


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return ""
    return " ".join(words) if "bpfdp" in " ".join(words) else ""


def _started(pid: int) -> float:
    """A process's start, in seconds since boot."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _uptime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def pss_mib(node: str, uid: str) -> float:
    """PSS of all processes of a pod."""
    total = 0
    for pid in pod_processes(node, uid):
        found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
        total += int(found[1]) if found else 0
    return total / 1024


def maps_mib(stage: Stage, node: str) -> float:
    """Kernel memory of the maps pinned on a node, as the kernel accounts for it."""
    shown = stage.bed.node_exec(node, ["sh", "-c", MAPS]).stdout
    sizes = [int(n) for n in re.findall(r"memlock (\d+)B", shown)]
    if not sizes:
        raise RuntimeError(f"no map is pinned on {node}")
    return sum(sizes) / 2**20

# SPDX-License-Identifier: Apache-2.0
"""Pod to pod across nodes: Gbit/s, and the machine's CPU seconds per Gbit."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from cluster.testbed.settings import GATEWAY
from versus.modes import IPTABLES, OURS, Modes
from versus.report import Report, say
from versus.stage import Stage

MTUS = (1440, 8940)
PORT = "5201"
GRO_OF_VETH = "off"
"""A veth's default, with the other offloads on too: GRO makes it poll."""
TUNE = """
for path in /sys/class/net/*; do
  device=${path##*/}
  case $device in eth0|veth*|node*|fabric|cni0) ;; *) continue ;; esac
  ip link set dev $device mtu $1
  ethtool -K $device tso $2 gso $2 gro $3 >/dev/null 2>&1 || true
done
"""


def run(stage: Stage, modes: Modes, report: Report, rounds: int, seconds: int) -> None:
    """All MTUs, offloads off and on, ours and kube-proxy iptables in turn."""
    server = stage.start("far", ["iperf3", "--server", "--port", PORT, "--forceflush"])
    try:
        for number in range(rounds):
            say(f"throughput, round {number + 1} of {rounds}")
            for mode in (OURS, IPTABLES):
                modes.switch(mode, 0)
                for mtu in MTUS:
                    for offload in ("off", "on"):
                        tune(stage, mtu, offload)
                        series = f"{mode.name} {mtu}{'_offload' if offload == 'on' else ''}"
                        _once(stage, report, series, seconds)
    finally:
        server.terminate()
        tune(stage, 1500, "on")
    for mtu in MTUS:
        for suffix in ("", "_offload"):
            where = f"one TCP stream, MTU {mtu}, offloads {'on' if suffix else 'off'}"
            ours, other = f"ours {mtu}{suffix}", f"iptables {mtu}{suffix}"
            report.ratio(f"gbps_{mtu}{suffix}", f"{ours} rate", f"{other} rate", where)
            report.ratio(f"cpu_per_gbit_{mtu}{suffix}", f"{ours} cpu", f"{other} cpu", where)


def tune(stage: Stage, mtu: int, offload: str) -> None:
    """The same MTU and offloads on every device between the pods, in every namespace."""
    script = ["sh", "-c", TUNE, "tune", str(mtu), offload, GRO_OF_VETH]
    for host in (GATEWAY.name, *(node.name for node in stage.bed.nodes)):
        stage.bed.node_exec(host, script)
    for pod in stage.addresses:
        stage.run(pod, script)
        shown = stage.run(pod, ["sh", "-c", "cat /sys/class/net/eth0/mtu; ethtool -k eth0"])
        if shown.splitlines()[0] != str(mtu) or f"tcp-segmentation-offload: {offload}" not in shown:
            raise RuntimeError(f"{pod}: MTU {mtu} and offloads {offload} did not take:\n{shown}")


def _once(stage: Stage, report: Report, series: str, seconds: int) -> None:
    argv = ["iperf3", "--client", stage.addresses["far"], "--port", PORT, "--json"]
    before = busy_seconds()
    started = time.monotonic()
    out = json.loads(stage.run("client", [*argv, "--time", str(seconds)], timeout=seconds + 30))
    spent, wall = busy_seconds() - before, time.monotonic() - started
    received = out["end"]["sum_received"]
    gbit = received["bytes"] * 8 / 1e9
    report.sample(f"{series} rate", received["bits_per_second"] / 1e9, "Gbit/s")
    report.sample(f"{series} cpu", spent / gbit, "CPU s/Gbit")
    report.sample(f"{series} cores busy", spent / wall, "cores")


def busy_seconds() -> float:
    """CPU seconds that the whole machine was not idle: user, nice, system, irq, softirq."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _idle, _wait, irq, softirq = map(int, fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")

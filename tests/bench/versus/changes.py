# SPDX-License-Identifier: Apache-2.0
"""What a change costs: how soon packets follow it, and the CPU that churn takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

from versus.api import SERVICES, SLICES, endpoint_slice, service
from versus.modes import IPTABLES, NFTABLES, OURS, Mode, Modes
from versus.report import Report, say
from versus.stage import LOAD, PORTS, Stage, pod_cgroup
from versus.throughput import busy_seconds

AGENT = ("bpf-dataplane", "app.kubernetes.io%2Fcomponent%3Dagent")
KUBE_PROXY = ("kube-system", "k8s-app%3Dkube-proxy")


def endpoint_change(stage: Stage, modes: Modes, report: Report, services: int, quick: bool) -> None:
    """From the change of a slice, when its request is sent, to the first answer of the other pod."""
    count, pause = (15, 0.3) if quick else (150, 0.3)
    made = stage.api.ask("POST", SERVICES, service("moving"))
    address = made["spec"]["clusterIP"]
    stage.api.ask(
        "POST", SLICES, endpoint_slice("moving", "moving", [stage.addresses["near"]], PORTS[0])
    )
    for mode in (NFTABLES, IPTABLES, OURS):
        modes.switch(mode, services)
        changes = count if mode == OURS else count // 5
        rest = pause if mode == OURS else 1.5  # kube-proxy syncs once a second at most
        late = _move(stage, address, changes, rest)
        if len(late) < changes * 0.95:
            raise RuntimeError(f"{mode.name}: {changes - len(late)} of {changes} changes not seen")
        late.sort()
        p99 = late[min(len(late) - 1, int(len(late) * 0.99))]
        report.sample(f"{mode.name} endpoint change p50", statistics.median(late), "ms")
        report.sample(f"{mode.name} endpoint change p99", p99, "ms")
        if mode == OURS:
            where = f"{changes} changes, {services} services x 5, from sending the request"
            report.figure("endpoint_change_p99_ms", p99, "ms", where, late)


def _move(stage: Stage, address: str, changes: int, rest: float) -> list[float]:
    """Milliseconds of each change that was seen."""
    seconds = int(changes * (rest + 0.1)) + 5
    watching = stage.start("client", [LOAD, "watch", address, "80", str(seconds)])
    sent: list[tuple[int, str]] = []
    time.sleep(1)
    for number in range(changes):
        pod = ("far", "near")[number % 2]
        sent.append((time.monotonic_ns(), pod[0]))
        body = {"endpoints": [{"addresses": [stage.addresses[pod]], "conditions": {"ready": True}}]}
        stage.api.ask("PATCH", f"{SLICES}/moving", body)
        time.sleep(rest)
    out, _ = watching.communicate(timeout=seconds + 30)
    seen = [(int(at), who) for at, who in (line.split() for line in out.splitlines())]
    late = []
    for (at, who), (until, _) in zip(sent, [*sent[1:], (sent[-1][0] + 3 * 10**9, "")], strict=True):
        first = next((s for s, w in seen if w == who and at <= s < until), None)
        if first is not None:
            late.append((first - at) / 1e6)
    stage.api.ask(
        "PATCH", f"{SLICES}/moving",
        {"endpoints": [{"addresses": [stage.addresses["near"]], "conditions": {"ready": True}}]},
    )  # fmt: skip
    return late


def churn(stage: Stage, modes: Modes, report: Report, services: int, quick: bool) -> None:
    """CPU of the agent or kube-proxy on both nodes while one service changes each second."""
    rest, busy = (8, 10) if quick else (90, 100)
    for mode in (OURS, IPTABLES, NFTABLES):
        modes.switch(mode, services)
        say(f"churn, {mode.name}: {rest} s rest, {busy} s churn, {rest} s rest")
        time.sleep(3)
        meters = {"": _meter(stage, mode), " whole machine": busy_seconds}
        phases = [_spend(meters, lambda: time.sleep(rest))]
        phases.append(_spend(meters, lambda: _churn(stage, busy)))
        phases.append(_spend(meters, lambda: time.sleep(rest)))
        for name in meters:
            idle = (phases[0][name] + phases[2][name]) / (2 * rest)
            report.sample(f"{mode.name} churn cpu{name}", phases[1][name] - idle * busy, "CPU s")
    where = f"{services} services x 5, {busy} changes, both nodes, rest subtracted"
    report.ratio("churn_cpu_vs_ipt", "ours churn cpu", "iptables churn cpu", where)
    report.ratio("churn_cpu_vs_nft", "ours churn cpu", "nftables churn cpu", where)


def _spend(meters: dict[str, Callable[[], float]], phase: Callable[[], None]) -> dict[str, float]:
    before = {name: meter() for name, meter in meters.items()}
    phase()
    return {name: meter() - before[name] for name, meter in meters.items()}


def _churn(stage: Stage, seconds: int) -> None:
    """One service's endpoint goes and comes, each second, at the second."""
    start = time.monotonic()
    path = f"{SLICES}/churned-{PORTS[0]}"
    for number in range(seconds):
        time.sleep(max(0.0, start + number - time.monotonic()))
        pod = ("far", "near")[number % 2]
        endpoints = [{"addresses": [stage.addresses[pod]], "conditions": {"ready": True}}]
        stage.api.ask("PATCH", path, {"endpoints": endpoints})
    time.sleep(max(0.0, start + seconds - time.monotonic()))


def _meter(stage: Stage, mode: Mode) -> Callable[[], float]:
    """CPU seconds so far of the pods that do the services, their children included."""
    groups = owner_cgroups(stage, mode)
    return lambda: sum(int(Path(g, "cpuacct.usage").read_text()) for g in groups) / 1e9


def owner_pods(stage: Stage, mode: Mode) -> list[tuple[str, str, str]]:
    """(node, uid, name) of the agents' pods, or kube-proxy's."""
    namespace, selector = AGENT if mode.ours else KUBE_PROXY
    items = stage.api.ask("GET", f"/api/v1/namespaces/{namespace}/pods?labelSelector={selector}")
    pods = [
        (p["spec"]["nodeName"], p["metadata"]["uid"], p["metadata"]["name"])
        for p in items["items"]
        if p["status"]["phase"] == "Running"
    ]
    if len(pods) != len(stage.bed.nodes):
        raise LookupError(f"{len(pods)} pods with {selector} in {namespace}, not one a node")
    return pods


def owner_cgroups(stage: Stage, mode: Mode) -> list[Path]:
    """The cpuacct directories of those pods."""
    return [pod_cgroup(node, uid) for node, uid, _ in owner_pods(stage, mode)]

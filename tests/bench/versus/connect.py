# SPDX-License-Identifier: Apache-2.0
"""connect() latency, connections per second, and NodePort with the backend on another node."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from versus.modes import (
    BARE,
    IPTABLES,
    NFTABLES,
    OURS,
    OURS_CTLB,
    OURS_DSR,
    Mode,
    Modes,
    NotInEffect,
)
from versus.report import Report, say
from versus.stage import FAR, LOAD, NEAR, PORTS, Stage


def _p50(text: str, column: int = -1) -> float:
    return statistics.median(int(line.split()[column]) for line in text.splitlines()) / 1000


class Connect:
    """Measures one mode at a time; the caller interleaves."""

    def __init__(self, stage: Stage, modes: Modes, report: Report, samples: int) -> None:
        self._stage, self._modes, self._report, self._samples = stage, modes, report, samples

    def latency(self, mode: Mode, services: int) -> None:
        """p50 of connect() to a pod on this node and on the other, by ClusterIP or straight."""
        self._modes.switch(mode, services)
        for pod in ("near", "far"):
            address, port = (
                (self._stage.addresses[pod], PORTS[0])
                if mode == BARE
                else (self._stage.cluster_ips[pod], 80)
            )
            argv = [LOAD, "connect", address, str(port)]
            self._stage.run("client", [*argv, str(self._samples // 10)])
            value = _p50(self._stage.run("client", [*argv, str(self._samples)]))
            self._report.sample(f"{mode.name} connect {pod} {services or 1}", value, "us")
            if mode != OURS_CTLB:
                self._modes.check_path(mode, address, port)

    def rate(self, mode: Mode, seconds: int) -> None:
        """Connections per second to a pod on this node with one service."""
        self._modes.switch(mode, 0)
        address = self._stage.cluster_ips["near"]
        out = self._stage.run("client", [LOAD, "crr", address, "80", str(seconds)])
        count, spent = map(int, out.split())
        self._report.sample(f"{mode.name} crr near 1", count / spent * 1e9, "1/s")
        self._modes.check_path(mode, address, 80)

    def node_port(self, mode: Mode, services: int) -> None:
        """p50 of connect and total from the outside client to node1, the backend on node2."""
        self._modes.switch(mode, services)
        node = self._stage.bed.node(NEAR)
        argv = [LOAD, "total", node.v4, str(self._stage.node_ports["far"])]
        argv = [str(word) for word in argv]
        self._stage.bed.client_exec([*argv, str(self._samples // 20)])
        came, sent = self._modes.packets(NEAR)
        out = self._stage.bed.client_exec([*argv, "1000"]).stdout
        came_after, sent_after = self._modes.packets(NEAR)
        # replies pass the first node too, unless the backend's node answers directly
        share = (came_after - came) / (sent_after - sent)
        if (share < 1.3) != (mode == OURS_DSR):
            raise NotInEffect(
                f"{mode.name}: {NEAR} got {share:.2f} frames for each of the client's"
            )
        self._modes.check_path(mode, node.v4, self._stage.node_ports["far"])
        self._report.sample(f"{mode.name} nodeport connect {services}", _p50(out, 0), "us")
        self._report.sample(f"{mode.name} nodeport total {services}", _p50(out, 1), "us")


@dataclass(frozen=True)
class Sizes:
    """How many other services there are in the two larger cases."""

    medium: int
    large: int


def _rounds(connect: Connect, modes: Sequence[Mode], size: int, rounds: int) -> None:
    for number in range(rounds):
        say(f"connect, {size} services, round {number + 1} of {rounds}")
        for mode in modes:
            connect.latency(mode, size)


def run_one(connect: Connect, rounds: int, seconds: int) -> None:
    """One service: latency and connections per second."""
    for number in range(rounds):
        say(f"connect, 1 service, round {number + 1} of {rounds}")
        for mode in (OURS, IPTABLES, BARE):
            connect.latency(mode, 0)
            if mode != BARE:
                connect.rate(mode, seconds)


def run_medium(connect: Connect, sizes: Sizes, rounds: int) -> None:
    """Against kube-proxy."""
    _rounds(connect, (OURS, NFTABLES, IPTABLES), sizes.medium, rounds)


def run_large(connect: Connect, report: Report, sizes: Sizes, rounds: int) -> None:
    """Against no proxy at all, and the figures of all sizes."""
    missing: NotInEffect | None = None
    for number in range(rounds):
        say(f"connect, {sizes.large} services, round {number + 1} of {rounds}")
        for mode in (BARE, OURS):
            connect.latency(mode, sizes.large)
        try:
            connect.latency(OURS_CTLB, sizes.large)
        except NotInEffect as error:
            missing = error
    conclude(report, sizes.large, sizes.medium)
    if missing:
        raise missing


def run_node_port(connect: Connect, report: Report, size: int, rounds: int) -> None:
    """NodePort: ours by tunnel, ours by DSR, kube-proxy."""
    for number in range(rounds):
        say(f"NodePort, {size} services, round {number + 1} of {rounds}, by {NEAR} to {FAR}")
        for mode in (OURS, OURS_DSR, IPTABLES):
            connect.node_port(mode, size)
    conclude_node_port(report, size)


def conclude(report: Report, large: int, medium: int) -> None:
    """The issue's figures from the series that were measured."""
    near = "p50, client and backend pod on one node, {} services x 5"
    for name, above, below, where in (
        ("connect_flat", f"ours connect near {large}", "ours connect near 1", near.format(large)),
        ("connect_vs_bare", f"ours connect near {large}", f"bare connect near {large}",
         near.format(large)),
        ("connect_vs_bare_ctlb", f"ours-ctlb connect near {large}", f"bare connect near {large}",
         near.format(large)),
        ("connect_vs_nft", f"ours connect near {medium}", f"nftables connect near {medium}",
         near.format(medium)),
        ("connect_vs_ipt", f"ours connect near {medium}", f"iptables connect near {medium}",
         near.format(medium)),
        ("crr_vs_ipt", "ours crr near 1", "iptables crr near 1", "one node, one service"),
    ):  # fmt: skip
        if above in report.samples and below in report.samples:
            report.ratio(name, above, below, where)


def conclude_node_port(report: Report, size: int) -> None:
    """DSR's figures; total holds connect, as curl counts: both are added up."""
    series = {}
    for mode in (OURS, OURS_DSR, IPTABLES):
        names = [f"{mode.name} nodeport {part} {size}" for part in ("connect", "total")]
        if any(name not in report.samples for name in names):
            return
        both = zip(*(report.samples[name]["values"] for name in names), strict=True)
        series[mode.name] = name = f"{mode.name} nodeport connect+total {size}"
        report.samples[name] = {"unit": "us", "values": [sum(pair) for pair in both]}
    where = f"outside client to {NEAR}, backend on {FAR}, {size} other services"
    report.ratio("dsr_vs_tunnel", series["ours-dsr"], series["ours"], where)
    report.ratio("dsr_vs_ipt", series["ours-dsr"], series["iptables"], where)

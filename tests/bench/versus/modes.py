# SPDX-License-Identifier: Apache-2.0
"""Who does the services: nobody, kube-proxy in a mode, or the dataplane. Checked, not assumed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import yaml
from cluster import dataplane
from cluster.testbed.settings import API_PORT, CONTROL_PLANE
from versus.report import say
from versus.stage import Stage

CR = "/apis/bpfdataplane.io/v1alpha1/bpfdataplanes/default"
DAEMONSET = "/apis/apps/v1/namespaces/kube-system/daemonsets/kube-proxy"
CONFIGMAP = "/api/v1/namespaces/kube-system/configmaps/kube-proxy"
FLUSH = """
for s in iptables-legacy ip6tables-legacy; do
  for t in nat filter mangle raw; do $s -w -t $t -F; $s -w -t $t -X; done 2>/dev/null
done
nft flush ruleset
conntrack -F >/dev/null 2>&1
true
"""


class NotInEffect(RuntimeError):
    """A mode that was switched on does not do the work: figures would be of something else."""


@dataclass(frozen=True)
class Mode:
    """A name, kube-proxy's mode, and the dataplane's spec.services."""

    name: str
    proxy: str = ""
    services: tuple[tuple[str, str], ...] = ()

    @property
    def ours(self) -> bool:
        """Whether the dataplane does it."""
        return bool(self.services)


def _ours(name: str, external: str, at_connect: str) -> Mode:
    fields = (("externalServiceMode", external), ("connectTimeLoadBalancing", at_connect))
    return Mode(name, services=fields)


BARE = Mode("bare")
IPTABLES = Mode("iptables", proxy="iptables")
NFTABLES = Mode("nftables", proxy="nftables")
OURS = _ours("ours", "Tunnel", "Disabled")
OURS_DSR = _ours("ours-dsr", "DSR", "Disabled")
OURS_CTLB = _ours("ours-ctlb", "Tunnel", "Enabled")


class Modes:
    """Switches a stage between modes."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.now: Mode | None = None
        self._installed = False

    def switch(self, mode: Mode, services: int) -> None:
        """Put a mode into effect with that many filler services, and check that it is."""
        if mode == self.now:
            self._wait(mode, services)
            return
        started = time.monotonic()
        if not (mode.ours and self.now and self.now.ours):
            self._clear()
        if mode.ours:
            self._dataplane(mode)
        elif mode.proxy:
            self._proxy(mode.proxy)
        self.now = mode
        self._wait(mode, services)
        say(f"mode {mode.name} is in effect ({time.monotonic() - started:.0f} s)")

    def _clear(self) -> None:
        ask = self._stage.api.ask
        if self._installed:
            # agents detach only where kube-proxy's rules are back
            ask("PATCH", DAEMONSET, _selector(None))
            ask("PATCH", CR, {"spec": {"dataplane": "Disabled"}})
            _until("our programs to be gone", lambda: not any(self._pins()))
        ask("PATCH", DAEMONSET, _selector("off"))
        _until("kube-proxy to be gone", lambda: not self._proxy_pods())
        self._on_nodes(FLUSH)
        left = dataplane.rules_on_all(self._stage.bed)
        if left:
            raise NotInEffect(f"{left} rules of kube-proxy are left after flushing")

    def _proxy(self, mode: str) -> None:
        ask = self._stage.api.ask
        config = yaml.safe_load(ask("GET", CONFIGMAP)["data"]["config.conf"])
        config |= {"mode": mode, mode: {"minSyncPeriod": "1s"}}
        ask("PATCH", CONFIGMAP, {"data": {"config.conf": yaml.safe_dump(config)}})
        ask("PATCH", DAEMONSET, _selector(None))

    def _dataplane(self, mode: Mode) -> None:
        if not self._installed:
            dataplane.install(
                self._stage.bed, "defaultConfig.kubeProxyManagement=Disabled",
                f"apiServer.host={CONTROL_PLANE.v4}", f"apiServer.port={API_PORT}",
            )  # fmt: skip
            self._installed = True
        wanted = dict(mode.services)
        patch = {"spec": {"dataplane": "Enabled", "services": wanted}}
        spec = self._stage.api.ask("PATCH", CR, patch)["spec"]["services"]
        # a CRD without the field has no connect-time translation of TCP to disable
        if any(spec.get(key, "Disabled") != value for key, value in wanted.items()):
            raise NotInEffect(f"the CRD does not know all of {wanted}: it keeps {spec}")

    def _wait(self, mode: Mode, services: int) -> None:
        last = f"filler-{services - 1}" if services else "measured"
        checks: dict[str, Callable[[], bool]] = {
            "": lambda: not any(self._pins()) and dataplane.rules_on_all(self._stage.bed) == 0,
            "iptables": lambda: self._has_rules("iptables-save -t nat", last),
            "nftables": lambda: self._has_rules("nft list table ip kube-proxy", last),
        }
        if mode.ours:
            _until("the dataplane to be settled", lambda: self._settled(services))
        else:
            _until(f"{mode.name} to be in effect", checks[mode.proxy])

    def _has_rules(self, command: str, last: str) -> bool:
        name = last if last != "measured" else "near"
        script = f"{command} 2>/dev/null | grep -c 'bench/{name}[:/]'"
        return not any(self._pins()) and all(int(n or 0) > 0 for n in self._on_nodes(script))

    def _settled(self, services: int) -> bool:
        cr = self._stage.api.ask("GET", CR)
        generation = cr["metadata"]["generation"]
        nodes = self._stage.api.ask("GET", "/apis/bpfdataplane.io/v1alpha1/bpfnodes")["items"]
        told = _true(cr, generation)
        settled = "Available" in told and "Progressing" not in told
        synced = len(nodes) == len(self._stage.bed.nodes) and all(
            "Ready" in _true(node, generation) and node["status"]["services"] > services
            for node in nodes
        )
        clean = dataplane.rules_on_all(self._stage.bed) == 0
        return settled and synced and clean and all(self._pins())

    def _proxy_pods(self) -> list[Any]:
        path = "/api/v1/namespaces/kube-system/pods?labelSelector=k8s-app%3Dkube-proxy"
        pods: list[Any] = self._stage.api.ask("GET", path)["items"]
        return pods

    def _pins(self) -> list[bool]:
        found = self._on_nodes("find /sys/fs/bpf/bpfdp -path '*links*' -type f 2>/dev/null | wc -l")
        return [int(n) > 0 for n in found]

    def _on_nodes(self, script: str) -> list[str]:
        bed = self._stage.bed
        with ThreadPoolExecutor(len(bed.nodes)) as pool:
            done = pool.map(
                lambda n: bed.node_exec(n, ["sh", "-c", script], check=False), bed.nodes
            )
            return [d.stdout.strip() for d in done]

    def packets(self, node: str) -> tuple[int, int]:
        """(frames that came to a node, frames that the outside client sent), so far."""
        bed = self._stage.bed
        came = int(bed.node_exec(node, _eth0("rx_packets")).stdout)
        return came, int(bed.client_exec(_eth0("tx_packets")).stdout)

    def check_path(self, mode: Mode, address: str, port: int) -> None:
        """After connections to a frontend: netfilter tracked them, or did not, as the mode says."""
        listed = f"conntrack -L -p tcp -d {address} --dport {port} 2>/dev/null | grep -c {address}"
        tracked = self._on_nodes(listed)[0]
        counts = self._on_nodes("cat /proc/sys/net/netfilter/nf_conntrack_count")
        if mode.proxy and int(tracked or 0) == 0:
            raise NotInEffect(f"{mode.name}: no connection to {address} is in nf_conntrack")
        if not mode.proxy and int(tracked or 0) != 0:
            raise NotInEffect(f"{mode.name}: netfilter tracks connections to {address}")
        if mode == BARE and any(int(re.sub(r"\D", "", c) or 0) for c in counts):
            raise NotInEffect(f"bare: nf_conntrack_count is {counts}, not 0")


def _eth0(statistic: str) -> list[str]:
    return ["cat", f"/sys/class/net/eth0/statistics/{statistic}"]


def _true(item: dict[str, Any], generation: int) -> set[str]:
    """The conditions that are true and speak of the spec as it is now."""
    return {
        c["type"]
        for c in item.get("status", {}).get("conditions", [])
        if c["status"] == "True" and c.get("observedGeneration", 0) >= generation
    }


def _selector(value: str | None) -> dict[str, Any]:
    return {"spec": {"template": {"spec": {"nodeSelector": {"bench.example.com/proxy": value}}}}}


def _until(what: str, ready: Callable[[], object], timeout: float = 180) -> None:
    dataplane.wait_for(what, ready, timeout)

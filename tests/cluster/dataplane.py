# SPDX-License-Identifier: Apache-2.0
"""Install the dataplane on the testbed, wait for it, look at it. Shared by the demo and the tests."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cluster.testbed import Testbed, TestbedError

REPO = Path(__file__).resolve().parents[2]
CHART = REPO / "charts" / "bpf-dataplane"
ARCHIVE = REPO / "build" / "images" / "bpf-dataplane.tar"
RELEASE = "bpf-dataplane"
NAMESPACE = "bpf-dataplane"
CR = "bpfdataplanes/default"

T = TypeVar("T")


def wait_for(what: str, probe: Callable[[], T | None], timeout: float = 90.0) -> T:
    """The first true value of `probe`, asked every half second.

    Raises TimeoutError naming `what` and the last value seen.
    """
    deadline = time.monotonic() + timeout
    last: object = None
    while time.monotonic() < deadline:
        try:
            last = value = probe()
        except (TestbedError, KeyError, IndexError, ValueError) as error:
            last, value = error, None
        if value:
            return value
        time.sleep(0.5)
    raise TimeoutError(f"{what}: not within {timeout:.0f} s; last seen: {last}")


def get(bed: Testbed, *what: str) -> dict[str, Any]:
    """An object as kubectl prints it in JSON."""
    result: dict[str, Any] = json.loads(bed.kubectl("get", *what, "-o", "json"))
    return result


def conditions(bed: Testbed, what: str = CR) -> dict[str, dict[str, Any]]:
    """The conditions of an object by type; empty where there are none."""
    status = get(bed, what).get("status", {})
    return {c["type"]: c for c in status.get("conditions", [])}


def install(bed: Testbed, *values: str) -> None:
    """Load the image on every node and install the chart, or upgrade it."""
    bed.load_image(ARCHIVE)
    sets = [part for value in values for part in ("--set", value)]
    bed.helm(
        "upgrade", "--install", RELEASE, str(CHART), "--namespace", NAMESPACE,
        "--create-namespace", "--wait", "--timeout", "180s", *sets,
    )  # fmt: skip


def wait_available(bed: Testbed, timeout: float = 180.0) -> dict[str, dict[str, Any]]:
    """Wait until services run on the dataplane alone: available, settled, kube-proxy replaced."""

    def ready() -> dict[str, dict[str, Any]] | None:
        found = conditions(bed)
        wanted = {
            "Available": "True",
            "Progressing": "False",
            "Degraded": "False",
            "KubeProxyReplaced": "True",
        }
        done = all(found.get(t, {}).get("status") == s for t, s in wanted.items())
        return found if done and rules_on_all(bed) == 0 else None

    try:
        return wait_for("the dataplane to take over", ready, timeout)
    except TimeoutError as error:
        raise TimeoutError(f"{error}\n{bed.kubectl('get', CR, '-o', 'yaml')}") from None


def rules_on_all(bed: Testbed) -> int:
    """Number of kube-proxy's rules on all nodes."""
    return sum(kube_proxy_rules(bed, node.name) for node in bed.nodes)


def kube_proxy_rules(bed: Testbed, node: str) -> int:
    """Number of kube-proxy's rules on a node, whatever its mode: iptables and nftables."""
    script = (
        "for s in iptables-legacy-save iptables-nft-save ip6tables-legacy-save ip6tables-nft-save;"
        " do $s 2>/dev/null; done | grep -E '^-A' | grep -E 'KUBE-(SVC|SEP|SERVICES|NODEPORTS|FW|EXT"
        "|EXTERNAL|MARK|POSTROUTING|FORWARD|PROXY)' | wc -l;"
        " nft list ruleset 2>/dev/null | sed -n '/^table ip6* kube-proxy /,/^}/p' | wc -l"
    )
    return sum(int(n) for n in bed.node_exec(node, ["sh", "-c", script]).stdout.split())


def uninstall(bed: Testbed, timeout: int = 240) -> None:
    """`helm uninstall`, which brings kube-proxy back first."""
    bed.helm("uninstall", RELEASE, "--namespace", NAMESPACE, "--wait", "--timeout", f"{timeout}s")

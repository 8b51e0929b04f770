# SPDX-License-Identifier: Apache-2.0
"""What a packet costs, by PROG_TEST_RUN: `python tests/bench/packet.py`.

Against the floor of the same run, a bare LRU lookup and a per-CPU counter, measured alike. Rounds of all cases are
interleaved; medians are printed and written with their spread to build/results/bench-packet.json.
Before each run the packet's headers are put back, for new flows with another port; what that costs
alone is subtracted. `est` and `new`: an established flow's packet and a flow's first one, pod to
pod on one node; `_clusterip` through a service; `_remote` to another node; `_rule`: a policy with
one allow rule isolates the backend. The last figure is the family.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "nodeagent"), str(ROOT / "tests")]

from bpf.frames import ACK, Frame  # noqa: E402
from bpf.nodes import Netns, Node, compile_sources, compile_template  # noqa: E402
from bpfdp_agent import catalog, layouts  # noqa: E402
from bpfdp_agent.bpf import syscall  # noqa: E402
from bpfdp_agent.bpf.objects import Function, Source  # noqa: E402
from bpfdp_agent.bpf.syscall import ProgramType  # noqa: E402
from bpfdp_agent.dataplane import policyversion  # noqa: E402
from bpfdp_agent.dataplane.programs import set_slot  # noqa: E402
from bpfdp_agent.desired.identities import Identity  # noqa: E402
from bpfdp_agent.desired.policy import normal_rules, read_policy  # noqa: E402
from bpfdp_agent.desired.policyprogram import Membership, program_of  # noqa: E402
from bpfdp_agent.model.policies import Direction  # noqa: E402
from bpfdp_agent.watch import wire  # noqa: E402

ROUNDS = int(os.environ.get("ROUNDS", "15"))
REPEAT = int(os.environ.get("REPEAT", "100000"))
NEW_FLOWS = 20000
RESULT = ROOT / "build" / "results" / "bench-packet.json"
HERE = Path(__file__).parent
HEADERS = {4: 56, 6: 80}
PAYLOAD = bytes(64)
POD_X = 10  # its identity (see Node.configure)
RULE_SLOT = layouts.POLICY_SLOT_FIRST

MUST = {
    "est_over_floor": ("est", 3.0),
    "est_nat_over_floor": ("est_clusterip", 4.5),
    "new_over_floor": ("new_rule", 20.0),
    "new_clusterip_over_floor": ("new_clusterip", 28.0),
}
"""Published name → (its case, the most its worse family may be)."""

Measure = Callable[[], float]


class Restoring:
    """Runs a node's program on a packet again and again, as if it came for the first time."""

    def __init__(self, node: Node, functions: dict[str, Function]) -> None:
        self._node = node
        self._saved = syscall.map_create(layouts.MapType.ARRAY, 4, HEADERS[node.family], 1)
        self._measured = syscall.map_create(layouts.MapType.PROG_ARRAY, 4, 4, 1)
        ports = syscall.map_create(layouts.MapType.ARRAY, 4, 8, 1)
        maps = {"saved_headers": self._saved, "measured": self._measured, "next_port": ports}
        self._programs = {name: _load(function, maps) for name, function in functions.items()}

    def established(self, packet: Frame, program: int | None = None) -> tuple[Measure, Measure]:
        """(a packet of a known flow and restoring it, restoring alone), ns."""
        return (
            lambda: self._run("restore_and_run", packet, REPEAT, program),
            lambda: self._run("restore_only", packet, REPEAT),
        )

    def opening(self, packet: Frame) -> tuple[Measure, Measure]:
        """(a flow's first packet and making it, making alone), ns."""

        def run() -> float:
            spent = self._run("new_and_run", packet, NEW_FLOWS)
            known = self._node.maps["ct"].count()
            assert known >= NEW_FLOWS, f"only {known} of {NEW_FLOWS} flows were accepted"
            self._node.forget_flows()
            return spent

        return run, lambda: self._run("new_only", packet, NEW_FLOWS)

    def _run(self, program: str, packet: Frame, repeat: int, measured: int | None = None) -> float:
        frame = bytes(packet)
        context = bytearray(192)
        struct.pack_into("=I", context, 40, self._node.netns.ifindex["podx"])
        syscall.map_update(self._saved, bytes(4), frame[: HEADERS[self._node.family]])
        set_slot(self._measured, 0, measured or self._node.program("from_pod"))
        done = self._node.netns.run(
            lambda: syscall.prog_test_run(
                self._programs[program], frame, context=bytes(context), repeat=repeat
            )
        )
        return float(done.duration_ns)


def _load(function: Function, maps: dict[str, int]) -> int:
    return syscall.prog_load(ProgramType.SCHED_CLS, function.with_maps(maps), name=function.name)


def floor_program() -> int:
    """The floor: lookup and counter."""
    (functions,) = compile_sources([Source("floor", (HERE / "floor.c").read_text())])
    flows = syscall.map_create(layouts.MapType.LRU_HASH, 16, 88, 131072)
    counter = syscall.map_create(layouts.MapType.PERCPU_ARRAY, 4, 8, 1)
    syscall.map_update(flows, struct.pack("=4I", 1, 2, 3, 4), bytes(88))
    return _load(functions["floor_program"], {"floor_flows": flows, "floor_counter": counter})


def enforce_rule(node: Node) -> None:
    """An ingress policy in RULE_SLOT: from pods like pod_x to TCP 80 and 8080."""
    ports = (wire.NetworkPolicyPort(port=80), wire.NetworkPolicyPort(port=8080))
    client = wire.NetworkPolicyPeer(pod_selector=wire.LabelSelector(match_labels={"app": "x"}))
    rule = wire.NetworkPolicyIngressRule(from_=(client,), ports=ports)
    spec = wire.NetworkPolicySpec(ingress=(rule,))
    policy = wire.NetworkPolicy(
        metadata=wire.ObjectMeta(name="one-rule", namespace="bench"), spec=spec
    )
    program = program_of(normal_rules([read_policy(policy)], Direction.INGRESS, []))
    membership = Membership()
    membership.set_identity(POD_X, Identity("bench", (("app", "x"),), ()))
    peers = syscall.map_create(
        layouts.MapType.HASH, 4, program.spec.identity_value_size, 16, flags=layouts.NO_PREALLOC
    )
    for number, value in membership.values(program).items():
        syscall.map_update(peers, struct.pack("=I", number), value)
    functions = compile_template("policy.c.j2", node.family, spec=program.spec)
    maps = {name: each.descriptor for name, each in node.maps.items()}
    loaded = _load(functions[policyversion.FUNCTION], maps | {policyversion.PEERS: peers})
    set_slot(node.maps["policy"].descriptor, RULE_SLOT, loaded)


def cases(node: Node, family: int) -> dict[str, tuple[Measure, Measure]]:
    """Name → (cost, cost to subtract)."""
    port = 34 if family == 4 else 54
    text = f"#define HEADERS {HEADERS[family]}\n#define PORT {port}\n"
    (functions,) = compile_sources([Source("restore", text + (HERE / "restore.c").read_text())])
    restoring = Restoring(node, functions)
    cast = node.cast
    node.reset()
    node.configure("A")
    enforce_rule(node)
    node.pod(cast.pod_x, "podx")
    node.service([(cast.service, 80)], [(cast.pod_y, 8080, None)])
    flows = {
        "": Frame(cast.pod_x, cast.pod_y, payload=PAYLOAD),
        "_clusterip": Frame(cast.pod_x, cast.service, payload=PAYLOAD),
        "_remote": Frame(cast.pod_x, cast.pod_z, payload=PAYLOAD),
    }

    def isolate(slot: int) -> None:
        node.pod(cast.pod_y, "pody", ingress=slot)

    def known(first: Frame) -> tuple[Measure, Measure]:
        cost, subtract = restoring.established(first.but(flags=ACK))

        def run() -> float:
            isolate(layouts.POLICY_SLOT_ALLOW)
            node.from_pod(first, "podx")
            return cost()

        return run, subtract

    def opening(first: Frame, slot: int) -> tuple[Measure, Measure]:
        cost, subtract = restoring.opening(first)

        def run() -> float:
            isolate(slot)
            return cost()

        return run, subtract

    found = {"floor": restoring.established(flows[""], floor_program())} if family == 4 else {}
    for name, first in flows.items():
        found[f"est{name}{family}"] = known(first)
        found[f"new{name}{family}"] = opening(first, layouts.POLICY_SLOT_ALLOW)
    for name in ("", "_clusterip"):
        found[f"new{name}_rule{family}"] = opening(flows[name], RULE_SLOT)
    return found


def main() -> None:
    """Measure and print."""
    netns = Netns()
    (arrive,) = compile_sources(
        [Source("arrive", (ROOT / "tests" / "bpf" / "arrive.c").read_text())]
    )
    measures: dict[str, tuple[Measure, Measure]] = {}
    for family in layouts.FAMILIES:
        node = Node(family, netns, compile_template(catalog.DATAPATH, family), arrive, size=131072)
        measures |= cases(node, family)
    samples: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(ROUNDS):
        for name, (cost, subtract) in measures.items():
            samples[name].append(cost() - subtract())
    report(samples)
    netns.close()


def report(samples: dict[str, list[float]]) -> None:
    """Table on stdout; the published figures and every case's in the JSON."""
    ratios = {}
    for name, values in samples.items():
        # each round over the floor of the same round: what slows the machine slows both
        rounds = [value / least for value, least in zip(values, samples["floor"], strict=True)]
        ratios[name] = statistics.median(rounds)
        print(
            f"{name:22} {statistics.median(values):8.1f} ns  "
            f"({min(values):.0f} to {max(values):.0f})  {ratios[name]:.2f} x floor"
        )
    results = published(samples, ratios)
    for each in results:
        if "must" in each:
            print(f"{each['name']:26} {each['value']:6.2f}  must be {each['must']}")
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written: {RESULT.relative_to(ROOT)}")


def published(samples: dict[str, list[float]], ratios: dict[str, float]) -> list[dict[str, Any]]:
    """The four measures, each the worse family's, then every case alone."""
    conditions = {
        "kernel": platform.release(),
        "rounds": ROUNDS,
        "repeat": REPEAT,
        "new_flows": NEW_FLOWS,
        "floor_ns": statistics.median(samples["floor"]),
    }
    results: list[dict[str, Any]] = [
        {
            "name": name,
            "value": max(ratios[f"{case}{family}"] for family in layouts.FAMILIES),
            "unit": "x floor",
            "must": f"<= {most:g}",
            "conditions": conditions,
        }
        for name, (case, most) in MUST.items()
    ]
    for name, values in samples.items():
        spread = {
            "median_ns": statistics.median(values),
            "min_ns": min(values),
            "max_ns": max(values),
        }
        results.append(
            {
                "name": f"{name}_over_floor",
                "value": ratios[name],
                "unit": "x floor",
                "conditions": conditions | spread,
            }
        )
    return results


if __name__ == "__main__":
    main()

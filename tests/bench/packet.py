# SPDX-License-Identifier: Apache-2.0
"""What a packet costs, by PROG_TEST_RUN: `python tests/bench/packet.py`.

Against the floor of the same run, a bare LRU lookup and a per-CPU counter, measured alike. Rounds of all cases are
interleaved; medians are printed and written with their spread to build/results/bench-packet.json.
Before each run the packet's headers are put back, for new flows with another port; what that costs
alone is subtracted. `est` and `new`: an established flow's packet and a flow's first one, pod to
pod on one node; `_nat` through a ClusterIP; `_remote` to another node. The figure is the family.
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

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "nodeagent"), str(ROOT / "tests")]

from bpf.frames import ACK, Frame  # noqa: E402
from bpf.nodes import Netns, Node, compile_sources, compile_template  # noqa: E402
from bpfdp_agent import catalog, layouts  # noqa: E402
from bpfdp_agent.bpf import syscall  # noqa: E402
from bpfdp_agent.bpf.objects import Function, Source  # noqa: E402
from bpfdp_agent.bpf.syscall import ProgramType  # noqa: E402
from bpfdp_agent.dataplane.programs import set_slot  # noqa: E402

ROUNDS = int(os.environ.get("ROUNDS", "15"))
REPEAT = int(os.environ.get("REPEAT", "100000"))
NEW_FLOWS = 20000
RESULT = ROOT / "build" / "results" / "bench-packet.json"
HERE = Path(__file__).parent
HEADERS = {4: 56, 6: 80}
PAYLOAD = bytes(64)

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


def cases(node: Node, family: int) -> dict[str, tuple[Measure, Measure]]:
    """Name → (cost, cost to subtract)."""
    port = 34 if family == 4 else 54
    text = f"#define HEADERS {HEADERS[family]}\n#define PORT {port}\n"
    (functions,) = compile_sources([Source("restore", text + (HERE / "restore.c").read_text())])
    restoring = Restoring(node, functions)
    cast = node.cast
    node.reset()
    node.configure("A")
    node.pod(cast.pod_x, "podx")
    node.pod(cast.pod_y, "pody")
    node.service([(cast.service, 80)], [(cast.pod_y, 8080, None)])
    flows = {
        "": Frame(cast.pod_x, cast.pod_y, payload=PAYLOAD),
        "_nat": Frame(cast.pod_x, cast.service, payload=PAYLOAD),
        "_remote": Frame(cast.pod_x, cast.pod_z, payload=PAYLOAD),
    }

    def known(first: Frame) -> tuple[Measure, Measure]:
        cost, subtract = restoring.established(first.but(flags=ACK))

        def run() -> float:
            node.from_pod(first, "podx")
            return cost()

        return run, subtract

    floor = {"floor": restoring.established(flows[""], floor_program())} if family == 4 else {}
    return (
        floor
        | {f"est{name}{family}": known(first) for name, first in flows.items()}
        | {f"new{name}{family}": restoring.opening(first) for name, first in flows.items()}
    )


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
    """Table on stdout, everything in the JSON."""
    floor = statistics.median(samples["floor"])
    rows = {
        name: {
            "median_ns": statistics.median(values),
            "min_ns": min(values),
            "max_ns": max(values),
            "over_floor": statistics.median(values) / floor,
        }
        for name, values in samples.items()
    }
    for name, row in rows.items():
        print(
            f"{name:22} {row['median_ns']:8.1f} ns  "
            f"({row['min_ns']:.0f} to {row['max_ns']:.0f})  {row['over_floor']:.2f} x floor"
        )
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    conditions = {"kernel": platform.release(), "rounds": ROUNDS, "repeat": REPEAT}
    RESULT.write_text(json.dumps({"conditions": conditions, "results": rows}, indent=2) + "\n")
    print(f"written: {RESULT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""What a packet costs: the lines of `make bench-packet`, by the issue's names."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from versus.report import RESULTS, ROOT, Report, say

CASES = {
    "est_over_floor": "est",
    "est_nat_over_floor": "est_clusterip",
    "new_over_floor": "new_rule",
    "new_clusterip_over_floor": "new_clusterip",
}
"""Measure → the case whose families' figures are its samples."""


def run(report: Report, quick: bool) -> None:
    """Run it and take its figures over: the dearer of the two families counts."""
    say("packets by PROG_TEST_RUN (bench-packet)")
    env = {**os.environ, **({"ROUNDS": "3", "REPEAT": "20000"} if quick else {})}
    done = subprocess.run(
        [sys.executable, "tests/bench/packet.py"],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    if done.returncode:
        report.failed("packet", RuntimeError(done.stderr))
        return
    lines = json.loads((RESULTS / "bench-packet.json").read_text())
    values = {line["name"]: line["value"] for line in lines}
    for name, case in CASES.items():
        families = [values[f"{case}{family}_over_floor"] for family in (4, 6)]
        report.figure(name, values[name], "ratio", "the dearer of IPv4 and IPv6", families)

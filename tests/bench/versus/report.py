# SPDX-License-Identifier: Apache-2.0
"""What was measured: samples of every round, the issue's figures, JSON and SVG plots."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "build" / "results"
console = Console(highlight=False, width=140)
STARTED = time.monotonic()

MUST = {
    "connect_flat": ("<=", 1.05), "connect_vs_bare": ("<=", 1.0),
    "connect_vs_bare_ctlb": ("<=", 0.95), "connect_vs_nft": ("<=", 0.8),
    "connect_vs_ipt": ("<=", 0.3), "crr_vs_ipt": (">=", 1.2),
    "endpoint_change_p99_ms": ("<=", 100), "churn_cpu_vs_ipt": ("<=", 0.1),
    "churn_cpu_vs_nft": ("<=", 0.5), "cold_start_s": ("<=", 5), "agent_pss_mib": ("<=", 150),
    "maps_mib": ("<=", 120), "dsr_vs_tunnel": ("<=", 0.9), "dsr_vs_ipt": ("<=", 0.8),
    "gbps_1440": (">=", 1.4), "cpu_per_gbit_1440": ("<=", 0.7),
    "gbps_8940": (">=", 1.15), "cpu_per_gbit_8940": ("<=", 0.85),
    "gbps_1440_offload": (">=", 0.97), "cpu_per_gbit_1440_offload": ("<=", 1.03),
    "gbps_8940_offload": (">=", 0.97), "cpu_per_gbit_8940_offload": ("<=", 1.03),
    "est_over_floor": ("<=", 3), "est_nat_over_floor": ("<=", 4.5),
    "new_over_floor": ("<=", 20), "new_clusterip_over_floor": ("<=", 28),
}  # fmt: skip
"""The issue's measures and what each must reach."""


def say(text: str) -> None:
    """A line of progress with the time since the start."""
    console.print(f"[dim]{time.monotonic() - STARTED:5.0f} s[/]  {text}")


@dataclass
class Report:
    """Samples by series (one a round), and figures by the issue's names."""

    conditions: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, dict[str, Any]] = field(default_factory=dict)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)

    def sample(self, series: str, value: float, unit: str) -> None:
        """One round's value of a series."""
        self.samples.setdefault(series, {"unit": unit, "values": []})["values"].append(value)
        say(f"{series}: {value:.3g} {unit}")

    def median(self, series: str) -> float:
        """The median over the rounds."""
        return statistics.median(self.samples[series]["values"])

    def ratio(self, name: str, above: str, below: str, conditions: str) -> None:
        """A figure: median of a series over another's, with the spread of the rounds' ratios."""
        one, other = self.samples[above]["values"], self.samples[below]["values"]
        rounds = [a / b for a, b in zip(one, other, strict=False) if b]
        base = self.median(below)
        if base <= 0:
            say(f"[red]{name}: {below} is {base}: nothing to compare with[/]")
            return
        self.figure(name, self.median(above) / base, "ratio", conditions, rounds)

    def figure(
        self, name: str, value: float, unit: str, conditions: str, spread: list[float] | None = None
    ) -> None:
        """One of the issue's measures."""
        kind, limit = MUST[name]
        self.figures[name] = {
            "name": name,
            "value": round(value, 4),
            "unit": unit,
            "must": f"{kind} {limit}",
            "reached": value <= limit if kind == "<=" else value >= limit,
            "spread": [round(min(spread), 4), round(max(spread), 4)] if spread else None,
            "conditions": conditions,
        }
        say(f"[bold]{name} = {value:.3f}[/] {unit} (must be {kind} {limit})")

    def failed(self, part: str, error: Exception) -> None:
        """A part that gave no figures: told at once and in the conditions."""
        self.conditions.setdefault("failed", {})[part] = str(error)[-1500:]
        say(f"[bold red]{part} failed:[/] {type(error).__name__}: {escape(str(error)[-1500:])}")

    def write(self) -> None:
        """Table on stdout, JSON and plots below build/results/."""
        RESULTS.mkdir(parents=True, exist_ok=True)
        self.conditions |= machine() | {"took_s": round(time.monotonic() - STARTED)}
        figures = list(self.figures.values())
        (RESULTS / "bench-services.json").write_text(json.dumps(figures, indent=2) + "\n")
        everything = {"conditions": self.conditions, "samples": self.samples}
        (RESULTS / "bench-services-samples.json").write_text(
            json.dumps(everything, indent=2) + "\n"
        )
        self._plots()
        table = Table("measure", "value", "unit", "must be", "rounds", "", "conditions")
        for f in figures:
            spread = "{} to {}".format(*f["spread"]) if f["spread"] else ""
            good = "[green]yes" if f["reached"] else "[red]NO"
            table.add_row(
                f["name"], f"{f['value']:.3f}", f["unit"], f["must"], spread, good, f["conditions"]
            )
        console.print(table)
        console.print("Conditions: " + json.dumps(self.conditions), markup=False)
        console.print(f"Written: {RESULTS.relative_to(ROOT)}/bench-services*.json, *.svg")
        console.print(f"Took {time.monotonic() - STARTED:.0f} s.")

    def _plots(self) -> None:
        """A bar chart per unit: the median, and a line from the least to the greatest round."""
        units: dict[str, dict[str, list[float]]] = {}
        for name, series in self.samples.items():
            units.setdefault(series["unit"], {})[name] = series["values"]
        for unit, rows in units.items():
            file = "bench-services-" + unit.replace("/", "-per-").replace(" ", "-") + ".svg"
            (RESULTS / file).write_text(bars(unit, rows))


def machine() -> dict[str, Any]:
    """Where this ran."""
    return {"kernel": platform.release(), "cpus": os.cpu_count(), "load": os.getloadavg()}


def bars(unit: str, rows: dict[str, list[float]]) -> str:
    """Horizontal bars as SVG."""
    step, left, width = 24, 260, 520
    most = max(max(values) for values in rows.values()) or 1.0
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="{step * (len(rows) + 2)}"'
        ' font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="16" font-weight="bold">{unit}: median, least and greatest round</text>',
    ]
    for number, (name, values) in enumerate(rows.items(), 1):
        y = step * number + 8
        median = statistics.median(values)
        low, mid, high = (
            left + max(0.0, v) / most * width for v in (min(values), median, max(values))
        )
        colour = "#2b7bba" if name.startswith("ours") else "#b0b0b0"
        lines += [
            f'<text x="10" y="{y + 12}">{name}</text>',
            f'<rect x="{left}" y="{y}" width="{mid - left:.1f}" height="16" fill="{colour}"/>',
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y + 8}" y2="{y + 8}" stroke="black"/>',
            f'<text x="{high + 6:.1f}" y="{y + 12}">{median:.4g}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"

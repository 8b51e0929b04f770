# SPDX-License-Identifier: Apache-2.0
"""Helm, from PATH or from the testbed's cache."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).resolve().parents[3]
CHART = REPO / "charts" / "bpf-dataplane"
BIN = Path(os.environ.get("TESTBED_CACHE", "/var/cache/bpfdp-testbed")) / "bin"
KUBERNETES = "1.36.0"


@dataclass(frozen=True)
class Helm:
    """Runs helm on our chart."""

    program: str

    def run(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.program, command, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def template(
        self, *sets: str, namespace: str = "bpf-dataplane"
    ) -> subprocess.CompletedProcess[str]:
        flags = [flag for value in sets for flag in ("--set-json", value)]
        return self.run(
            "template",
            "bpf-dataplane",
            str(CHART),
            "-n",
            namespace,
            "--kube-version",
            KUBERNETES,
            *flags,
        )

    def objects(self, *sets: str, namespace: str = "bpf-dataplane") -> list[dict[str, Any]]:
        """Every rendered object, hooks included; fails when rendering does."""
        result = self.template(*sets, namespace=namespace)
        assert result.returncode == 0, result.stderr
        return [document for document in yaml.safe_load_all(result.stdout) if document]


@pytest.fixture(scope="session")
def helm() -> Helm:
    program = shutil.which("helm", path=f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        say = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        say(f"helm is neither in {BIN} nor on PATH: run `make tools`")
    return Helm(program)

# SPDX-License-Identifier: Apache-2.0
"""docs/conditions.md tells of every reason and state, and of none that does not exist."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from bpfdp_operator.reasons import Reason
from bpfdp_operator.world import AgentsMode, KubeProxyState

REPOSITORY = Path(__file__).parents[3]
DOCUMENT = (REPOSITORY / "docs/conditions.md").read_text()


def table(heading: str) -> list[list[str]]:
    """Rows of the first table after a heading, without its head."""
    lines = DOCUMENT.split(f"## {heading}\n", 1)[1].split("\n## ")[0].splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    return rows[2:]


def test_every_reason_has_a_meaning_and_a_remedy() -> None:
    rows = table("Reasons")
    assert sorted(row[0] for row in rows) == sorted(Reason)
    assert all(len(row) == 3 and all(row) for row in rows)


def test_every_state_of_kube_proxy_is_explained() -> None:
    assert [row[0] for row in table("kube-proxy's state")] == list(KubeProxyState)


@pytest.fixture(scope="module")
def status_schema() -> dict:
    crd = yaml.safe_load((REPOSITORY / "crds/bpfdataplanes.yaml").read_text())
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema["properties"]["status"]["properties"]


def test_the_crd_knows_every_state_and_mode(status_schema: dict) -> None:
    state = status_schema["kubeProxy"]["properties"]["state"]["enum"]
    mode = status_schema["agents"]["properties"]["mode"]["enum"]
    assert set(state) == set(KubeProxyState)
    assert set(mode) == set(AgentsMode)


def test_agents_use_the_same_reasons() -> None:
    nodestatus = pytest.importorskip("bpfdp_agent.serve.nodestatus")
    assert set(nodestatus.Reason.__args__) <= set(Reason)

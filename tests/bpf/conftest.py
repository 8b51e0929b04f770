# SPDX-License-Identifier: Apache-2.0
"""Programs are compiled and loaded once; every test gets two nodes with empty maps.

Two nodes in two families are about 45 programs: far below what Linux 6.18 minds to free at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from bpf.nodes import CAST, Addresses, Netns, Node, compile_sources, compile_template
from bpfdp_agent import catalog
from bpfdp_agent.bpf.objects import Function, Source


@pytest.fixture(scope="session", autouse=True)
def _root() -> None:
    if os.geteuid() == 0:
        return
    if os.environ.get("CI") == "true":
        pytest.fail("tests/bpf load BPF programs: run them as root")
    pytest.skip("NOT RUN: tests/bpf load BPF programs: run them as root")


@pytest.fixture(scope="session")
def netns() -> Iterator[Netns]:
    made = Netns()
    yield made
    made.close()


@pytest.fixture(scope="session")
def arrive() -> dict[str, Function]:
    text = (Path(__file__).parent / "arrive.c").read_text()
    return compile_sources([Source("arrive", text)])[0]


@pytest.fixture(scope="session", params=[4, 6], ids=["ipv4", "ipv6"])
def family(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="session")
def loaded(family: int, netns: Netns, arrive: dict[str, Function]) -> Iterator[tuple[Node, Node]]:
    functions = compile_template(catalog.DATAPATH, family)
    both = Node(family, netns, functions, arrive), Node(family, netns, functions, arrive)
    yield both
    for node in both:
        node.close()


@pytest.fixture
def cast(family: int) -> Addresses:
    return CAST[family]


@pytest.fixture
def a(loaded: tuple[Node, Node], cast: Addresses) -> Node:
    """Node A with pods X and Y."""
    node = loaded[0]
    node.reset()
    node.configure("A")
    node.pod(cast.pod_x, "podx")
    node.pod(cast.pod_y, "pody")
    return node


@pytest.fixture
def b(loaded: tuple[Node, Node], cast: Addresses) -> Node:
    """Node B with pod Z."""
    node = loaded[1]
    node.reset()
    node.configure("B")
    node.pod(cast.pod_z, "podx")
    return node

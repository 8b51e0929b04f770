# SPDX-License-Identifier: Apache-2.0
"""The header tree for BCC."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MAKE_TREE = Path(__file__).resolve().parents[3] / "bpf_templates" / "kbuild" / "make_tree.py"


def make_tree(output: Path, headers: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(MAKE_TREE),
        str(output),
        "--headers",
        str(headers),
        "--machine",
        "aarch64",
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture
def headers(tmp_path: Path) -> Path:
    """A tiny linux-libc-dev that has every root, one reached header and one arch header."""
    folder = tmp_path / "headers"
    roots = [
        line.strip().strip('",')
        for line in MAKE_TREE.read_text().split("ROOTS = (")[1].split(")")[0].splitlines()
        if line.strip()
    ]
    for root in roots:
        base = folder / "aarch64-linux-gnu" if root.startswith("asm/") else folder
        (base / root).parent.mkdir(parents=True, exist_ok=True)
        (base / root).write_text("/* empty */\n")
    (folder / "linux/ip.h").write_text("#include <linux/reached.h>\n#include <sys/socket.h>\n")
    (folder / "linux/reached.h").write_text("#define REACHED 1\n")
    (folder / "linux/unused.h").write_text("#define UNUSED 1\n")
    return folder


def test_the_tree_holds_what_is_reached_and_nothing_else(tmp_path: Path, headers: Path) -> None:
    tree = tmp_path / "tree"
    result = make_tree(tree, headers)
    assert result.returncode == 0, result.stderr
    assert (tree / "include/uapi/linux/reached.h").is_file()
    assert not (tree / "include/uapi/linux/unused.h").exists()
    assert (tree / "arch/arm64/include/uapi/asm/types.h").is_file()
    assert (tree / "include/linux/kconfig.h").is_file(), "BCC looks for it"


def test_bccs_own_bpf_h_is_the_only_one(tmp_path: Path, headers: Path) -> None:
    (headers / "linux/ip.h").write_text("#include <linux/bpf.h>\n")
    (headers / "linux/bpf.h").write_text("struct bpf_insn {};\n")
    make_tree(tmp_path / "tree", headers)
    assert "bpf_insn" not in (tmp_path / "tree/include/uapi/linux/bpf.h").read_text()


def test_missing_headers_are_named_with_the_package(tmp_path: Path) -> None:
    result = make_tree(tmp_path / "tree", tmp_path)
    assert result.returncode == 1
    assert "install linux-libc-dev" in result.stderr

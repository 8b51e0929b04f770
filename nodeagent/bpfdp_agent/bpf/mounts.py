# SPDX-License-Identifier: Apache-2.0
"""Where the node's cgroup2 hierarchy and bpffs are mounted."""

from __future__ import annotations

from pathlib import Path

MOUNTS = Path("/proc/self/mounts")
BPFFS = Path("/sys/fs/bpf")


def cgroup2_root(mounts: str | None = None) -> Path | None:
    """Mount point of the cgroup2 hierarchy (/sys/fs/cgroup, or .../unified beside cgroup v1)."""
    return next((Path(point) for point, kind in _mounts(mounts) if kind == "cgroup2"), None)


def is_bpffs(path: Path, mounts: str | None = None) -> bool:
    """Whether the path is inside a mounted bpffs: the innermost mount above it decides."""
    kind = ""
    depth = -1
    for point, mounted in _mounts(mounts):
        parts = len(Path(point).parts)
        if path.is_relative_to(point) and parts >= depth:
            kind, depth = mounted, parts
    return kind == "bpf"


def _mounts(text: str | None) -> list[tuple[str, str]]:
    """(mount point, type) of each mount, in mount order."""
    lines = (MOUNTS.read_text() if text is None else text).splitlines()
    fields = [line.split() for line in lines]
    return [(f[1].replace("\\040", " "), f[2]) for f in fields if len(f) >= 3]

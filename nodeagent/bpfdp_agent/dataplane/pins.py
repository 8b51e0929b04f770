# SPDX-License-Identifier: Apache-2.0
"""Where our pins are: <bpffs>/bpfdp/{maps,programs,links,policy}/."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bpfdp_agent.bpf import mounts, syscall

if TYPE_CHECKING:
    from pathlib import Path

FOLDER = "bpfdp"


@dataclass(frozen=True, slots=True)
class Pins:
    """The folders of our pins under one bpffs. A pin's name may not contain a dot."""

    bpffs: Path = mounts.BPFFS

    @property
    def root(self) -> Path:
        """The folder that holds everything of ours."""
        return self.bpffs / FOLDER

    @property
    def maps(self) -> Path:
        """Maps, `<name><family>_v<layout version>`."""
        return self.root / "maps"

    @property
    def programs(self) -> Path:
        """Programs of the hooks."""
        return self.root / "programs"

    @property
    def links(self) -> Path:
        """tcx and cgroup links."""
        return self.root / "links"

    @property
    def policy(self) -> Path:
        """Policy programs with their maps, one folder per program version."""
        return self.root / "policy"

    def make(self) -> None:
        """Make the folders (a bpffs must be mounted)."""
        for folder in (self.maps, self.programs, self.links, self.policy):
            folder.mkdir(parents=True, exist_ok=True)


def replace_pin(descriptor: int, path: Path) -> None:
    """Pin at the path, taking the place of what is pinned there in one step."""
    temporary = path.with_name(f"{path.name}_new")
    temporary.unlink(missing_ok=True)
    syscall.obj_pin(descriptor, temporary)
    temporary.replace(path)


def listing(folder: Path) -> list[Path]:
    """Pins in a folder, sorted; none when it is missing."""
    return sorted(folder.iterdir()) if folder.is_dir() else []

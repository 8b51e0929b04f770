# SPDX-License-Identifier: Apache-2.0
"""Finding cgroup2 and bpffs in /proc/self/mounts."""

from __future__ import annotations

from pathlib import Path

from bpfdp_agent.bpf.mounts import cgroup2_root, is_bpffs

HYBRID = """\
sysfs /sys sysfs rw 0 0
tmpfs /sys/fs/cgroup tmpfs rw 0 0
cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0
"""


def test_cgroup2_beside_and_instead_of_version_1():
    assert cgroup2_root(HYBRID) == Path("/sys/fs/cgroup/unified")
    assert cgroup2_root("cgroup2 /sys/fs/cgroup cgroup2 ro 0 0\n") == Path("/sys/fs/cgroup")
    assert cgroup2_root("sysfs /sys sysfs rw 0 0\n") is None


def test_the_innermost_and_latest_mount_decides():
    path = Path("/sys/fs/bpf")
    assert not is_bpffs(path, HYBRID)
    assert is_bpffs(path, HYBRID + "bpf /sys/fs/bpf bpf rw 0 0\n")
    assert not is_bpffs(path, "bpf /sys/fs/bpf bpf rw 0 0\ntmpfs /sys/fs/bpf tmpfs rw 0 0\n")
    assert not is_bpffs(path, "bpf /sys/fs/bpf/inside bpf rw 0 0\n")

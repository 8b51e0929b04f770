#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make the header tree that BCC compiles our programs against.

BCC wants the build tree of the running kernel: a "kernel source" with include/, include/uapi/ and
arch/<arch>/include/. Our programs touch nothing but UAPI (tc, cgroup and their helpers), so the
user-space headers of Debian's linux-libc-dev are enough: this script copies the few that are
reached from `ROOTS` and adds the shims beside it. Nodes then need no kernel headers.

Usage: make_tree.py OUTPUT_DIR [--headers /usr/include]
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import sys
from pathlib import Path

SHIM = Path(__file__).resolve().parent / "shim"

# What templates may include as <uapi/linux/NAME> or <linux/NAME>, and what BCC itself includes.
ROOTS = (
    "linux/bpf_common.h",
    "linux/icmp.h",
    "linux/icmpv6.h",
    "linux/if_ether.h",
    "linux/if_packet.h",
    "linux/if_vlan.h",
    "linux/in.h",
    "linux/in6.h",
    "linux/ip.h",
    "linux/ipv6.h",
    "linux/pkt_cls.h",
    "linux/ptrace.h",
    "linux/sctp.h",
    "linux/stddef.h",
    "linux/tcp.h",
    "linux/types.h",
    "linux/udp.h",
    "linux/version.h",
    "asm/byteorder.h",
    "asm/ptrace.h",
    "asm/types.h",
)
# Not ours to copy: libc's, or given by a shim.
IGNORED = frozenset({"sys/socket.h", "linux/bpf.h"})
# The kernel's name of an architecture, where it differs from `uname -m` (BCC asks for it by name).
KERNEL_ARCH = {"x86_64": "x86", "aarch64": "arm64", "ppc64le": "powerpc", "s390x": "s390"}
INCLUDE = re.compile(r"^\s*#\s*include\s*<([^>]+)>", re.MULTILINE)


def find_header(name: str, headers: Path, machine: str) -> Path | None:
    """Return where linux-libc-dev keeps the header `name`: plain, or in the multiarch folder."""
    for base in (headers, headers / f"{machine}-linux-gnu"):
        if (path := base / name).is_file():
            return path
    return None


def closure(headers: Path, machine: str) -> dict[str, Path]:
    """Return every header reached from `ROOTS` by name.

    Raises FileNotFoundError for a root that linux-libc-dev does not have.
    """
    found: dict[str, Path] = {}
    pending = list(ROOTS)
    while pending:
        name = pending.pop()
        if name in found or name in IGNORED:
            continue
        path = find_header(name, headers, machine)
        if path is None:
            if name in ROOTS:
                raise FileNotFoundError(
                    f"{name} is not under {headers}: install linux-libc-dev (apt-get install "
                    "linux-libc-dev), or name the folder that has it with --headers"
                )
            continue
        found[name] = path
        pending += INCLUDE.findall(path.read_text(errors="replace"))
    return found


def make_tree(output: Path, headers: Path, machine: str) -> int:
    """Write the tree for one architecture and return the number of headers copied."""
    arch = output / "arch" / KERNEL_ARCH.get(machine, machine) / "include"
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(SHIM / "include", output / "include")
    shutil.copytree(SHIM / "arch" / "include", arch)
    found = closure(headers, machine)
    for name, path in found.items():
        base = arch / "uapi" if name.startswith("asm/") else output / "include" / "uapi"
        target = base / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return len(found)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--headers", type=Path, default=Path("/usr/include"))
    parser.add_argument("--machine", default=platform.machine())
    arguments = parser.parse_args()
    try:
        count = make_tree(arguments.output, arguments.headers, arguments.machine)
    except FileNotFoundError as error:
        sys.stderr.write(f"make_tree: {error}\n")
        return 1
    sys.stdout.write(f"{arguments.output}: {count} UAPI headers of linux-libc-dev\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

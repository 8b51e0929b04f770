# SPDX-License-Identifier: Apache-2.0
"""What this node's kernel has, found by doing it: loading, creating, attaching.

`probe()` → a Feature for each of FEATURES, in order. Blocking (a tenth of a second): call it with
asyncio.to_thread. $BPFDP_FAKE_MISSING_FEATURES (comma-separated names) makes features missing,
for tests of what happens then.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyroute2

from bpfdp_agent.bpf import instructions as asm
from bpfdp_agent.bpf import mounts, syscall
from bpfdp_agent.bpf.errors import BpfError
from bpfdp_agent.bpf.netns import in_new_netns
from bpfdp_agent.bpf.syscall import AttachType, ProgramType
from bpfdp_agent.layouts import NO_PREALLOC, MapType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FAKE_MISSING = "BPFDP_FAKE_MISSING_FEATURES"
PRIVILEGE_REMEDY = "run as root (or with CAP_BPF, CAP_NET_ADMIN)"

_TC_NEXT = -1
_CGROUP_ALLOW = 1
_LOOPBACK = 1


class Missing(Exception):
    """A probe's own words for what is missing."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One probed feature; `message` says what to do when it is not supported, else is empty.

    `denied`: we lack the privilege to try it, which says nothing of the kernel.
    """

    name: str
    required: bool
    supported: bool
    message: str = ""
    denied: bool = False


@dataclass(frozen=True, slots=True)
class Probe:
    """`attempt` raises when the feature is missing; `remedy` tells the node's owner what to do."""

    name: str
    required: bool
    remedy: str
    attempt: Callable[[], None]


def probe(missing: frozenset[str] | None = None) -> tuple[Feature, ...]:
    """Probe every feature; `missing` names features to report as absent without trying."""
    if missing is None:
        missing = frozenset(filter(None, os.environ.get(FAKE_MISSING, "").split(",")))
    return tuple(_try(each, missing) for each in FEATURES)


def missing_required(features: tuple[Feature, ...]) -> tuple[Feature, ...]:
    """Those a node cannot do without. One of tcx and clsact is enough."""
    absent = [f for f in features if f.required and not f.supported]
    attach = [f for f in features if f.name in ATTACH_FEATURES]
    if attach and not any(f.supported for f in attach):
        absent += attach
    return tuple(absent)


def _try(each: Probe, missing: frozenset[str]) -> Feature:
    if each.name in missing:
        return Feature(each.name, each.required, supported=False, message="made missing for a test")
    try:
        each.attempt()
    except (Missing, BpfError, OSError, pyroute2.NetlinkError) as error:
        denied = _is_denial(error)
        message = f"{error}; {PRIVILEGE_REMEDY if denied else each.remedy}"
        return Feature(each.name, each.required, supported=False, message=message, denied=denied)
    return Feature(each.name, each.required, supported=True)


def _is_denial(error: Exception) -> bool:
    """Whether it is for want of privilege. EACCES of bpf(2) is the verifier's verdict."""
    if isinstance(error, pyroute2.NetlinkError):
        return bool(error.code == errno.EPERM)
    return isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EPERM


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _loads(code: bytes, program_type: ProgramType, attach_type: AttachType) -> None:
    os.close(syscall.prog_load(program_type, code, attach_type=attach_type, name="probe"))


def _tc(code: bytes) -> Callable[[], None]:
    return lambda: _loads(code, ProgramType.SCHED_CLS, AttachType.NONE)


def _tc_helper(helper: asm.Helper, arguments: bytes) -> Callable[[], None]:
    return _tc(arguments + asm.call(helper) + asm.returning(_TC_NEXT))


def _map(map_type: MapType, key_size: int, value_size: int, flags: int = 0) -> Callable[[], None]:
    return lambda: os.close(syscall.map_create(map_type, key_size, value_size, 4, flags=flags))


def _cgroup_root() -> Path:
    root = mounts.cgroup2_root()
    if root is None:
        raise Missing("no cgroup2 hierarchy is mounted")
    return root


def _cgroup2() -> None:
    _cgroup_root()


def _sock_addr(attach_type: AttachType) -> Callable[[], None]:
    def attempt() -> None:
        code = asm.returning(_CGROUP_ALLOW)
        program = syscall.prog_load(
            ProgramType.CGROUP_SOCK_ADDR, code, attach_type=attach_type, name="probe"
        )
        with _closing(program), _closing(os.open(_cgroup_root(), os.O_RDONLY)) as cgroup:
            os.close(syscall.link_create(program, cgroup, attach_type))

    return attempt


def _sock_addr_helper(helper: asm.Helper, arguments: bytes = b"") -> Callable[[], None]:
    code = arguments + asm.call(helper) + asm.returning(_CGROUP_ALLOW)

    def attempt() -> None:
        for attach_type in (AttachType.CGROUP_INET4_CONNECT, AttachType.CGROUP_INET6_CONNECT):
            _loads(code, ProgramType.CGROUP_SOCK_ADDR, attach_type)

    return attempt


def _bpffs() -> None:
    if not mounts.is_bpffs(mounts.BPFFS):
        raise Missing(f"no bpffs is mounted on {mounts.BPFFS}")


def _map_batch() -> None:
    with _closing(syscall.map_create(MapType.HASH, 4, 4, 8)) as fd:
        info = syscall.map_info(fd)
        list(syscall.map_lookup_batches(fd, info))


def _vxlan_external() -> None:
    def create() -> None:
        with pyroute2.IPRoute() as netlink:
            netlink.link(
                "add", ifname="probe", kind="vxlan", vxlan_collect_metadata=True, vxlan_port=4789
            )

    in_new_netns(create)


def _tcx() -> None:
    def attach() -> None:
        program = syscall.prog_load(ProgramType.SCHED_CLS, asm.returning(_TC_NEXT), name="probe")
        with _closing(program):
            os.close(syscall.link_create(program, _LOOPBACK, AttachType.TCX_INGRESS))

    in_new_netns(attach)


def _clsact() -> None:
    def attach() -> None:
        program = syscall.prog_load(ProgramType.SCHED_CLS, asm.returning(_TC_NEXT), name="probe")
        with _closing(program), pyroute2.IPRoute() as netlink:
            netlink.tc("add", "clsact", _LOOPBACK)
            netlink.tc(
                "add-filter",
                "bpf",
                _LOOPBACK,
                ":1",
                fd=program,
                name="probe",
                parent="ffff:fff2",
                prio=1,
                direct_action=True,
            )

    in_new_netns(attach)


_HELPER_REMEDY = "use a kernel of 5.10 or newer with CONFIG_BPF_SYSCALL and CONFIG_NET_CLS_BPF"
_CGROUP_REMEDY = "use a kernel with CONFIG_CGROUP_BPF and mount cgroup2 on /sys/fs/cgroup"
ATTACH_FEATURES = ("tcx", "clsact")

FEATURES = (
    Probe("sched_cls", True, _HELPER_REMEDY, _tc(asm.returning(_TC_NEXT))),
    Probe(
        "redirect_peer",
        True,
        _HELPER_REMEDY,
        _tc_helper(asm.Helper.REDIRECT_PEER, asm.set_register(1, 1) + asm.set_register(2, 0)),
    ),
    Probe(
        "redirect_neigh",
        True,
        _HELPER_REMEDY,
        _tc_helper(
            asm.Helper.REDIRECT_NEIGH,
            asm.set_register(1, 1) + b"".join(asm.set_register(r, 0) for r in (2, 3, 4)),
        ),
    ),
    Probe(
        "fib_lookup",
        True,
        _HELPER_REMEDY,
        _tc_helper(
            asm.Helper.FIB_LOOKUP,
            asm.zeroed_frame(64) + asm.set_register(3, 64) + asm.set_register(4, 0),
        ),
    ),
    Probe(
        "tunnel_key",
        True,
        _HELPER_REMEDY,
        _tc_helper(
            asm.Helper.SKB_SET_TUNNEL_KEY,
            asm.zeroed_frame(48) + asm.set_register(3, 44) + asm.set_register(4, 0),
        ),
    ),
    Probe(
        "coarse_clock",
        True,
        "use a kernel of 5.11 or newer",
        _tc_helper(asm.Helper.KTIME_GET_COARSE_NS, b""),
    ),
    Probe("lru_hash", True, _HELPER_REMEDY, _map(MapType.LRU_HASH, 4, 4)),
    Probe("lpm_trie", True, _HELPER_REMEDY, _map(MapType.LPM_TRIE, 8, 4, NO_PREALLOC)),
    Probe("prog_array", True, _HELPER_REMEDY, _map(MapType.PROG_ARRAY, 4, 4)),
    Probe("percpu_array", True, _HELPER_REMEDY, _map(MapType.PERCPU_ARRAY, 4, 64)),
    Probe("cgroup2", True, _CGROUP_REMEDY, _cgroup2),
    Probe("sock_addr_v4", True, _CGROUP_REMEDY, _sock_addr(AttachType.CGROUP_INET4_CONNECT)),
    Probe("sock_addr_v6", True, _CGROUP_REMEDY, _sock_addr(AttachType.CGROUP_INET6_CONNECT)),
    Probe("getpeername", True, _CGROUP_REMEDY, _sock_addr(AttachType.CGROUP_INET4_GETPEERNAME)),
    Probe("netns_cookie", True, _HELPER_REMEDY, _sock_addr_helper(asm.Helper.GET_NETNS_COOKIE)),
    Probe("socket_cookie", True, _HELPER_REMEDY, _sock_addr_helper(asm.Helper.GET_SOCKET_COOKIE)),
    Probe(
        "set_retval",
        True,
        "use a kernel of 5.18 or newer",
        _sock_addr_helper(asm.Helper.SET_RETVAL, asm.set_register(1, -111)),
    ),
    Probe("bpffs", True, "mount it: mount -t bpf bpf /sys/fs/bpf", _bpffs),
    Probe("vxlan_external", True, "use a kernel with CONFIG_VXLAN", _vxlan_external),
    Probe("map_batch", False, "maps are then read entry by entry, which is slower", _map_batch),
    Probe("tcx", False, "clsact filters are then used (tcx came with Linux 6.6)", _tcx),
    Probe("clsact", False, "use a kernel with CONFIG_NET_SCH_INGRESS", _clsact),
)

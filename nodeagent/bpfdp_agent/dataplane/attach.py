# SPDX-License-Identifier: Apache-2.0
"""Attaching programs to hooks: tcx links, clsact filters where the kernel has no tcx, cgroup links.

`await attacher.attach(hook, ifindex, family, program)` makes `program` the one at that place,
adopting and updating what an earlier agent left there, without a moment of nothing attached.
Links are pinned: they outlive the agent. `attached()` lists what is there; `detach` and
`detach_all` remove. tcx pins are named `<hook><family>_<ifindex>`, cgroup pins `cgroup_<hook>`;
clsact filters are named `bpfdp_<hook><family>`, with the family as their priority.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import re
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pyroute2

from bpfdp_agent.bpf import mounts, syscall
from bpfdp_agent.bpf.errors import AttachFailed, NotFound, SyscallFailed
from bpfdp_agent.bpf.syscall import AttachType
from bpfdp_agent.dataplane.pins import Pins, listing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator
    from pathlib import Path

Kind = Literal["TCX", "TC"]

_FILTER_PREFIX = "bpfdp_"
_PROTOCOL = {4: 0x0800, 6: 0x86DD}
_INGRESS_PARENT, _EGRESS_PARENT = 0xFFFFFFF2, 0xFFFFFFF3
_CLSACT_HANDLE = 0xFFFF0000
_GONE = (errno.ENODEV, errno.ENOENT, errno.EINVAL)
_TCA_BPF_ID = 11
_CGROUP_PREFIX = "cgroup_"


class Hook(enum.StrEnum):
    """Places of a device where programs run (contract: the packet path)."""

    FROM_POD = "from_pod"
    TO_POD = "to_pod"
    FROM_NET = "from_net"
    TO_NET = "to_net"
    FROM_TUNNEL = "from_tunnel"

    @property
    def egress(self) -> bool:
        """Whether the hook sees packets that leave through the device."""
        return self in (Hook.TO_POD, Hook.TO_NET)


_PIN = re.compile(rf"({'|'.join(Hook)})([46])_(\d+)")

CGROUP_HOOKS = {
    "connect4": AttachType.CGROUP_INET4_CONNECT,
    "connect6": AttachType.CGROUP_INET6_CONNECT,
    "sendmsg4": AttachType.CGROUP_UDP4_SENDMSG,
    "sendmsg6": AttachType.CGROUP_UDP6_SENDMSG,
    "recvmsg4": AttachType.CGROUP_UDP4_RECVMSG,
    "recvmsg6": AttachType.CGROUP_UDP6_RECVMSG,
    "getpeername4": AttachType.CGROUP_INET4_GETPEERNAME,
    "getpeername6": AttachType.CGROUP_INET6_GETPEERNAME,
    "connect6_mapped": AttachType.CGROUP_INET6_CONNECT,
    "sendmsg6_mapped": AttachType.CGROUP_UDP6_SENDMSG,
    "recvmsg6_mapped": AttachType.CGROUP_UDP6_RECVMSG,
    "getpeername6_mapped": AttachType.CGROUP_INET6_GETPEERNAME,
}
"""cgroup hooks by name, with the attach type their programs are loaded with. `_mapped`: the IPv4
program for IPv6 sockets that talk IPv4, beside the IPv6 one."""


@dataclass(frozen=True, slots=True, order=True)
class Attachment:
    """A program of ours at a device's hook. `kind` is how it is attached."""

    hook: Hook
    ifindex: int
    family: int
    kind: Kind
    program_id: int


class Attacher:
    """Attaches in one way (`kind`); lists and removes both."""

    def __init__(self, kind: Kind, pins: Pins | None = None, cgroup: Path | None = None) -> None:
        self.kind = kind
        self._links = (pins or Pins()).links
        self._cgroup = cgroup

    async def attach(self, hook: Hook, ifindex: int, family: int, program: int) -> None:
        """Make the program (a descriptor) the one at the place. Raises AttachFailed."""
        try:
            if self.kind == "TCX":
                self._attach_tcx(hook, ifindex, family, program)
            else:
                await _attach_filter(hook, ifindex, family, program)
        except (SyscallFailed, pyroute2.NetlinkError) as error:
            raise AttachFailed(
                f"cannot attach {hook}{family} to {interface_name(ifindex)}: {error}"
            ) from error

    async def detach(self, hook: Hook, ifindex: int, family: int) -> None:
        """Remove the program from the place, however attached; nothing there is no error."""
        _remove_link(self._links / _pin_name(hook, ifindex, family))
        await _remove_filter(hook, ifindex, family)

    def attach_cgroup(self, hook: str, program: int) -> None:
        """Make the program the one at a cgroup hook (a name of CGROUP_HOOKS)."""
        pin = self._links / f"{_CGROUP_PREFIX}{hook}"
        try:
            if not _update_link(pin, program):
                self._create_cgroup_link(CGROUP_HOOKS[hook], program, pin)
        except (SyscallFailed, OSError) as error:
            raise AttachFailed(f"cannot attach {hook} to the cgroup root: {error}") from error

    def detach_cgroup(self, hook: str) -> None:
        """Remove the program from a cgroup hook."""
        _remove_link(self._links / f"{_CGROUP_PREFIX}{hook}")

    def cgroup_attached(self) -> dict[str, int]:
        """Program ids by cgroup hook."""
        pins = [p for p in listing(self._links) if p.name.startswith(_CGROUP_PREFIX)]
        found = ((pin.name.removeprefix(_CGROUP_PREFIX), _link_info(pin)) for pin in pins)
        return {name: info.program_id for name, info in found if info is not None}

    async def attached(self) -> list[Attachment]:
        """What of ours is at devices' hooks, of both kinds, sorted."""
        return sorted(self._tcx_attached() + await _filters())

    async def detach_all(self) -> None:
        """Remove every link and filter of ours."""
        for pin in listing(self._links):
            _remove_link(pin)
        await _remove_filters(await _filters())

    async def remove_other_kind(self) -> None:
        """After everything is attached in this way: remove what is attached in the other."""
        if self.kind == "TCX":
            await _remove_filters(await _filters())
            return
        for attachment in self._tcx_attached():
            _remove_link(self._links / _pin_name_of(attachment))

    def remove_stale(self) -> list[Path]:
        """Remove pins of tcx links whose device is gone; returns them."""
        stale = [pin for pin in self._tcx_pins() if not self._is_alive(pin)]
        for pin in stale:
            _remove_link(pin)
        return stale

    def _attach_tcx(self, hook: Hook, ifindex: int, family: int, program: int) -> None:
        pin = self._links / _pin_name(hook, ifindex, family)
        if self._is_alive(pin) and _update_link(pin, program):
            return
        _remove_link(pin)
        attach_type = AttachType.TCX_EGRESS if hook.egress else AttachType.TCX_INGRESS
        link = syscall.link_create(program, ifindex, attach_type)
        try:
            syscall.obj_pin(link, pin)
        finally:
            os.close(link)

    def _create_cgroup_link(self, attach_type: AttachType, program: int, pin: Path) -> None:
        root = self._cgroup or mounts.cgroup2_root()
        if root is None:
            raise AttachFailed("no cgroup2 hierarchy is mounted: mount it on /sys/fs/cgroup")
        directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            link = syscall.link_create(program, directory, attach_type)
        finally:
            os.close(directory)
        try:
            syscall.obj_pin(link, pin)
        finally:
            os.close(link)

    def _tcx_pins(self) -> list[Path]:
        return [pin for pin in listing(self._links) if _PIN.fullmatch(pin.name)]

    def _tcx_attached(self) -> list[Attachment]:
        found = []
        for pin in self._tcx_pins():
            info = _link_info(pin)
            match = _PIN.fullmatch(pin.name)
            if info is not None and info.ifindex and match:
                hook, family = Hook(match[1]), int(match[2])
                found.append(Attachment(hook, info.ifindex, family, "TCX", info.program_id))
        return found

    @staticmethod
    def _is_alive(pin: Path) -> bool:
        """Whether the pinned link is attached to the device its name says (0: it is gone)."""
        info = _link_info(pin)
        return info is not None and info.ifindex == int(pin.name.rsplit("_", 1)[1])


def interface_name(ifindex: int) -> str:
    """The interface's name, or its number when it is gone."""
    try:
        return socket.if_indextoname(ifindex)
    except OSError:
        return f"interface {ifindex}"


def _pin_name(hook: Hook, ifindex: int, family: int) -> str:
    return f"{hook}{family}_{ifindex}"


def _pin_name_of(attachment: Attachment) -> str:
    return _pin_name(attachment.hook, attachment.ifindex, attachment.family)


def _link_info(pin: Path) -> syscall.LinkInfo | None:
    try:
        link = syscall.obj_get(pin)
    except NotFound:
        return None
    try:
        return syscall.link_info(link)
    finally:
        os.close(link)


def _update_link(pin: Path, program: int) -> bool:
    """Replace the pinned link's program; False when there is no link, or its target is gone."""
    try:
        link = syscall.obj_get(pin)
    except NotFound:
        return False
    try:
        syscall.link_update(link, program)
    except SyscallFailed as error:
        if error.errno == errno.ENOLINK:
            return False
        raise
    finally:
        os.close(link)
    return True


def _remove_link(pin: Path) -> None:
    """Detach at once (others may hold the link) and unpin."""
    try:
        link = syscall.obj_get(pin)
    except NotFound:
        return
    try:
        with contextlib.suppress(SyscallFailed):  # the device is gone: nothing to detach
            syscall.link_detach(link)
    finally:
        os.close(link)
    pin.unlink(missing_ok=True)


# -- clsact filters ---------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _netlink(doing: str) -> AsyncIterator[Any]:
    """A netlink socket whose errors come out as AttachFailed."""
    try:
        async with pyroute2.AsyncIPRoute() as netlink:
            yield netlink
    except pyroute2.NetlinkError as error:
        raise AttachFailed(f"cannot {doing}: {error}") from error


async def _attach_filter(hook: Hook, ifindex: int, family: int, program: int) -> None:
    async with pyroute2.AsyncIPRoute() as netlink:
        with _passing_over(errno.EEXIST):
            await netlink.tc("add", "clsact", ifindex)
        await netlink.tc(
            "replace-filter",
            "bpf",
            ifindex,
            handle=1,
            fd=program,
            name=f"{_FILTER_PREFIX}{hook}{family}",
            parent=_parent(hook),
            prio=family,
            protocol=_PROTOCOL[family],
            direct_action=True,
        )


async def _remove_filter(hook: Hook, ifindex: int, family: int) -> None:
    async with _netlink(f"remove {hook}{family} from {interface_name(ifindex)}") as netlink:
        filters = await _filters_of(netlink, ifindex)
        await _delete(netlink, [a for a in filters if (a.hook, a.family) == (hook, family)])


async def _remove_filters(filters: Iterable[Attachment]) -> None:
    async with _netlink("remove filters") as netlink:
        await _delete(netlink, list(filters))


async def _delete(netlink: Any, filters: list[Attachment]) -> None:
    """Delete filters, and the clsact qdiscs in which none is left."""
    for each in filters:
        with _passing_over(*_GONE):
            await netlink.tc(
                "del-filter",
                "bpf",
                each.ifindex,
                handle=1,
                parent=_parent(each.hook),
                prio=each.family,
                protocol=_PROTOCOL[each.family],
            )
    for ifindex in {each.ifindex for each in filters}:
        with _passing_over(*_GONE):
            if not await _any_filter(netlink, ifindex):
                await netlink.tc("del", "clsact", ifindex)


async def _filters() -> list[Attachment]:
    """Every filter of ours on every device that has a clsact qdisc."""
    found: list[Attachment] = []
    async with _netlink("list filters") as netlink:
        indexes = {
            qdisc["index"]
            async for qdisc in await netlink.get_qdiscs()
            if qdisc.get_attr("TCA_KIND") == "clsact"
        }
        for ifindex in sorted(indexes):
            found += await _filters_of(netlink, ifindex)
    return found


async def _filters_of(netlink: Any, ifindex: int) -> list[Attachment]:
    found = []
    for parent in (_INGRESS_PARENT, _EGRESS_PARENT):
        with _passing_over(*_GONE):
            async for each in await netlink.get_filters(index=ifindex, parent=parent):
                attachment = _filter_attachment(each, ifindex)
                if attachment is not None:
                    found.append(attachment)
    return found


async def _any_filter(netlink: Any, ifindex: int) -> bool:
    found = 0
    for parent in (_INGRESS_PARENT, _EGRESS_PARENT):
        # Read to the end, or the socket's next dump fails with EBUSY.
        found += len([1 async for _ in await netlink.get_filters(index=ifindex, parent=parent)])
    return found > 0


def _filter_attachment(message: Any, ifindex: int) -> Attachment | None:
    """Ours by its name, or None."""
    options = message.get_attr("TCA_OPTIONS")
    name = options.get_attr("TCA_BPF_NAME") if options is not None else None
    match = re.fullmatch(rf"{_FILTER_PREFIX}({'|'.join(Hook)})([46])", name or "")
    if match is None:
        return None
    return Attachment(Hook(match[1]), ifindex, int(match[2]), "TC", _filter_program(options))


def _filter_program(options: Any) -> int:
    """The program's id, from an attribute that pyroute2 does not know: its raw bytes."""
    for _, attribute in options["attrs"]:
        header = attribute.get("header") if isinstance(attribute, dict) else None
        if header is not None and header["type"] == _TCA_BPF_ID:
            (program_id,) = struct.unpack_from("=I", attribute.data, attribute.offset + 4)
            return int(program_id)
    return 0


def _parent(hook: Hook) -> int:
    return _EGRESS_PARENT if hook.egress else _INGRESS_PARENT


@contextlib.contextmanager
def _passing_over(*codes: int) -> Iterator[None]:
    """Pass over NetlinkErrors with these codes."""
    try:
        yield
    except pyroute2.NetlinkError as error:
        if error.code not in codes:
            raise

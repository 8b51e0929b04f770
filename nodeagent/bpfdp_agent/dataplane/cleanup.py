# SPDX-License-Identifier: Apache-2.0
"""Removing everything of ours from this node; used by `bpfdp cleanup` and by agents.mode Detach.

In the order in which nothing is left half: hooks first (traffic is the host's again), then
programs, maps and pins, the tunnel device, the nat table. Safe to repeat, and without an agent.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bpfdp_agent.bpf import syscall
from bpfdp_agent.bpf.errors import BpfError, SyscallFailed
from bpfdp_agent.dataplane import commands, kubeproxy_rules, programs, tunnel
from bpfdp_agent.dataplane.attach import Attacher
from bpfdp_agent.dataplane.pins import Pins, listing
from bpfdp_agent.layouts import MapType

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(slots=True)
class Removed:
    """What was there, and what could not be removed (one sentence each)."""

    attachments: int = 0
    pins: int = 0
    tunnel: bool = False
    nat_table: bool = False
    failures: list[str] = field(default_factory=list)


Step = Callable[[Pins, Removed], Awaitable[None]]


async def clean(pins: Pins | None = None, *, keep_nat_hooks: bool = False) -> Removed:
    """Remove links, filters, pins, maps, the tunnel device and (unless kept) the nat table."""
    where = pins or Pins()
    removed = Removed()
    for step in (_detach, _unpin, _remove_tunnel):
        await _try(step, where, removed)
    if not keep_nat_hooks:
        await _try(_release_nat, where, removed)
    return removed


async def _try(step: Step, where: Pins, removed: Removed) -> None:
    try:
        await step(where, removed)
    except (BpfError, OSError) as error:
        removed.failures.append(str(error))


async def _detach(where: Pins, removed: Removed) -> None:
    attacher = Attacher("TCX", where)
    removed.attachments = len(await attacher.attached()) + len(attacher.cgroup_attached())
    await attacher.detach_all()


async def _unpin(where: Pins, removed: Removed) -> None:
    """Prog arrays are emptied first, slowly: unpinned, they would free their programs at once."""
    for pin in listing(where.maps):
        await _empty_prog_array(pin)
    found = [path for path in _files(where.root) if path.parent != where.maps]
    found += listing(where.maps)
    await programs.free((), found)
    removed.pins = len(found)
    shutil.rmtree(where.root, ignore_errors=True)


async def _empty_prog_array(pin: Path) -> None:
    try:
        descriptor = syscall.obj_get(pin)
    except SyscallFailed:
        return
    try:
        if syscall.map_info(descriptor).type == MapType.PROG_ARRAY:
            await programs.clear_slots(descriptor, sorted(programs.slots(descriptor)))
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


async def _remove_tunnel(_: Pins, removed: Removed) -> None:
    removed.tunnel = await tunnel.remove()


async def _release_nat(_: Pins, removed: Removed) -> None:
    if commands.available("nft"):
        removed.nat_table = await kubeproxy_rules.release_nat_hooks()

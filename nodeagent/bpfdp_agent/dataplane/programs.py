# SPDX-License-Identifier: Apache-2.0
"""Loading compiled functions, pinning them, and putting them into prog arrays.

Linux 6.18 can deadlock when very many programs are freed at once, so everything that may free
programs goes through `free()` and `clear_slots()`, which pause between batches.
"""

from __future__ import annotations

import asyncio
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bpfdp_agent.bpf import syscall
from bpfdp_agent.bpf.errors import NotFound, ProgramRejected
from bpfdp_agent.bpf.syscall import AttachType, ProgramType
from bpfdp_agent.dataplane.pins import listing, replace_pin

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from bpfdp_agent.bpf.objects import Function

FREE_BATCH = 50
FREE_PAUSE = 0.25
"""Seconds: more than the kernel's RCU grace periods take on a busy machine."""


@dataclass(frozen=True, slots=True)
class Program:
    """A loaded program, open. `tag` is the kernel's hash of its instructions without map ids."""

    name: str
    descriptor: int
    id: int
    tag: bytes

    def close(self) -> None:
        """Close the descriptor; hooks, slots and pins keep the program."""
        os.close(self.descriptor)


def load(
    function: Function,
    maps: Mapping[str, int],
    program_type: ProgramType = ProgramType.SCHED_CLS,
    attach_type: AttachType = AttachType.NONE,
    *,
    name: str = "",
    pin: Path | None = None,
) -> Program:
    """Load with the maps' descriptors put in; pin (replacing what is there) where `pin` says.

    Raises ProgramRejected with the verifier's log, or saying which map is unknown.
    """
    name = name or function.name
    missing = function.map_names - maps.keys()
    if missing:
        reason = f"it uses maps this agent does not have: {', '.join(sorted(missing))}"
        raise ProgramRejected(name, 0, reason)
    descriptor = syscall.prog_load(
        program_type, function.with_maps(maps), attach_type=attach_type, name=name
    )
    try:
        if pin is not None:
            replace_pin(descriptor, pin)
        return _opened(name, descriptor)
    except BaseException:
        os.close(descriptor)
        raise


def open_pinned(pin: Path) -> Program | None:
    """The program pinned there, or None."""
    try:
        return _opened(pin.name, syscall.obj_get(pin))
    except NotFound:
        return None


def _opened(name: str, descriptor: int) -> Program:
    info = syscall.prog_info(descriptor)
    return Program(name, descriptor, info.id, info.tag)


def set_slot(prog_array: int, slot: int, program: int) -> None:
    """Put a program into a slot, in place of what is there, in one step."""
    syscall.map_update(prog_array, struct.pack("=I", slot), struct.pack("=I", program))


def slots(prog_array: int) -> dict[int, int]:
    """Program ids by slot, of those that are filled."""
    info = syscall.map_info(prog_array)
    found = {}
    for slot in range(info.max_entries):
        value = syscall.map_lookup(prog_array, struct.pack("=I", slot), 4)
        if value is not None:
            (found[slot],) = struct.unpack("=I", value)
    return found


async def clear_slots(prog_array: int, which: Iterable[int]) -> None:
    """Empty slots, in batches."""
    for index, slot in enumerate(which, start=1):
        syscall.map_delete(prog_array, struct.pack("=I", slot))
        if index % FREE_BATCH == 0:
            await asyncio.sleep(FREE_PAUSE)


async def free(programs: Sequence[Program], pins: Sequence[Path] = ()) -> None:
    """Close programs and remove pins, in batches."""
    for index, program in enumerate(programs, start=1):
        program.close()
        if index % FREE_BATCH == 0:
            await asyncio.sleep(FREE_PAUSE)
    for index, pin in enumerate(pins, start=1):
        pin.unlink(missing_ok=True)
        if index % FREE_BATCH == 0:
            await asyncio.sleep(FREE_PAUSE)


async def remove_stale(folder: Path, keep: Iterable[str]) -> list[Path]:
    """Unpin the programs in a folder whose names are not to be kept; returns them."""
    wanted = frozenset(keep)
    stale = [pin for pin in listing(folder) if pin.name not in wanted]
    await free((), stale)
    return stale

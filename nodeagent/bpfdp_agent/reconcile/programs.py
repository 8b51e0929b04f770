# SPDX-License-Identifier: Apache-2.0
"""The programs of the catalogue: rendered, compiled, loaded, all of them or none.

Nothing is pinned or switched before every program has passed the verifier, so a text that does
not compile, or a program that is rejected, leaves the last good set running. That set, pinned by
this agent or an earlier one, is used for new interfaces until a better one loads.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from bpfdp_agent import catalog
from bpfdp_agent.bpf.errors import BpfError, CompileFailed, ProgramRejected, TemplateInvalid
from bpfdp_agent.bpf.precompile import generic_sources
from bpfdp_agent.bpf.syscall import AttachType, ProgramType
from bpfdp_agent.catalog import Attachment
from bpfdp_agent.dataplane import programs
from bpfdp_agent.dataplane.attach import Hook
from bpfdp_agent.dataplane.pins import replace_pin
from bpfdp_agent.reconcile.surroundings import reason_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bpfdp_agent.bpf.objects import Object
    from bpfdp_agent.config import Fault
    from bpfdp_agent.dataplane.programs import Program
    from bpfdp_agent.reconcile.kernel import Kernel
    from bpfdp_agent.reconcile.surroundings import Surroundings

log = logging.getLogger(__name__)

Loaded = dict[catalog.Program, "Program"]

HOOKS = {
    Hook.FROM_POD: Attachment.POD_INGRESS,
    Hook.TO_POD: Attachment.POD_EGRESS,
    Hook.FROM_NET: Attachment.NET_INGRESS,
    Hook.TO_NET: Attachment.NET_EGRESS,
    Hook.FROM_TUNNEL: Attachment.TUNNEL_INGRESS,
}
FAULT_FUNCTION = "bpfdp_fault"
_FAULTS: Mapping[Fault, str] = {
    "": "",
    "template-error": "\n#error BPFDP_FAULT=template-error\n",
    "verifier-reject": (
        f"\nint {FAULT_FUNCTION}(struct __sk_buff *skb)\n"
        "{\n    return *(__u8 *)(long)skb->data; // no bounds check\n}\n"
    ),
}
MESSAGE_LINES = 3


class ProgramSync:
    """Loads once, and again after a failure. `loaded` is what new interfaces get."""

    def __init__(self, around: Surroundings, kernel: Kernel, changed: Callable[[], None]) -> None:
        self._around = around
        self._maps = kernel.maps
        self._pins = kernel.pins
        self._compiler = kernel.compiler
        self._renderer = kernel.renderer
        self._changed = changed
        self.current = False
        self.loaded: Loaded = {}

    @property
    def usable(self) -> bool:
        """Whether there is a complete set to attach: this version's, or an earlier agent's."""
        return len(self.loaded) == len(wanted_programs())

    def hook(self, hook: Hook, family: int) -> Program | None:
        """The program of an interface's hook."""
        return next(
            (
                loaded
                for program, loaded in self.loaded.items()
                if (program.attachment, program.family) == (HOOKS[hook], family)
            ),
            None,
        )

    def cgroup(self) -> dict[str, Program]:
        """Programs by the attacher's name of the cgroup hook."""
        return {
            cgroup_hook(program): loaded
            for program, loaded in self.loaded.items()
            if program.attachment is Attachment.CGROUP
        }

    async def reconcile(self) -> int:
        """Load what is not loaded yet; 0 map operations."""
        if self.current:
            return 0
        if not self.loaded:
            self._adopt()
        started = time.monotonic()
        try:
            fresh = self._load(await self._compile())
        except BpfError as error:
            self._refused(error)
            raise
        self._around.metrics.compile_seconds.observe(time.monotonic() - started)
        await self._switch(fresh)
        self.current = True
        self._around.status.condition(
            "ProgramsLoaded", True, "Loaded", f"{len(fresh)} programs passed the verifier."
        )
        self._changed()
        return 0

    def _adopt(self) -> None:
        """What an earlier agent pinned, where it is complete."""
        found: Loaded = {}
        for program in wanted_programs():
            pinned = programs.open_pinned(self._pins.programs / program.pin_name)
            if pinned is not None:
                found[program] = pinned
        if len(found) == len(wanted_programs()):
            self.loaded = found
            self._changed()
            return
        for pinned in found.values():
            pinned.close()

    async def _compile(self) -> dict[tuple[str, int], Object]:
        fault = _FAULTS[self._around.settings.fault]
        sources = generic_sources(self._renderer, fault)
        return dict(zip(catalog.texts(), await self._compiler.compile(sources), strict=True))

    def _load(self, objects: Mapping[tuple[str, int], Object]) -> Loaded:
        """Every program, unpinned; on an error those that passed are closed again."""
        loaded: Loaded = {}
        try:
            self._load_fault(objects)
            for program in wanted_programs():
                compiled = objects[program.template, program.family]
                loaded[program] = programs.load(
                    compiled.functions[program.name],
                    self._maps.descriptors(program.family),
                    ProgramType(program.program_type),
                    AttachType(program.expected_attach_type),
                    name=program.pin_name,
                )
        except BaseException:
            for passed in loaded.values():
                passed.close()
            raise
        return loaded

    def _load_fault(self, objects: Mapping[tuple[str, int], Object]) -> None:
        """BPFDP_FAULT=verifier-reject: a program that must be refused."""
        found = objects[catalog.DATAPATH, 4].functions.get(FAULT_FUNCTION)
        if found is not None:
            programs.load(found, self._maps.descriptors(4), name=FAULT_FUNCTION).close()

    async def _switch(self, fresh: Loaded) -> None:
        """Pin the new set and put its tail-called programs into their slots."""
        old, self.loaded = self.loaded, fresh
        for program, loaded in fresh.items():
            replace_pin(loaded.descriptor, self._pins.programs / program.pin_name)
            if program.attachment is Attachment.JUMP and program.slot is not None:
                jumps = self._maps["jumps", program.family].descriptor
                programs.set_slot(jumps, program.slot, loaded.descriptor)
        await programs.free(list(old.values()))
        await programs.remove_stale(self._pins.programs, [p.pin_name for p in fresh])

    def _refused(self, error: BpfError) -> None:
        """Keep the whole log on the node; the condition says its gist and where the rest is."""
        kept = self._keep_log(error)
        running = "The last good programs keep running." if self.usable else "Nothing is attached."
        message = f"{gist(error)} {running}{f' Full log on the node: {kept}' if kept else ''}"
        reason = reason_of(error)
        self._around.metrics.program_errors.labels(reason).inc()
        self._around.status.condition("ProgramsLoaded", False, reason, message)

    def _keep_log(self, error: BpfError) -> str:
        if isinstance(error, CompileFailed):
            name, text = error.name, error.output
        elif isinstance(error, ProgramRejected):
            name, text = error.name, error.log
        else:
            return ""
        path = self._around.settings.failed_dir / f"{name}.log"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError:
            return ""
        return str(path)

    async def close(self) -> None:
        """Close descriptors; pins, hooks and slots keep the programs."""
        await programs.free(list(self.loaded.values()))
        self.loaded = {}


def wanted_programs() -> list[catalog.Program]:
    """The catalogue but for the policy slots, which dataplane/policies.py fills."""
    return [p for p in catalog.PROGRAMS if p.attachment is not Attachment.POLICY]


def cgroup_hook(program: catalog.Program) -> str:
    """The attacher's name: connect_mapped of family 4 → connect6_mapped."""
    call, _, mapped = program.name.partition("_")
    return f"{call}6_mapped" if mapped else f"{call}{program.family}"


def gist(error: Exception) -> str:
    """The first telling lines of the compiler's or the verifier's words."""
    lines = str(error).strip().splitlines()
    if isinstance(error, CompileFailed | ProgramRejected | TemplateInvalid):
        lines = lines[:MESSAGE_LINES]
    return " ".join(lines).rstrip(".") + "."

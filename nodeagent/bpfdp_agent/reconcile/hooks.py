# SPDX-License-Identifier: Apache-2.0
"""Hooks: which program belongs where, and that it is there.

Nothing is attached before the maps it reads are complete, and a pod's hooks only after its
endpoint entry. Programs that are already attached are replaced in place. A pod's hooks are never
taken off while its interface lives: its last packets would pass outside of its policy.
"""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING, Literal

from bpfdp_agent.bpf.errors import AttachFailed
from bpfdp_agent.dataplane.attach import Attacher, Hook, interface_name
from bpfdp_agent.layouts import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Callable

    from bpfdp_agent.config import Config
    from bpfdp_agent.dataplane.attach import Attachment
    from bpfdp_agent.reconcile.kernel import Kernel
    from bpfdp_agent.reconcile.node import NodeSync
    from bpfdp_agent.reconcile.pods import PodSync
    from bpfdp_agent.reconcile.programs import ProgramSync
    from bpfdp_agent.reconcile.surroundings import Surroundings

log = logging.getLogger(__name__)

POD_HOOKS = (Hook.FROM_POD, Hook.TO_POD)
NET_HOOKS = (Hook.FROM_NET, Hook.TO_NET)
Place = tuple[Hook, int]


def attach_kind(wanted: str, features: frozenset[str]) -> Literal["TCX", "TC"]:
    """How to attach. Raises AttachFailed when the kernel cannot attach as the config wants it."""
    if wanted == "Auto":
        return "TCX" if "tcx" in features else "TC"
    kind: Literal["TCX", "TC"] = "TCX" if wanted == "TCX" else "TC"
    if ("tcx" if kind == "TCX" else "clsact") not in features:
        raise AttachFailed(
            f"spec.interfaces.attachType is {kind}, which this kernel lacks: set it to Auto"
        )
    return kind


def exists(ifindex: int) -> bool:
    """Whether there is such an interface."""
    try:
        socket.if_indextoname(ifindex)
    except OSError:
        return False
    return True


class HookSync:
    """Attaches and reports, once it may. `complete` is set from the first complete round on."""

    def __init__(  # noqa: PLR0917 - its sources
        self,
        around: Surroundings,
        kernel: Kernel,
        programs: ProgramSync,
        node: NodeSync,
        pods: PodSync,
        attached: Callable[[], None],
    ) -> None:
        self._around = around
        self._pins = kernel.pins
        self._maps = kernel.maps
        self._programs = programs
        self._node = node
        self._pods = pods
        self._attached = attached
        self._config: Config | None = None
        self.may_attach = False
        self.complete = False

    def configure(self, config: Config) -> None:
        """Take a new config."""
        self._config = config

    async def reconcile(self) -> int:
        """Attach what is missing or out of date; 0 map operations."""
        if self._config is None or not self.may_attach:
            return 0
        kind = attach_kind(self._config.attach_type, self._around.features)
        attacher = Attacher(kind, self._pins)
        attacher.remove_stale()
        there = {(a.hook, a.ifindex, a.family): a for a in await attacher.attached()}
        wanted = self.wanted()
        failed = await self._attach_all(attacher, wanted, there)
        await self._detach_devices(attacher, wanted, list(there.values()))
        if not failed:  # where it could not be attached in this way, the other must go on
            await attacher.remove_other_kind()
        self._attach_cgroup(attacher)
        self._publish(kind, wanted, failed)
        if failed:
            raise AttachFailed("; ".join(failed))
        if self._programs.current and (carried := self._maps.carry_over()):
            log.info("%d entries followed to maps of another size", carried)
        return 0

    def wanted(self) -> set[Place]:
        """Places that should have a program."""
        found: set[Place] = {(h, i) for i in self._pods.attachable for h in POD_HOOKS}
        found |= {(h, d.ifindex) for d in self._node.devices for h in NET_HOOKS}
        if self._node.tunnel_ifindex:
            found.add((Hook.FROM_TUNNEL, self._node.tunnel_ifindex))
        return found

    async def _attach_all(
        self,
        attacher: Attacher,
        wanted: set[Place],
        there: dict[tuple[Hook, int, int], Attachment],
    ) -> list[str]:
        """Pods first, so that nothing from outside reaches a pod before its policy does."""
        failed = []
        for hook, ifindex in sorted(wanted, key=lambda p: (p[0] not in POD_HOOKS, p)):
            for family in FAMILIES:
                program = self._programs.hook(hook, family)
                old = there.get((hook, ifindex, family))
                if program is None or (
                    old and (old.program_id, old.kind) == (program.id, attacher.kind)
                ):
                    continue
                try:
                    await attacher.attach(hook, ifindex, family, program.descriptor)
                except AttachFailed as error:
                    if exists(ifindex):  # a pod's interface may go at any moment
                        failed.append(str(error))
        return failed

    async def _detach_devices(
        self, attacher: Attacher, wanted: set[Place], there: list[Attachment]
    ) -> None:
        """Take programs off devices that are no data device or tunnel any more."""
        for old in there:
            if old.hook not in POD_HOOKS and (old.hook, old.ifindex) not in wanted:
                await attacher.detach(old.hook, old.ifindex, old.family)

    def _attach_cgroup(self, attacher: Attacher) -> None:
        attached = attacher.cgroup_attached()
        for name, program in self._programs.cgroup().items():
            if attached.get(name) != program.id:
                attacher.attach_cgroup(name, program.descriptor)

    def _publish(self, kind: Literal["TCX", "TC"], wanted: set[Place], failed: list[str]) -> None:
        status = self._around.status
        by_name: dict[str, set[str]] = {}
        for hook, ifindex in wanted:
            if not exists(ifindex):
                continue
            by_name.setdefault(interface_name(ifindex), set()).add(str(hook))
        status.interfaces(by_name)
        status.update(attach_type=kind)
        self._around.metrics.programs.set(len(wanted) * len(FAMILIES))
        if failed:
            status.condition("Attached", False, "AgentNotReady", failed[0])
        else:
            self.complete = True
            self._attached()
            status.condition(
                "Attached", True, "Attached", "Programs are attached to every interface and cgroup."
            )

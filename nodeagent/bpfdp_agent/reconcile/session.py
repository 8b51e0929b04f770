# SPDX-License-Identifier: Apache-2.0
"""What runs while the dataplane is on this node: maps, programs, and a loop per concern.

A Session begins with what an earlier agent left in the kernel and ends (`stop`) without removing
anything; `detach` removes everything.

    services ──┐
    identities ─▶ policies ─▶ endpoints ──┤
    node (devices, tunnel, settings) ─────┼─▶ hooks
    programs ─────────────────────────────┘
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from bpfdp_agent import memory
from bpfdp_agent.bpf.cache import ObjectCache, shipped_bytecode
from bpfdp_agent.bpf.compiler import Compiler
from bpfdp_agent.bpf.errors import BpfError
from bpfdp_agent.bpf.render import Renderer
from bpfdp_agent.dataplane import cleanup
from bpfdp_agent.dataplane.maps import MapStore
from bpfdp_agent.dataplane.pins import Pins, listing
from bpfdp_agent.reconcile.connections import Connections
from bpfdp_agent.reconcile.hooks import HookSync
from bpfdp_agent.reconcile.kernel import Kernel
from bpfdp_agent.reconcile.kubeproxy import KubeProxySync, wait_until_back
from bpfdp_agent.reconcile.loop import Loop, keep_running
from bpfdp_agent.reconcile.node import NodeSync
from bpfdp_agent.reconcile.pods import PodSync
from bpfdp_agent.reconcile.policies import PolicySync
from bpfdp_agent.reconcile.programs import ProgramSync
from bpfdp_agent.reconcile.services import ServiceSync

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from typing import Any

    from bpfdp_agent.config import Config
    from bpfdp_agent.model.cluster import Changes
    from bpfdp_agent.reconcile.surroundings import Surroundings
    from bpfdp_agent.serve.health import Health

log = logging.getLogger(__name__)

SETTLE_AFTER = 3.0
"""Seconds after the first sync; a collection of everything holds the loop for a moment."""


class Session:
    """One attachment of this node. `start` may raise BpfError; call `stop` then."""

    def __init__(self, around: Surroundings, health: Health, config: Config) -> None:
        self._around = around
        self._health = health
        self._config = config
        pins = Pins()
        self._kernel = Kernel(
            maps=MapStore(pins, sizes=dict(config.map_sizes)),
            pins=pins,
            compiler=Compiler(
                ObjectCache(around.settings.state_dir / "cache", shipped=shipped_bytecode())
            ),
            renderer=Renderer(),
        )
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._loops: dict[str, Loop] = {}
        self.stopped = False
        self._settled_memory = False
        maps = self._kernel.maps
        self._connections = Connections(around, maps)
        self._services = ServiceSync(around, maps, self._connections, self._settled)
        self._node = NodeSync(around, maps, self._settled)
        self._programs = ProgramSync(around, self._kernel, self._settled)
        self._policies = PolicySync(around, self._kernel, self._policies_changed)
        self._pods = PodSync(around, maps, self._policies, self._pods_changed)
        self._connections.pod_namespaces = lambda: self._pods.namespaces
        self._hooks = HookSync(
            around, self._kernel, self._programs, self._node, self._pods, self._tell_readiness
        )
        self._kube_proxy = KubeProxySync(around)

    async def start(self) -> None:
        """Open maps and begin the loops. Raises BpfError."""
        if not listing(self._kernel.pins.links):
            self._nothing_yet()
        self._kernel.maps.open()
        unfit = self._kernel.maps.unfit
        self._around.report("map sizes", unfit[0] if unfit else None)
        self._loop("programs", self._programs.reconcile)
        self._loop("services", self._services.reconcile)
        self._loop("node", self._node.reconcile)
        self._loop("pods", self._pods.reconcile)
        self._loop("policies", self._policies.reconcile)
        self._loop("hooks", self._hooks.reconcile)
        self._loop("kubeproxy", self._kube_proxy.reconcile)
        self._keep_running("pods found", lambda: self._pods.follow(self._loops["pods"].wake))
        self._keep_running("unused policies", self._policies.free_unused)
        self._keep_running("connections", self._connections.run)
        self._follow_links()

    def _nothing_yet(self) -> None:
        """A node that was rebooted, or is new: what an earlier agent's status says is over."""
        for kind in ("ProgramsLoaded", "ServicesSynced", "PoliciesSynced", "Attached"):
            self._around.status.condition(kind, False, "Syncing", "The agent is starting.")

    def _loop(self, name: str, work: Callable[[], Awaitable[int]]) -> None:
        loop = Loop(name, work, self._around.metrics, self._around.report)
        self._loops[name] = loop
        loop.wake()
        self._task(name, loop.run())

    def _keep_running(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        self._task(name, keep_running(name, work, self._around.report))

    def _task(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        self._tasks[name] = asyncio.create_task(work, name=name)

    def _follow_links(self) -> None:
        pattern, wake = self._config.data_pattern, self._loops["node"].wake
        self._keep_running("links", lambda: self._node.follow(pattern, wake))

    @property
    def map_sizes(self) -> tuple[tuple[str, int], ...]:
        """What the maps were opened with."""
        return self._config.map_sizes

    # -- what happens meanwhile -----------------------------------------------------------

    def configure(self, config: Config) -> None:
        """Follow the config at run time. Other map sizes need another session."""
        old, self._config = self._config, config
        self._node.configure(config)
        self._services.configure(config)
        self._hooks.configure(config)
        self._kube_proxy.configure(config)
        if old.data_pattern != config.data_pattern:
            self._tasks["links"].cancel()
            self._follow_links()
        for name in ("services", "node", "hooks", "kubeproxy"):
            self._loops[name].wake()

    def changed(self, changes: Changes) -> None:
        """Tell each concern what of the view is its own."""
        if changes.services:
            self._services.changed(changes.services)
            self._loops["services"].wake()
        if changes.nodes or changes.service_ranges:
            self._loops["node"].wake()
        if self._around.view.nodes.own in changes.nodes:
            self._loops["kubeproxy"].wake()
        if changes.pods or changes.policies or changes.namespaces:
            self._policies.changed(changes)
            self._loops["policies"].wake()
        if changes.pods or changes.addresses:
            self._pods.changed(changes)
            self._loops["pods"].wake()

    def wake_all(self) -> None:
        """A list is complete."""
        for loop in self._loops.values():
            loop.wake()

    def _policies_changed(self) -> None:
        self._loops["pods"].wake()

    def _pods_changed(self) -> None:
        if not self._policies.started or self._policies.behind:
            self._loops["policies"].wake()
        self._settled()

    def _settled(self) -> None:
        """A concern did its part: hooks may be due."""
        if not self._unsynced() and self._programs.usable:
            self._hooks.may_attach = True
            self._loops["hooks"].wake()
        self._tell_readiness()

    def _unsynced(self) -> list[str]:
        complete = {
            "services": self._services.complete,
            "node": self._node.complete,
            "pods": self._pods.complete,
        }
        return [name for name, done in complete.items() if not done]

    def _tell_readiness(self) -> None:
        if missing := self._unsynced():
            self._health.not_ready = f"not synced yet: {', '.join(missing)}"
        elif not self._hooks.complete:
            self._health.not_ready = "programs are not attached yet"
        else:
            self._health.not_ready = ""
            if not self._settled_memory:
                self._settled_memory = True
                asyncio.get_running_loop().call_later(SETTLE_AFTER, memory.settle)

    # -- the end --------------------------------------------------------------------------

    async def stop(self) -> None:
        """End the loops; the kernel keeps everything. A stopped session does not start again."""
        self.stopped = True
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()
        await self._programs.close()
        self._kernel.maps.close()


async def detach(
    around: Surroundings, health: Health, config: Config, session: Session | None
) -> None:
    """Give the node back: kube-proxy's rules first where it returns, then remove everything.

    The session goes on serving while kube-proxy's rules are awaited. Raises BpfError when
    something could not be removed; it is tried again.
    """
    around.proxy_servers.active = False
    around.proxy_servers.wake.set()
    if session is not None:
        await wait_until_back(config)
        await session.stop()
    removed = await cleanup.clean()
    if removed.failures:
        raise BpfError("detach: " + "; ".join(removed.failures))
    if removed.attachments or removed.pins:
        log.info("detached: %d hooks, %d pins removed", removed.attachments, removed.pins)
    status = around.status
    for kind in ("ProgramsLoaded", "ServicesSynced", "PoliciesSynced", "KubeProxyRulesCleared"):
        status.condition(kind, False, "Detached", "The dataplane is detached from this node.")
    status.condition("Attached", False, "Detached", "No program, map or link of ours is left.")
    status.update(
        interfaces=(), maps=(), attach_type=None, pods=0, services=0, backends=0, policies=0
    )
    health.not_ready = ""

# SPDX-License-Identifier: Apache-2.0
"""The agent's process: connection, watches, the cluster view, and one Session while attached.

    watches ─▶ queue ─▶ view ─▶ changes ─▶ Session's loops ─▶ kernel
                          └─▶ control loop: attach, configure, detach

The control loop does what the config says: without one, or on a node that lacks a required
feature, nothing is attached. Stopping the agent leaves everything in the kernel as it is; only
`agents.mode: Detach` and `bpfdp cleanup` remove it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from typing import TYPE_CHECKING, Any

from bpfdp_agent import memory
from bpfdp_agent.bpf import features
from bpfdp_agent.config import Config, ConfigError, ProcessSettings, runtime_config
from bpfdp_agent.dataplane.pins import Pins, listing
from bpfdp_agent.model.cluster import ClusterView
from bpfdp_agent.reconcile.loop import Loop
from bpfdp_agent.reconcile.session import Session, detach
from bpfdp_agent.reconcile.surroundings import Surroundings
from bpfdp_agent.serve.events import EventRecorder, ObjectRef, ref_of
from bpfdp_agent.serve.health import Health, HealthServer
from bpfdp_agent.serve.metrics import Metrics, MetricsServer
from bpfdp_agent.serve.nodestatus import FeatureStatus, NodeStatus, NodeStatusWriter
from bpfdp_agent.serve.proxyhealth import ProxyHealth, ProxyHealthServers, ServiceHealth
from bpfdp_agent.watch.connection import connect
from bpfdp_agent.watch.reflector import Reflector
from bpfdp_agent.watch.wire import RESOURCES, Deleted, Event, Kind, Malformed, ObjectKey, Synced

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from bpfdp_agent.watch.connection import Connection

log = logging.getLogger(__name__)

QUEUE_LENGTH = 1000

PROXY_KINDS = {Kind.SERVICE: "service", Kind.ENDPOINT_SLICE: "endpoint"}
"""What kube-proxy counts changes of."""


class Agent:
    """One per node. `run` until cancelled."""

    def __init__(self, settings: ProcessSettings, connection: Connection) -> None:
        self._connection = connection
        self._queue: asyncio.Queue[Event] = asyncio.Queue(QUEUE_LENGTH)
        self._health = Health()
        self._config: Config | None = None
        self._supported = False
        self._session: Session | None = None
        self._malformed: set[tuple[Kind, ObjectKey]] = set()
        metrics = Metrics()
        proxy = ProxyHealth(metrics.proxy)
        status = NodeStatus(settings.version, os.uname().release)
        events = EventRecorder(connection, settings.node_name)
        self._writer = NodeStatusWriter(connection, settings.node_name, status)
        self._around = Surroundings(
            settings=settings,
            view=ClusterView(settings.node_name),
            status=status,
            events=events,
            metrics=metrics,
            proxy=proxy,
            proxy_servers=ProxyHealthServers(proxy, self._port_held),
        )
        metrics.build.info({"version": settings.version})
        self._control = Loop(
            "control", self._follow_config, self._around.metrics, self._around.report
        )

    async def run(self) -> None:
        """Serve until cancelled. Whatever the kernel holds stays there afterwards."""
        async with contextlib.AsyncExitStack() as stack:
            await self._start_servers(stack)
            await self._load_status()
            await self._probe_features()
            try:
                async with asyncio.TaskGroup() as tasks:
                    for work in self._tasks():
                        tasks.create_task(work)
            finally:
                await self._end_session()

    def _tasks(self) -> list[Coroutine[Any, Any, None]]:
        reflectors = [Reflector(r, self._connection, self._queue) for r in RESOURCES.values()]
        return [
            self._writer.run(),
            self._around.events.run(),
            self._around.proxy_servers.run(),
            self._control.run(),
            self._pump(),
            *(reflector.run() for reflector in reflectors),
        ]

    async def _start_servers(self, stack: contextlib.AsyncExitStack) -> None:
        settings = self._around.settings
        if settings.health_port:
            health = HealthServer(self._health, settings.health_port)
            await health.start()
            stack.push_async_callback(health.stop)
        if settings.metrics_port:
            metrics = MetricsServer(self._around.metrics, settings.metrics_port)
            await metrics.start()
            stack.push_async_callback(metrics.stop)

    async def _load_status(self) -> None:
        """What an earlier agent wrote; without the API server there is nothing to do but wait."""
        pause = 1.0
        while True:
            try:
                await self._writer.load()
            except OSError as error:
                log.warning("API server not reached, trying again in %.0f s: %s", pause, error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, 30.0)
            else:
                return

    # -- the kernel's features ------------------------------------------------------------

    async def _probe_features(self) -> None:
        found = await asyncio.to_thread(features.probe, self._around.settings.missing_features)
        missing = features.missing_required(found)
        self._supported = not missing
        status = self._around.status
        status.update(
            features=tuple(
                FeatureStatus(name=f.name, supported=f.supported, message=f.message[:1024])
                for f in found
            )
        )
        self._around.features = frozenset(f.name for f in found if f.supported)
        if self._supported:
            status.condition(
                "FeaturesSupported", True, "Supported", "Every required kernel feature works."
            )
            return
        message = "Missing kernel features: " + "; ".join(
            f"{f.name} ({f.message})" for f in missing
        )
        log.error("%s. This agent attaches nothing on this node.", message)
        status.condition("FeaturesSupported", False, "KernelUnsupported", message)
        if not listing(Pins().links):
            status.condition("Attached", False, "KernelUnsupported", "Nothing is attached.")
        self._health.not_ready = ""

    # -- watching -------------------------------------------------------------------------

    async def _pump(self) -> None:
        """Events into the view; what has arrived together is passed on together."""
        while True:
            synced = self._take(await self._queue.get())
            while not self._queue.empty():
                synced |= self._take(self._queue.get_nowait())
            changes = self._around.view.take_changes()
            if changes.config or synced:
                self._read_config()
                self._control.wake()
            if self._session is not None:
                if changes:
                    self._session.changed(changes)
                if synced:
                    self._session.wake_all()

    def _take(self, event: Event) -> bool:
        """One event into the view; True when it completes a list."""
        view = self._around.view
        match event:
            case Malformed(kind=kind, key=key, error=error):
                self._refuse(kind, key, error)
            case Synced():
                pass
            case Deleted(kind=kind, key=key):
                self._forgive(kind, key)
            case _:
                self._forgive(event.kind, event.object.key)
        view.apply(event)
        if event.kind in PROXY_KINDS and not isinstance(event, Synced):
            self._around.metrics.proxy.changed(PROXY_KINDS[event.kind])
        return isinstance(event, Synced)

    def _refuse(self, kind: Kind, key: ObjectKey, error: str) -> None:
        self._malformed.add((kind, key))
        self._around.invalid(
            ref_of(kind, key), f"cannot be read, its last good version stays: {error}"
        )

    def _forgive(self, kind: Kind, key: ObjectKey) -> None:
        if (kind, key) in self._malformed:
            self._malformed.discard((kind, key))
            self._around.valid(ref_of(kind, key))

    # -- the config -----------------------------------------------------------------------

    def _read_config(self) -> None:
        """The config as the agent runs it; a bad one leaves the last good one running."""
        found = self._around.view.config
        if found is None:
            return
        try:
            config = runtime_config(found)
        except ConfigError as error:
            log.error("BpfDataplaneConfig default: %s", error)
            ref = ref_of(Kind.CONFIG, found.key)
            self._around.status.error("InvalidConfiguration", str(error), str(ref))
            self._around.events.warning(ref, "InvalidConfiguration", str(error))
            return
        self._around.status.clear_error(str(ref_of(Kind.CONFIG, found.key)))
        if config != self._config:
            logging.getLogger().setLevel(config.log_level)
            self._config = config

    async def _follow_config(self) -> int:
        config = self._config
        if config is None:
            return 0
        if config.detach:
            await self._detach(config)
        elif self._supported:
            await self._attach(config)
        self._around.status.set_generation(config.generation)
        return 0

    async def _attach(self, config: Config) -> None:
        if self._session is not None and self._session.map_sizes != config.map_sizes:
            log.info("map sizes changed: the maps are copied, the programs loaded anew")
            await self._session.stop()
            self._session = None
        session = self._session or await self._begin(config)
        session.configure(config)

    async def _begin(self, config: Config) -> Session:
        session = self._session = Session(self._around, self._health, config)
        try:
            await session.start()
        except BaseException:
            self._session = None
            await session.stop()
            raise
        return session

    async def _detach(self, config: Config) -> None:
        session, detached = self._session, self._around.status.get("Attached")
        if session is None and detached and detached.reason == "Detached":
            self._health.not_ready = ""
            return
        try:
            await detach(self._around, self._health, config, session)
        finally:
            if session is not None and session.stopped:
                self._session = None  # also where cleaning failed: Attach needs a new one

    async def _end_session(self) -> None:
        if self._session is not None:
            await self._session.stop()

    def _port_held(self, service: ServiceHealth, error: OSError) -> None:
        """As kube-proxy says it."""
        ref = ObjectRef("v1", "Service", service.name, service.namespace)
        self._around.events.warning(
            ref,
            "FailedToStartServiceHealthcheck",
            f"cannot listen on healthCheckNodePort {service.port} of this node: {error}",
        )


async def run_agent(settings: ProcessSettings) -> None:
    """Run until SIGTERM or SIGINT. Raises ConnectionError when no API server is configured."""
    memory.prepare()
    connection = await connect()
    task = asyncio.ensure_future(Agent(settings, connection).run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        log.info("stopped; the dataplane goes on without the agent")
    finally:
        await connection.close()

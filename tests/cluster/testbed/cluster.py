# SPDX-License-Identifier: Apache-2.0
"""Bringing the cluster up and down, and the API that tests use."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from cluster.testbed import (
    addons,
    cgroups,
    controlplane,
    forward,
    hosts,
    images,
    machine,
    network,
    node,
    pki,
)
from cluster.testbed.commands import run, wait_for
from cluster.testbed.errors import TestbedError
from cluster.testbed.progress import say, step
from cluster.testbed.settings import (
    API_PORT,
    BIN,
    CLIENT,
    CONTROL_PLANE,
    FORWARD_PORT,
    GATEWAY,
    KUBECONFIG,
    LOGS,
    REPO,
    RUN,
    STATE,
    Node,
    Settings,
    nodes,
)

_SETTINGS = STATE / "settings.json"
_UP = RUN / "up"
_Item = TypeVar("_Item")


def up(settings: Settings, preload: Sequence[Path] = ()) -> None:
    """Bring the cluster up to Ready nodes and running addons; nothing to do when it is up.

    The docker-archives in `preload` are on every node from the start.
    """
    machine.check()
    if is_up():
        say(f"the cluster is up ({json.dumps(running_settings().__dict__)})")
        if running_settings() != settings:
            raise TestbedError(
                f"it is not the one asked for: {settings}; `make cluster-down` first"
            )
        return
    down()
    machine.claim()
    seed = images.seed(preload)
    members = nodes(settings.nodes)
    with step(
        f"cluster of {settings.nodes} nodes (CNI {settings.cni}, kube-proxy {settings.proxy},"
        f" {settings.networks} networks{', strict' if settings.strict else ''})"
    ):
        _start_hosts(members, settings)
        pki.create(members)
        controlplane.start()
        _on_each(members, lambda member: node.start_runtime(member, seed, settings.cni))
        _start_forward()
        with step("waiting for the API server"):
            controlplane.wait_ready()
        _kubectl_apply(node.manifests(members))
        _on_each(members, node.start_kubelet)
        _kubectl_apply(addons.manifests(settings.proxy))
        with step("waiting for nodes and addons"):
            _wait_ready()
    _SETTINGS.write_text(json.dumps(settings.__dict__))
    _UP.touch()


def _start_hosts(members: Sequence[Node], settings: Settings) -> None:
    everyone = [GATEWAY, CONTROL_PLANE, CLIENT, *members]
    for host in everyone:
        cgroups.create(host.name)
    _on_each(everyone, lambda host: hosts.start(host.name))
    network.connect(members, settings)


def _on_each(items: Sequence[_Item], action: Callable[[_Item], object]) -> None:
    with ThreadPoolExecutor(len(items)) as pool:
        list(pool.map(action, items))


def _start_forward() -> None:
    port = _free_port()
    pid = hosts.init_pid(CONTROL_PLANE.name)
    argv = [sys.executable, forward.__file__, str(port), f"/proc/{pid}/ns/net"]
    hosts.start_outside(CONTROL_PLANE.name, "forward", [*argv, CONTROL_PLANE.v4, str(API_PORT)])
    pki.kubeconfig(KUBECONFIG, "admin", f"https://127.0.0.1:{port}")
    (RUN / "port").write_text(str(port))
    wait_for("the forward to the API server", lambda: _listens(port), 20, f"See {LOGS}", pause=0.05)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    """The usual port, so that a kubeconfig in use stays right; any other when that is taken."""
    for port in (FORWARD_PORT, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise TestbedError("no free port on 127.0.0.1")


def _kubectl(*args: str, stdin: str | None = None, timeout: float = 120) -> str:
    command = [BIN / "kubectl", f"--kubeconfig={KUBECONFIG}", *args]
    return run(command, stdin=stdin, timeout=timeout, hint=f"Logs are in {LOGS}")


def _kubectl_apply(text: str) -> None:
    _kubectl("apply", "--server-side", "--validate=false", "-f", "-", stdin=text)


def _wait_ready() -> None:
    _kubectl("wait", "--for=condition=Ready", "nodes", "--all", "--timeout=90s")
    system = ["--namespace=kube-system", "rollout", "status", "--timeout=90s"]
    _kubectl(*system, "daemonset/kube-proxy")
    _kubectl(*system, "deployment/coredns")


def is_up() -> bool:
    """Whether this checkout's cluster was brought up to the end and its API server answers."""
    if machine.owner() != REPO or not _UP.exists():
        return False
    expected = [CONTROL_PLANE, CLIENT, *nodes(running_settings().nodes)]
    return all(hosts.is_up(host.name) for host in expected) and controlplane.is_ready()


def running_settings() -> Settings:
    """What the running cluster was brought up with."""
    return Settings(**json.loads(_SETTINGS.read_text()))


def down() -> None:
    """Stop every process of the testbed and remove what it left; harmless when nothing runs."""
    if (owner := machine.owner()) and owner != REPO:
        raise TestbedError(f"the cluster belongs to {owner}: run `make cluster-down` there")
    if owner is None and not cgroups.processes() and not (STATE / "hosts").exists():
        return
    with step("taking the cluster down"):
        for host in sorted(path.name for path in (STATE / "hosts").glob("*")):
            hosts.remove_pins(host)
        cgroups.kill_all()
        cgroups.remove()
        run(["rm", "-rf", STATE])  # several times quicker than rmtree on this many files
        machine.release()


class Testbed:
    """A running cluster as tests see it; every method blocks, and raises TestbedError on failure."""

    __test__ = False  # the name is not a pytest class

    def __init__(self) -> None:
        if not is_up():
            raise TestbedError("no cluster is up: run `make cluster`")
        self.settings = running_settings()
        self.nodes: list[Node] = nodes(self.settings.nodes)
        self.kubeconfig: Path = KUBECONFIG
        self.client_v4: str = CLIENT.v4
        self.client_v6: str = CLIENT.v6
        self.control_plane_v4: str = CONTROL_PLANE.v4

    def node(self, name: str) -> Node:
        """The node of that name."""
        return next(node for node in self.nodes if node.name == name)

    def node_exec(
        self, node: Node | str, argv: Sequence[str], *, timeout: float = 60, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on a node: its namespaces, its cgroup, its bpffs."""
        return self._execute(node if isinstance(node, str) else node.name, argv, timeout, check)

    def client_exec(
        self, argv: Sequence[str], *, timeout: float = 60, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on the outside client, which knows no pod or service route."""
        return self._execute(CLIENT.name, argv, timeout, check)

    @staticmethod
    def _execute(
        host: str, argv: Sequence[str], timeout: float, check: bool
    ) -> subprocess.CompletedProcess[str]:
        done = hosts.execute(host, argv, timeout=timeout)
        if check and done.returncode:
            raise TestbedError(
                f"{host}: {' '.join(argv)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done

    def client_start(self, argv: Sequence[str]) -> subprocess.Popen[str]:
        """Start a server on the outside client; the caller terminates it."""
        return self.start(CLIENT.name, argv)

    def start(self, host: str, argv: Sequence[str]) -> subprocess.Popen[str]:
        """Start a program on a node or the client, with its output on a pipe."""
        return subprocess.Popen(
            hosts.enter(host, argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd="/",
        )

    def kubectl(self, *args: str, stdin: str | None = None, timeout: float = 120) -> str:
        """Run kubectl as the cluster's administrator; returns stdout."""
        return _kubectl(*args, stdin=stdin, timeout=timeout)

    def helm(self, *args: str, timeout: float = 600) -> str:
        """Run Helm as the cluster's administrator; returns stdout."""
        return run([BIN / "helm", *args], env=self.environment(), timeout=timeout)

    def environment(self) -> Mapping[str, str]:
        """This process's environment with the cluster's KUBECONFIG and programs."""
        path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
        return {**os.environ, "KUBECONFIG": str(KUBECONFIG), "PATH": path}

    def load_image(self, archive: Path) -> None:
        """Import a docker-archive on every node, as if each had pulled it."""
        _on_each(self.nodes, lambda member: node.import_image(member, archive))

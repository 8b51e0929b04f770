# SPDX-License-Identifier: Apache-2.0
"""What the agent costs at 10,000 services, on one machine without a cluster.

A real etcd and kube-apiserver with services of five endpoints each, and the real agent, all in
network, mount and cgroup namespaces of their own. Writes build/results/bench-agent.json: a list of
{name, value, unit, must, conditions}. Needs root. `--services 1000 --seconds 10` for a quick look.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "nodeagent"))

import aiohttp  # noqa: E402
from bpfdp_agent.bpf import mounts, syscall  # noqa: E402
from bpfdp_agent.bpf.cache import ObjectCache  # noqa: E402
from bpfdp_agent.bpf.compiler import Compiler  # noqa: E402
from bpfdp_agent.bpf.precompile import precompile  # noqa: E402
from bpfdp_agent.config import DataplaneSpec, _map_sizes  # noqa: E402
from bpfdp_agent.dataplane.maps import MapStore  # noqa: E402
from bpfdp_agent.dataplane.pins import Pins  # noqa: E402

ENDPOINTS = 5
NODE, NODE_ADDRESS = "bench", "192.0.2.1"
PLACES = ("192.0.2.11", "192.0.2.12")
PROBED = "probed"
PORT = 8080
CGROUP = "bpfdp-bench-agent"
MIB = 1 << 20


# -- namespaces ------------------------------------------------------------------------------


def enter_namespaces() -> None:
    """Start this program again in namespaces of its own."""
    unified = mounts.cgroup2_root()
    if unified is None:
        raise SystemExit("no cgroup2 hierarchy is mounted")
    group = unified / CGROUP
    group.mkdir(exist_ok=True)
    (group / "cgroup.procs").write_text(str(os.getpid()))
    script = (
        "umount -R -l /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup"
        " && mount -t bpf none /sys/fs/bpf && ip link set lo up && ip link add eth0 type veth peer name eth1 && ip link set eth1 up"
        " && ip link set eth0 up && ip addr add " + NODE_ADDRESS + "/24 dev eth0"
        + "".join(f" && ip addr add {a}/24 dev eth0" for a in PLACES)
        + " && ip route add default dev eth0 && exec \"$@\""
    )  # fmt: skip
    inside = ["unshare", "--net", "--mount", "--cgroup", "sh", "-ec", script, "sh"]
    environment = {**os.environ, "BENCH_AGENT_INSIDE": "1"}
    status = subprocess.run([*inside, sys.executable, *sys.argv], env=environment, check=False)
    (unified / "cgroup.procs").write_text(str(os.getpid()))
    group.rmdir()
    sys.exit(status.returncode)


# -- the API server --------------------------------------------------------------------------


def api_tools() -> Any:
    """tests/api/conftest.py, which knows how to start an API server."""
    spec = importlib.util.spec_from_file_location("api_conftest", REPO / "tests/api/conftest.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def api_server(directory: Path) -> Iterator[tuple[Any, str]]:
    """etcd and kube-apiserver with our CRDs; and where etcd is."""
    tools = api_tools()
    etcd, peer, port = tools.free_port(), tools.free_port(), tools.free_port()
    server = f"https://127.0.0.1:{port}"
    kubeconfig = tools.write_kubeconfig(directory / "kubeconfig", server, tools.TOKEN)
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in tools.command_lines(directory, etcd, peer, port).items():
            more = [] if name == "etcd" else ["--max-requests-inflight=2000",
                                              "--enable-priority-and-fairness=false"]  # fmt: skip
            with (directory / name).open("wb") as log:
                processes[name] = subprocess.Popen([*command, *more], stdout=log, stderr=log)
        tools.wait_until_ready(server, processes, directory)
        api = tools.Api(server, kubeconfig)
        for path in sorted((REPO / "crds").glob("*.yaml")):
            assert api.kubectl("apply", "--server-side", "-f", str(path)).returncode == 0
        api.kubectl("wait", "--for=condition=Established", "--timeout=30s", "crd", "--all")
        yield api, f"http://127.0.0.1:{etcd}"
    finally:
        for process in reversed(processes.values()):
            process.terminate()
            process.wait(timeout=20)


def service(number: int) -> dict[str, Any]:
    return {
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name_of(number), "namespace": "default"},
        "spec": {"clusterIP": cluster_ip(number), "ports": [{"name": "http", "port": 80, "targetPort": PORT}]},
    }  # fmt: skip


def name_of(number: int) -> str:
    """Of service and slice; all but the first have the same length."""
    return f"s{number:05}" if number else PROBED


def cluster_ip(number: int) -> str:
    """Up to 10,000, all of the same length."""
    return f"10.96.{100 + number // 100}.{100 + number % 100}"


def endpoint_slice(number: int, addresses: list[str]) -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": name_of(number), "namespace": "default",
                     "labels": {"kubernetes.io/service-name": name_of(number)}},
        "ports": [{"name": "http", "port": PORT, "protocol": "TCP"}],
        "endpoints": [{"addresses": [a], "conditions": {"ready": True}, "nodeName": "other",
                       "targetRef": {"kind": "Pod", "namespace": "default", "name": f"p-{a}"}}
                      for a in addresses],
    }  # fmt: skip


def addresses_of(number: int, shift: int = 0) -> list[str]:
    """Five addresses that no other service has; the last differs with `shift`."""
    last = [*range(ENDPOINTS - 1), ENDPOINTS - 1 + shift % 2]
    return [f"10.{150 + n}.{100 + number // 100}.{100 + number % 100}" for n in last]


class Writer:
    """Writes objects, many at once."""

    def __init__(self, session: aiohttp.ClientSession, server: str) -> None:
        self._session, self._server = session, server

    async def send(self, method: str, path: str, body: object) -> None:
        async with self._session.request(method, self._server + path, json=body) as answer:
            text = await answer.text()
            if answer.status >= 300:
                raise SystemExit(f"{method} {path}: {answer.status} {text[:300]}")

    async def slice(self, number: int, addresses: list[str], method: str = "PUT") -> None:
        base = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
        path = base if method == "POST" else f"{base}/{name_of(number)}"
        await self.send(method, path, endpoint_slice(number, addresses))

    async def fill(self, etcd: str, count: int) -> None:
        """Number 0 and 1 by the API; the others as copies of 1 in etcd, which is far quicker."""
        for number in (0, 1):
            await self.send("POST", "/api/v1/namespaces/default/services", service(number))
            addresses = addresses_of(number) if number else [PLACES[0]]
            await self.slice(number, addresses, "POST")
        async with aiohttp.ClientSession() as session:  # etcd does not like our token
            for path in ("services/specs", "endpointslices"):
                await self._copy(session, etcd, f"/registry/{path}/default/", count)

    @staticmethod
    async def _copy(session: aiohttp.ClientSession, etcd: str, prefix: str, count: int) -> None:
        """Texts of the same length are exchanged, so that the protobuf stays one."""
        key = base64.b64encode((prefix + name_of(1)).encode()).decode()
        async with session.post(f"{etcd}/v3/kv/range", json={"key": key}) as answer:
            found = await answer.json()
        if not found.get("kvs"):
            raise SystemExit(f"etcd has no {prefix}{name_of(1)}: {found}")
        value = base64.b64decode(found["kvs"][0]["value"])
        for first in range(2, count, 100):
            puts = [
                {
                    "requestPut": {
                        "key": base64.b64encode((prefix + name_of(n)).encode()).decode(),
                        "value": base64.b64encode(renumbered(value, n)).decode(),
                    }
                }
                for n in range(first, min(first + 100, count))
            ]
            async with session.post(f"{etcd}/v3/kv/txn", json={"success": puts}) as answer:
                if answer.status != 200:
                    raise SystemExit(f"etcd: {await answer.text()}")


def renumbered(value: bytes, number: int) -> bytes:
    """Service 1 or its slice as number `number`."""
    texts = list(zip(texts_of(1), texts_of(number), strict=True))
    for old, new in texts:
        value = value.replace(old.encode(), new.encode())
    return value


def texts_of(number: int) -> list[str]:
    """What differs between services, of the same length in all."""
    return [name_of(number), cluster_ip(number), *addresses_of(number)]


# -- the agent -------------------------------------------------------------------------------


class Agent:
    """The real process; `directory` has its state and its log."""

    def __init__(self, kubeconfig: Path, directory: Path, profile: Path | None) -> None:
        environment = {
            **os.environ, "NODE_NAME": NODE, "NODE_IPS": NODE_ADDRESS,
            "KUBECONFIG": str(kubeconfig), "BPFDP_STATE_DIR": str(directory / "state"),
            "BPFDP_BYTECODE": str(REPO / "build/bench-bytecode"),
            "PYTHONPATH": f"{REPO / 'nodeagent'}:{os.environ.get('PYTHONPATH', '')}", "HOME": str(directory),
        }  # fmt: skip
        tracing = ["-m", "cProfile", "-o", str(profile)] if profile else []
        command = [sys.executable, *tracing, "-m", "bpfdp_agent", "agent"]
        self.log = directory / "agent.log"
        self.started = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    async def ready(self, session: aiohttp.ClientSession, limit: float = 120) -> float:
        """Seconds until /readyz is 200."""
        while time.monotonic() - self.started < limit:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get("http://127.0.0.1:9099/readyz") as answer:
                    if answer.status == 200:
                        return time.monotonic() - self.started
            await asyncio.sleep(0.02)
        raise SystemExit(f"the agent did not become ready: {self.log.read_text()[-4000:]}")

    def pids(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [self.process.pid, *map(int, children.split())]

    def pss(self) -> float:
        """MiB over all its processes."""
        total = 0
        for pid in self.pids():
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
        return total / 1024

    def cpu(self) -> float:
        """Seconds of it and its children so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)


# -- measures --------------------------------------------------------------------------------


def maps_mib() -> tuple[float, list[str]]:
    """Kernel memory of empty maps at the CR's default sizes, and the largest of them."""
    store = MapStore(Pins(), sizes=dict(_map_sizes(DataplaneSpec())))
    store.open()
    sizes = {}
    for each in store.all():
        info = Path(f"/proc/self/fdinfo/{each.descriptor}").read_text()
        sizes[each.name] = int(info.partition("memlock:")[2].split()[0]) / MIB
    store.close()
    for pin in Pins().maps.iterdir():
        pin.unlink()
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:6]
    return sum(sizes.values()), [f"{name} {size:.1f}" for name, size in largest]


class Backends:
    """Listeners at both places; `changed(place)` waits for a connection that ends there."""

    def __init__(self) -> None:
        for place in PLACES:
            listener = socket.create_server((place, PORT), backlog=512)
            threading.Thread(target=self._serve, args=(listener, place), daemon=True).start()

    @staticmethod
    def _serve(listener: socket.socket, place: str) -> None:
        while True:
            with listener.accept()[0] as connection, contextlib.suppress(OSError):
                connection.sendall(place.encode())

    @staticmethod
    def reached(address: str) -> str:
        with contextlib.suppress(OSError), socket.create_connection((address, 80), 1) as found:
            return found.recv(64).decode()
        return ""


async def endpoint_changes(writer: Writer, address: str, rounds: int) -> list[float]:
    """Milliseconds from sending the slice to the first connection that ends at its place."""
    found = []
    for number in range(rounds):
        place = PLACES[(number + 1) % 2]
        started = time.monotonic()
        sent = asyncio.create_task(writer.slice(0, [place]))
        while await asyncio.to_thread(Backends.reached, address) != place:
            if time.monotonic() - started > 10:
                raise SystemExit("the new backend was not reached in 10 s")
            await asyncio.sleep(0.001)
        found.append((time.monotonic() - started) * 1000)
        await sent
        await asyncio.sleep(0.15)
    return found


async def churn(writer: Writer, agent: Agent, seconds: int) -> tuple[float, float]:
    """CPU seconds per second at rest, and CPU milliseconds per change beyond that."""
    before = agent.cpu()
    await asyncio.sleep(seconds)
    rest = (agent.cpu() - before) / seconds
    before = agent.cpu()
    for number in range(seconds):
        await writer.slice(7, addresses_of(7, number + 1))
        await asyncio.sleep(1)
    return rest, ((agent.cpu() - before) / seconds - rest) * 1000


async def measure(
    api: Any, etcd: str, directory: Path, options: argparse.Namespace
) -> list[dict[str, Any]]:
    where = f"{options.services} services x {ENDPOINTS} endpoints, {os.cpu_count()} cores"
    results = []

    def tell(name: str, value: float, unit: str, must: str, more: str = "") -> None:
        conditions = f"{where}{', ' if more else ''}{more}"
        print(f"{name:24} {value:9.2f} {unit:4} (must be {must}) {more}", flush=True)
        results.append({"name": name, "value": round(value, 3), "unit": unit, "must": must,
                        "conditions": conditions})  # fmt: skip

    size, largest = maps_mib()
    tell("maps_mib", size, "MiB", "<= 120", "empty, default sizes; " + ", ".join(largest))
    headers = {"Authorization": f"Bearer {api_tools().TOKEN}"}
    async with aiohttp.ClientSession(
        headers=headers, connector=aiohttp.TCPConnector(ssl=False, limit=0)
    ) as session:
        writer = Writer(session, api.server)
        await writer.send("POST", "/api/v1/nodes", node())
        started = time.monotonic()
        await writer.fill(etcd, options.services)
        print(f"filled in {time.monotonic() - started:.1f} s", flush=True)
        await asyncio.sleep(options.settle)  # the API server has its caches to fill
        config = {"apiVersion": "bpfdataplane.io/v1alpha1", "kind": "BpfDataplaneConfig",
                  "metadata": {"name": "default"}, "spec": {}}  # fmt: skip
        await writer.send("POST", "/apis/bpfdataplane.io/v1alpha1/bpfdataplanes", config)
        agent = Agent(api.kubeconfig, directory, options.profile)
        try:
            await measure_agent(agent, session, writer, api, options, tell)
        finally:
            agent.stop()
            (REPO / "build/results/bench-agent.log").write_bytes(agent.log.read_bytes())
    return results


async def measure_agent(  # noqa: PLR0917
    agent: Agent,
    session: aiohttp.ClientSession,
    writer: Writer,
    api: Any,
    options: argparse.Namespace,
    tell: Any,
) -> None:
    seconds = await agent.ready(session)
    pin = next(Pins().maps.glob("slots4*"), None)
    if pin is None:
        raise SystemExit(f"the agent attached nothing: {agent.log.read_text()[-4000:]}")
    slots = syscall.map_count(syscall.obj_get(pin))
    wanted = (options.services - 1) * ENDPOINTS + 1
    if slots < wanted:
        raise SystemExit(f"ready with {slots} of {wanted} slots")
    tell("cold_start_s", seconds, "s", "<= 5", f"{slots} slots, {agent.cpu():.1f} s of CPU")
    await asyncio.sleep(options.settle)
    tell("agent_pss_mib", agent.pss(), "MiB", "<= 150", f"settled {options.settle} s")
    Backends()
    found = api.get("service", PROBED)
    changes = await endpoint_changes(writer, found["spec"]["clusterIP"], options.rounds)
    p99 = sorted(changes)[min(len(changes) - 1, int(len(changes) * 0.99))]
    more = f"p50 {statistics.median(changes):.1f}, {len(changes)} changes"
    tell("endpoint_change_p99_ms", p99, "ms", "<= 100", more)
    rest, per_change = await churn(writer, agent, options.seconds)
    tell("rest_cpu", rest * 1000, "ms/s", "near 0")
    tell("churn_cpu", per_change, "ms", "<= 10", "per change, rest subtracted")
    tell("agent_pss_mib_after", agent.pss(), "MiB", "<= 150", "after the churn")


def node() -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE},
            "spec": {"podCIDRs": ["10.244.0.0/24"]}}  # fmt: skip


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--services", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=100, help="endpoint changes")
    parser.add_argument("--seconds", type=int, default=30, help="of rest, and of churn")
    parser.add_argument("--settle", type=int, default=20, help="seconds before memory is read")
    parser.add_argument("--profile", type=Path, help="run the agent under cProfile")
    options = parser.parse_args()
    if "BENCH_AGENT_INSIDE" not in os.environ:
        enter_namespaces()
    asyncio.run(precompile(Compiler(ObjectCache(REPO / "build/bench-bytecode"))))
    with tempfile.TemporaryDirectory(prefix="bench-agent-") as name:
        directory = Path(name)
        with api_server(directory) as (api, etcd):
            results = asyncio.run(measure(api, etcd, directory, options))
    target = REPO / "build/results/bench-agent.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

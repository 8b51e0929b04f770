# SPDX-License-Identifier: Apache-2.0
"""Nodes to run packets through: real maps and programs, PROG_TEST_RUN instead of devices.

A test run moves no packet: a redirect only shows as REDIRECT. Where it would have gone is in the
flow's conntrack entry, and the story feeds the packet to the next hook itself.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import struct
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpf.frames import Frame, raw, read
from bpfdp_agent import catalog, layouts
from bpfdp_agent.bpf import syscall
from bpfdp_agent.bpf.cache import ObjectCache
from bpfdp_agent.bpf.compiler import Compiler
from bpfdp_agent.bpf.objects import Function, Source
from bpfdp_agent.bpf.render import Renderer
from bpfdp_agent.bpf.syscall import AttachType, ProgramType
from bpfdp_agent.dataplane.maps import OpenMap, create_map
from bpfdp_agent.dataplane.programs import load, set_slot

ROOT = Path(__file__).resolve().parents[2]
STACK, SHOT, REDIRECT = -1, 2, 7
VERDICTS = {STACK & 0xFFFFFFFF: "STACK", SHOT: "DROP", REDIRECT: "REDIRECT"}
MAP_SIZE = 1024
CONTEXT_SIZE = 192
_PKT_TYPE, _MARK, _INGRESS_IFINDEX, _IFINDEX = 4, 8, 36, 40

COOKIE_OF_NO_NETNS = 0xFFFF_FFFF_0000_0000


def compile_sources(sources: list[Source]) -> list[dict[str, Function]]:
    """Functions by name of each text, from the build's cache where they are."""
    compiler = Compiler(ObjectCache(ROOT / "build" / "bytecode"), workers=1)
    return [compiled.functions for compiled in asyncio.run(compiler.compile(sources))]


def compile_template(template: str, family: int, **variables: Any) -> dict[str, Function]:
    text = Renderer(ROOT / "bpf_templates").render(template, family=family, **variables)
    return compile_sources([Source(f"{Path(template).stem}{family}", text)])[0]


class Netns:
    """A network namespace with the node's devices and routes, entered by one thread."""

    DEVICES = ("data0", "data1", "overlay0", "podx", "pody", "vxlan0")

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bpf-netns")
        self.ifindex: dict[str, int] = self.run(self._make)

    def run(self, work: Any, *arguments: Any) -> Any:
        return self._thread.submit(work, *arguments).result()

    def close(self) -> None:
        self._thread.shutdown()

    def _make(self) -> dict[str, int]:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(0x40000000) != 0:
            raise OSError(ctypes.get_errno(), "unshare: run the tests as root")
        for name in self.DEVICES:
            _ip(f"link add {name} type veth peer name {name}p")
            _ip(f"link set {name}p up")
            _ip(f"link set {name} up")
        for setting in ("ipv4/conf/all", "ipv6/conf/all"):
            Path("/proc/sys/net", setting, "forwarding").write_text("1")
        _ip("addr add 10.0.0.1/24 dev data0")
        _ip("route add default via 10.0.0.254 dev data0")
        _ip("route add 10.1.2.0/24 via 10.0.0.2 dev data0")
        _ip("addr add 10.0.1.1/24 dev data1")
        _ip("route add 198.18.0.0/15 via 10.0.1.254 dev data1")
        _ip("addr add 10.1.1.0/32 dev overlay0")
        _ip("route add 10.1.3.0/24 via 10.1.3.0 dev overlay0 onlink")
        _ip("-6 addr add fd00:1::1/64 dev data1 nodad")
        _ip("-6 route add 2001:db8:2::/48 via fd00:1::fe dev data1")
        _ip("-6 addr add fd01:1::/128 dev overlay0 nodad")
        _ip("-6 route add fd01:3::/64 via fd01:3:: dev overlay0 onlink")
        _ip("link set overlay0 mtu 1450")
        _ip("-6 addr add fd00::1/64 dev data0 nodad")
        _ip("-6 route add default via fd00::fe dev data0")
        _ip("-6 route add fd01:2::/64 via fd00::2 dev data0")
        return {name: socket.if_nametoindex(name) for name in self.DEVICES}


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True)


@dataclass(frozen=True)
class Result:
    """What became of a packet. `action` and `entry`: of its flow's conntrack entry afterwards."""

    verdict: str
    frame: Frame
    context: bytes
    entry: dict[str, Any] | None

    @property
    def action(self) -> str:
        return layouts.Action(self.entry["action"]).name if self.entry else "NONE"

    @property
    def mark(self) -> int:
        return struct.unpack_from("=I", self.context, _MARK)[0]


@dataclass(frozen=True)
class Addresses:
    """The cast, in one family."""

    family: int
    node_a: str
    node_b: str
    gateway: str
    pod_x: str  # on A
    pod_y: str  # on A
    pod_z: str  # on B
    client: str  # outside
    service: str
    external: str


CAST = {
    4: Addresses(
        4,
        "10.0.0.1",
        "10.0.0.2",
        "10.0.0.254",
        "10.1.1.2",
        "10.1.1.3",
        "10.1.2.2",
        "192.0.2.9",
        "10.96.0.10",
        "198.51.100.7",
    ),
    6: Addresses(
        6,
        "fd00::1",
        "fd00::2",
        "fd00::fe",
        "fd01:1::2",
        "fd01:1::3",
        "fd01:2::2",
        "2001:db8::9",
        "fd96::10",
        "2001:db8:7::7",
    ),
}


class Node:
    """One node's maps and tc programs in one family."""

    def __init__(
        self,
        family: int,
        netns: Netns,
        functions: dict[str, Function],
        arrive: dict[str, Function],
        size: int = MAP_SIZE,
    ) -> None:
        self.family = family
        self.netns = netns
        self.cast = CAST[family]
        self.maps: dict[str, OpenMap] = {
            each.name: create_map(each, family, max_entries=min(each.max_entries, size))
            for each in layouts.MAPS
        }
        self._descriptors = {name: each.descriptor for name, each in self.maps.items()}
        self._programs: dict[str, int] = {}
        for each in catalog.PROGRAMS:
            if each.family == family and each.program_type == catalog.SCHED_CLS:
                self.load(functions[each.name])
                if each.slot is not None:
                    array = "jumps" if each.attachment is catalog.Attachment.JUMP else "policy"
                    set_slot(self._descriptors[array], each.slot, self._programs[each.name])
        self._onward = syscall.map_create(layouts.MapType.PROG_ARRAY, 4, 4, 1, name="onward")
        set_slot(self._onward, 0, self._programs["from_tunnel"])
        name = f"arrive{family}"
        self._programs[name] = syscall.prog_load(
            ProgramType.SCHED_CLS, arrive[name].with_maps({"onward": self._onward}), name=name
        )

    def load(self, function: Function) -> int:
        self._programs[function.name] = load(
            function, self._descriptors, ProgramType.SCHED_CLS, AttachType.NONE
        ).descriptor
        return self._programs[function.name]

    def close(self) -> None:
        for descriptor in (*self._programs.values(), self._onward):
            os.close(descriptor)
        for each in self.maps.values():
            each.close()

    def program(self, name: str) -> int:
        return self._programs[name]

    # -- maps

    def reset(self) -> None:
        """Empty every map but the prog arrays' built-in slots; zero the counters."""
        for each in self.maps.values():
            if (
                each.layout.type is layouts.MapType.PROG_ARRAY
                or each.layout.type is layouts.MapType.ARRAY
            ):
                continue
            if each.layout.type is layouts.MapType.PERCPU_ARRAY:
                for index in range(each.info.max_entries):
                    syscall.map_update(
                        each.descriptor, struct.pack("=I", index), bytes(each.info.value_bytes)
                    )
                continue
            for key in each.read():
                syscall.map_delete(each.descriptor, key)

    def forget_flows(self) -> None:
        table = self.maps["ct"].descriptor
        syscall.map_delete_all(table, list(self.maps["ct"].read()))

    def put(self, name: str, key: dict[str, Any], **value: Any) -> None:
        layout = self.maps[name].layout
        syscall.map_update(
            self.maps[name].descriptor,
            layout.key.pack(self.family, **key),
            layout.value.pack(self.family, **value),
        )

    def delete(self, name: str, **key: Any) -> bool:
        layout = self.maps[name].layout
        return syscall.map_delete(self.maps[name].descriptor, layout.key.pack(self.family, **key))

    def counters(self) -> dict[str, int]:
        """Those that are not zero."""
        found = {}
        table = self.maps["counters"]
        for counter in layouts.Counter:
            data = syscall.map_lookup(
                table.descriptor, struct.pack("=I", counter), table.info.value_bytes
            )
            assert data is not None
            total = sum(struct.unpack(f"={len(data) // 8}Q", data))
            if total:
                found[counter.name] = total
        return found

    def flow(self, packet: Frame) -> dict[str, Any] | None:
        """The conntrack entry under the packet's own key."""
        sport, dport = packet.sport, packet.dport
        if packet.proto in (1, 58):
            sport, dport = packet.icmp[2] >> 16, 0
        key = layouts.CT_KEY.pack(
            self.family,
            src=raw(packet.src),
            dst=raw(packet.dst),
            sport=sport,
            dport=dport,
            proto=packet.proto,
        )
        data = syscall.map_lookup(self.maps["ct"].descriptor, key, self.maps["ct"].info.value_bytes)
        return None if data is None else layouts.CT.unpack(self.family, data)

    def age(self, packet: Frame, seconds: float = 2.0) -> None:
        """Make the entry's last check lie that far back."""
        entry = self.flow(packet)
        assert entry is not None
        entry["checked"] = time.clock_gettime_ns(time.CLOCK_MONOTONIC) - int(seconds * 1e9)
        key = layouts.CT_KEY.pack(
            self.family,
            src=raw(packet.src),
            dst=raw(packet.dst),
            sport=packet.sport,
            dport=packet.dport,
            proto=packet.proto,
        )
        syscall.map_update(self.maps["ct"].descriptor, key, layouts.CT.pack(self.family, **entry))

    # -- the node as the control plane would describe it

    def configure(self, name: str, *, flags: int = 0) -> None:
        own = self.cast.node_a if name == "A" else self.cast.node_b
        value: dict[str, Any] = {"node4": raw(own)} if self.family == 4 else {"node6": raw(own)}
        self.put(
            "settings",
            {"index": 0},
            host_netns_cookie=COOKIE_OF_NO_NETNS,
            data_ifindex=self.netns.ifindex["data0"],
            tunnel_ifindex=self.netns.ifindex["vxlan0"],
            tunnel_vni=4096,
            tunnel_port=4789,
            overlay_port=8472,
            flags=flags,
            **value,
        )
        for device in {"data0", "data1", "overlay0"} & self.netns.ifindex.keys():
            self.put("interfaces", {"index": self.netns.ifindex[device]}, value=1)
        self.put("own_addresses", {"addr": raw(own)}, value=1)
        for each in (self.cast.node_a, self.cast.node_b):
            served = layouts.NodeFlag.KNOWN | layouts.NodeFlag.PORTS
            self.put("nodes", {"addr": node_bytes(each)}, value=int(served))
            self.put("identities", {"addr": raw(each)}, id=2, flags=int(layouts.IdentityFlag.NODE))
        for number, pod in enumerate((self.cast.pod_x, self.cast.pod_y, self.cast.pod_z)):
            self.put(
                "identities",
                {"addr": raw(pod)},
                id=10 + number,
                flags=int(layouts.IdentityFlag.POD),
            )

    def pod(self, address: str, device: str, *, ingress: int = 0, egress: int = 0) -> None:
        self.put(
            "endpoints",
            {"addr": raw(address)},
            ifindex=self.netns.ifindex[device],
            ingress_slot=ingress,
            egress_slot=egress,
        )

    def service(
        self,
        frontends: list[tuple[str | None, int]],
        backends: list[tuple[str, int, str | None]],
        *,
        proto: int = 6,
        service: int = 7,
        local: list[int] | None = None,
        flags: int = 0,
        affinity: int = 0,
    ) -> None:
        """Frontends (None: every node address); backends (address, port, node or None: here)."""
        here = (
            [i for i, (_, _, node) in enumerate(backends) if node is None]
            if local is None
            else local
        )
        for index, (address, port, node) in enumerate(backends):
            self.put(
                "backends",
                {"index": 100 + index},
                addr=raw(address),
                port=port,
                flags=0 if node else 1,
                node=node_bytes(node) if node else bytes(16),
            )
            self.put("slots", {"list": service * 2, "slot": index}, value=100 + index)
            self.put("members", {"list": service * 2, "backend": 100 + index}, value=1)
        for slot, index in enumerate(here):
            self.put("slots", {"list": service * 2 + 1, "slot": slot}, value=100 + index)
            self.put("members", {"list": service * 2 + 1, "backend": 100 + index}, value=1)
        for address, port in frontends:
            key = {
                "addr": raw(address) if address else bytes(4 if self.family == 4 else 16),
                "port": port,
                "proto": proto,
            }
            self.put(
                "frontends",
                key,
                service=service,
                cluster_count=len(backends),
                local_count=len(here),
                affinity_seconds=affinity,
                flags=flags,
            )

    # -- packets

    def send(
        self, hook: str, packet: Frame, device: str, *, ingress: str | None = None, mark: int = 0
    ) -> Result:
        """Run the packet through a hook of a device. `ingress`: where the stack got it from."""
        run = self.run(hook, bytes(packet), device, ingress=ingress, mark=mark)
        return Result(
            VERDICTS.get(run.retval, str(run.retval)),
            read(run.data),
            run.context,
            self.flow(packet),
        )

    def run(
        self,
        hook: str,
        frame: bytes,
        device: str,
        *,
        ingress: str | None = None,
        mark: int = 0,
        repeat: int = 1,
    ) -> syscall.TestRun:
        """The test run itself."""
        context = bytearray(CONTEXT_SIZE)
        struct.pack_into("=I", context, _MARK, mark)
        struct.pack_into("=I", context, _IFINDEX, self.netns.ifindex[device])
        if ingress:
            struct.pack_into("=I", context, _INGRESS_IFINDEX, self.netns.ifindex[ingress])
        run: syscall.TestRun = self.netns.run(
            lambda: syscall.prog_test_run(
                self._programs[hook], frame, context=bytes(context), repeat=repeat
            )
        )
        return run

    def from_pod(self, packet: Frame, device: str) -> Result:
        return self.send("from_pod", packet, device)

    def to_pod(self, packet: Frame, device: str, *, ingress: str | None = "data0") -> Result:
        """`ingress` None: the node's own packet."""
        return self.send("to_pod", packet, device, ingress=ingress)

    def from_net(self, packet: Frame, *, mark: int = 0) -> Result:
        return self.send("from_net", packet, "data0", mark=mark)

    def to_net(self, packet: Frame) -> Result:
        return self.send("to_net", packet, "data0")

    def from_tunnel(self, packet: Frame, outer: str) -> Result:
        """Through the tunnel, from the node with that outer address."""
        last = raw(outer)
        return self.send(
            f"arrive{self.family}", packet, "vxlan0", mark=int.from_bytes(last[-4:], "big")
        )


def node_bytes(address: str) -> bytes:
    """An address as the `nodes` map and `backend.node` have it."""
    packed = raw(address)
    return packed if len(packed) == 16 else bytes(10) + b"\xff\xff" + packed

# SPDX-License-Identifier: Apache-2.0
"""The node's surroundings: pods' namespaces, the tunnel, kube-proxy's rules, sockets, flows."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from bpf.kernel import in_own_netns, need, shell
from bpfdp_agent.bpf.errors import DeviceFailed
from bpfdp_agent.dataplane import conntrack, kubeproxy_rules, sockets, tunnel
from bpfdp_agent.dataplane.addresses import NodeWatcher
from bpfdp_agent.dataplane.links import netns_cookie
from bpfdp_agent.dataplane.maps import create_map
from bpfdp_agent.dataplane.pods import PodWatcher
from bpfdp_agent.layouts import CT, CT_KEY, MAPS

RULES = """\
*nat
:KUBE-SERVICES - [0:0]
:KUBE-SVC-ABC - [0:0]
:CNI-HOSTPORT - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -j CNI-HOSTPORT
-A KUBE-SERVICES -p tcp -m comment --comment "default/a cluster IP" -m tcp --dport 80 -j KUBE-SVC-ABC
COMMIT
*filter
:KUBE-FORWARD - [0:0]
-A FORWARD -j KUBE-FORWARD
COMMIT
"""


@contextlib.contextmanager
def namespace(folder, name):
    """A namespace bound to a file in `folder`, as container runtimes do; yields its nsenter."""
    path = folder / name
    path.touch()
    holder = subprocess.Popen(["unshare", "-n", "sleep", "60"])
    try:
        own = Path("/proc/thread-self/ns/net").readlink()
        while Path(f"/proc/{holder.pid}/ns/net").readlink() == own:
            time.sleep(0.001)
        subprocess.run(["mount", "--bind", f"/proc/{holder.pid}/ns/net", path], check=True)
    finally:
        holder.kill()
        holder.wait()
    try:
        yield f"nsenter --net={path}"
    finally:
        subprocess.run(["umount", "-l", path], check=True)
        path.unlink()


async def until(snapshots, condition, seconds=5.0):
    async with asyncio.timeout(seconds):
        async for found in snapshots:
            if condition(found):
                return found
    raise AssertionError


def test_a_pod_appears_gets_its_second_address_and_goes(tmp_path):
    need(os.geteuid() == 0, "root")
    # The watcher's own namespace must be the process's: pods are found relative to that.
    name = f"bt{os.getpid()}"

    async def work():
        watcher = PodWatcher(tmp_path)
        snapshots = watcher.snapshots()
        assert await anext(snapshots) == []
        with namespace(tmp_path, "cni-1") as enter:
            shell(f"ip link add {name} type veth peer name tmp{name}")
            try:
                shell(f"ip link set tmp{name} netns {tmp_path}/cni-1 name eth0")
                shell(f"ip link set {name} up; {enter} ip link set eth0 up")
                shell(f"{enter} ip addr add 10.77.0.2/24 dev eth0")
                (pod,) = await until(snapshots, bool)
                shell(f"{enter} ip addr add fd77::2/64 dev eth0 nodad")
                (both,) = await until(snapshots, lambda pods: pods and len(pods[0].addresses) == 2)
            finally:
                shell(f"ip link del {name}")
            assert await until(snapshots, lambda pods: not pods) == []
        return pod, both

    pod, both = asyncio.run(work())
    assert (pod.netns, pod.ifname, pod.addresses) == ("cni-1", name, ("10.77.0.2",))
    assert both.addresses == ("10.77.0.2", "fd77::2")


def test_a_namespace_that_is_none_is_passed_over(tmp_path):
    need(os.geteuid() == 0, "root")
    (tmp_path / "not-mounted-yet").touch()
    assert asyncio.run(PodWatcher(tmp_path).read()) == []
    assert asyncio.run(PodWatcher(tmp_path / "missing").read()) == []


def test_the_nodes_links_are_followed():
    async def work():
        snapshots = NodeWatcher("^up").snapshots()
        first = await anext(snapshots)
        shell("ip link add up0 type veth peer name x0; ip addr add 192.0.2.1/24 dev up0")
        shell("ip link set up0 up")
        later = await until(snapshots, lambda links: links.data and links.addresses)
        return first, later, netns_cookie()

    first, later, cookie = in_own_netns(work)
    assert first.data == ()
    assert [link.name for link in later.data] == ["up0"]
    assert later.device_of(ipaddress.ip_address("192.0.2.1")) == later.data[0]
    assert cookie > 0


def test_the_tunnel_device():
    async def work():
        first = await tunnel.ensure(4789, 1400)
        same = await tunnel.ensure(4789, 1400)
        moved = await tunnel.ensure(4790, 0)
        shown = shell("ip -d -o link show bpfdp_vxlan")
        shell("ip link add other type vxlan external dstport 4799")
        with pytest.raises(DeviceFailed, match=r"port 4799.*spec\.tunnel\.port"):
            await tunnel.ensure(4799, 0)
        kept = shell("ip -d -o link show bpfdp_vxlan")
        gone = [await tunnel.remove(), await tunnel.remove()]
        return first, same, moved, shown, kept, gone

    first, same, moved, shown, kept, gone = in_own_netns(work)
    assert first == same != moved
    assert "vxlan external" in shown
    assert "dstport 4790" in shown
    assert "dstport 4790" in kept
    assert gone == [True, False]


@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_kube_proxys_iptables_rules(variant):
    need(shutil.which("iptables-legacy") is not None, "iptables")

    async def work():
        for tool in ("iptables", "ip6tables"):
            shell(f"{tool}-{variant}-restore --noflush", RULES)
        found = await kubeproxy_rules.count()
        settled = await kubeproxy_rules.settled(0.05)
        removed = await kubeproxy_rules.clear()
        again = await kubeproxy_rules.clear()
        after = await kubeproxy_rules.count()
        saved = shell(f"iptables-{variant}-save")
        released = [await kubeproxy_rules.release_nat_hooks() for _ in range(2)]
        return found, settled, removed, again, after, saved, released

    found, settled, removed, again, after, saved, released = in_own_netns(work)
    assert (found.chains, found.rules) == (6, 6)
    assert settled
    assert removed == found
    assert not again
    assert not after
    assert "KUBE-" not in saved
    assert "-A PREROUTING -j CNI-HOSTPORT" in saved
    assert released == [True, False]


def test_kube_proxys_nftables():
    need(shutil.which("nft") is not None, "nft")

    async def work():
        shell(
            "nft -f -",
            "table ip kube-proxy {\n chain services {\n  counter accept\n }\n}\n"
            "table ip6 kube-proxy {\n chain services {\n }\n}\n",
        )
        settled = await kubeproxy_rules.settled(0.05)
        removed = await kubeproxy_rules.clear()
        tables = shell("nft list tables").split("\n")
        return settled, removed, tables, await kubeproxy_rules.settled(0.05)

    settled, removed, tables, after = in_own_netns(work)
    assert settled
    assert (removed.chains, removed.rules) == (2, 1)
    assert "table ip bpfdp_nat_keep" in tables
    assert not any("kube-proxy" in table for table in tables)
    assert not after


def test_sockets_of_gone_backends_are_closed():
    so_cookie = 57

    async def work():
        shell("ip link set lo up")
        with contextlib.ExitStack() as stack:

            def connected(family, address, port):
                opened = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
                opened.connect((address, port))
                return opened

            mapped = connected(socket.AF_INET6, "::ffff:127.0.0.1", 5353)
            plain = connected(socket.AF_INET, "127.0.0.1", 5353)
            other = connected(socket.AF_INET, "127.0.0.1", 5354)
            six = connected(socket.AF_INET6, "::1", 5353)
            direct = connected(socket.AF_INET, "127.0.0.1", 5353)
            own = direct.getsockopt(socket.SOL_SOCKET, so_cookie, 8)
            gone = [(ipaddress.ip_address("127.0.0.1"), 5353)]
            closed = sockets.close_connected_udp(gone, lambda cookie, _: cookie != own)
            for each in (mapped, plain):
                with pytest.raises(OSError):
                    each.send(b"x")
            for each in (other, six, direct):
                each.send(b"x")
            return closed, sockets.close_connected_udp([], lambda *_: True)

    assert in_own_netns(work) == (2, 0)


def test_flows_age_as_pairs_and_are_purged_by_backend():
    need(os.geteuid() == 0, "root")
    layout = next(each for each in MAPS if each.name == "ct")
    client, backend = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
    second = 1_000_000_000
    table = create_map(layout, 4, max_entries=1024)

    def flow(proto, port, seen, answered, backend_id=0):
        ways = (
            ({"src": client, "dst": backend, "sport": port, "dport": 53}, seen, backend_id),
            ({"src": backend, "dst": client, "sport": 53, "dport": port}, answered, 0),
        )
        for key, last, chosen in ways:
            same = {f"new_{name}": value for name, value in key.items()}
            value = CT.pack(4, last_seen=last * second, backend=chosen, **same)
            table.write({CT_KEY.pack(4, proto=proto, **key): value})

    flow(conntrack.UDP, 1, seen=0, answered=0)
    flow(conntrack.UDP, 2, seen=0, answered=950)  # the other direction is alive
    flow(conntrack.UDP, 3, seen=990, answered=990, backend_id=9)
    flow(conntrack.TCP, 4, seen=0, answered=0)  # established flows may be silent for long
    found = asyncio.run(conntrack.collect(table, now_ns=1000 * second))
    assert (found.entries, found.removed, found.udp, found.tcp) == (8, 2, 4, 2)
    assert asyncio.run(conntrack.purge_udp(table, [9])) == 2
    assert len(table.read()) == 4
    table.close()

# SPDX-License-Identifier: Apache-2.0
"""Which links inside a namespace are a pod's, and that a failed look is not taken for their end."""

from __future__ import annotations

import errno
import ipaddress
from pathlib import Path

import pytest
from bpfdp_agent.bpf.errors import DeviceFailed
from bpfdp_agent.dataplane import pods
from bpfdp_agent.dataplane.addresses import DATA_PATTERN, select
from bpfdp_agent.dataplane.links import Link
from bpfdp_agent.dataplane.pods import Inside, PodWatcher, match


def link(ifindex, name, *, kind="veth", peer=0, up=True, addresses=()):
    return Link(
        ifindex=ifindex,
        name=name,
        kind=kind,
        peer=peer,
        peer_netns=0,
        mac=f"02:00:00:00:00:{ifindex:02x}",
        mtu=1500,
        up=up,
        addresses=tuple(ipaddress.ip_interface(text) for text in addresses),
    )


def hosts(*links):
    return {each.ifindex: each for each in links}


def test_a_pair_that_names_each_other_is_a_pod():
    inside = Inside([link(2, "eth0", peer=7, addresses=("10.1.0.2/24", "fd01::2/64"))], 99)
    (pod,) = match("cni-1", inside, hosts(link(7, "veth7", peer=2)))
    assert (pod.netns, pod.ifindex, pod.ifname) == ("cni-1", 7, "veth7")
    assert pod.netns_cookie == 99
    assert pod.addresses == ("10.1.0.2", "fd01::2")
    assert (pod.mac, pod.host_mac) == ("02:00:00:00:00:02", "02:00:00:00:00:07")


@pytest.mark.parametrize(
    "host",
    [
        link(7, "veth7", peer=3),  # names another
        link(7, "br0", kind="bridge", peer=2),
        link(8, "veth8", peer=2),
    ],
)
def test_what_does_not_answer_is_no_pod(host):
    inside = Inside([link(2, "eth0", peer=7, addresses=("10.1.0.2/24",))], 99)
    assert match("cni-1", inside, hosts(host)) == []


def test_without_an_address_it_is_no_pod_yet():
    inside = Inside([link(2, "eth0", peer=7)], 99)
    assert match("cni-1", inside, hosts(link(7, "veth7", peer=2))) == []


@pytest.fixture
def cni(tmp_path, monkeypatch) -> Path:
    """A directory with one pod's namespace, which is readable while it says `pod`."""

    async def host():
        return [link(7, "veth7", peer=2)]

    def inside(path):
        readable = path.is_file() and path.read_text() == "pod"
        found = Inside([link(2, "eth0", peer=7, addresses=("10.1.0.2/24",))], 99)
        return found if readable else None

    monkeypatch.setattr(pods, "fetch_links", host)
    monkeypatch.setattr(pods, "read_namespace", inside)
    (tmp_path / "cni-1").write_text("pod")
    return tmp_path


async def test_a_namespace_that_cannot_be_read_once_keeps_its_pod(cni):
    watcher = PodWatcher(cni)
    (pod,) = await watcher.read()
    (cni / "cni-1").write_text("")
    assert await watcher.read() == [pod]
    (cni / "next").write_text("")
    (cni / "next").replace(cni / "cni-1")  # another namespace of this name
    assert await watcher.read() == []
    (cni / "cni-1").write_text("pod")
    assert await watcher.read() == [pod]
    (cni / "cni-1").unlink()
    assert await watcher.read() == []


async def test_a_directory_that_cannot_be_listed_says_nothing_of_the_pods(cni, monkeypatch):
    watcher = PodWatcher(cni)
    (pod,) = await watcher.read()

    def no_descriptors(_):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "iterdir", no_descriptors)
        with pytest.raises(DeviceFailed, match="Too many open files"):
            await watcher.read()
    assert await watcher.read(full=False) == [pod]
    assert await PodWatcher(cni / "missing").read() == []


def test_data_devices_by_pattern_and_state():
    links = [
        link(1, "lo", kind="", addresses=("10.9.9.9/32",)),
        link(3, "eth1", up=False),
        link(2, "eth0", kind="", addresses=("192.0.2.1/24", "2001:db8::1/64")),
        link(4, "cni0", kind="bridge", addresses=("10.1.0.1/24",)),
    ]
    found = select(links, DATA_PATTERN)
    assert [each.name for each in found.data] == ["eth0"]
    assert [str(each) for each in found.addresses] == [
        "10.1.0.1",
        "10.9.9.9",
        "192.0.2.1",
        "2001:db8::1",
    ]
    device = found.main_device([ipaddress.ip_address("2001:db8::1")])
    assert device is not None and device.name == "eth0"
    assert select(links, "^cni").data[0].name == "cni0"
    assert select([], "").main_device([]) is None

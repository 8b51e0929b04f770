# SPDX-License-Identifier: Apache-2.0
"""Attaching for real: tcx, clsact and cgroup, adoption, replacement, removal, cleanup."""

from __future__ import annotations

import os
from pathlib import Path

import pyroute2
import pytest
from bpf.kernel import in_own_netns, need, private_bpffs, shell
from bpfdp_agent.bpf import instructions as asm
from bpfdp_agent.bpf import syscall
from bpfdp_agent.bpf.errors import AttachFailed, MapFull, MapMismatch
from bpfdp_agent.bpf.mounts import cgroup2_root
from bpfdp_agent.bpf.syscall import AttachType, ProgramType
from bpfdp_agent.dataplane import programs, tunnel
from bpfdp_agent.dataplane.attach import Attacher, Hook
from bpfdp_agent.dataplane.cleanup import clean
from bpfdp_agent.dataplane.maps import MapStore, create_map, open_map
from bpfdp_agent.layouts import (
    ADDRESS_KEY,
    AFFINITY,
    AFFINITY_KEY,
    INDEX,
    MAPS,
    U32,
    Map,
    MapType,
)

SIZES = {
    each.name: 16 for each in MAPS if each.type != MapType.PROG_ARRAY and each.max_entries > 16
}


@pytest.fixture
def pins(tmp_path):
    with private_bpffs(tmp_path) as mounted:
        yield mounted


@pytest.fixture
def loaded():
    """Three different programs that do nothing."""
    need(os.geteuid() == 0, "root")
    found = [
        syscall.prog_load(ProgramType.SCHED_CLS, asm.set_register(1, n) + asm.returning(-1))
        for n in range(3)
    ]
    yield found
    for fd in found:
        os.close(fd)


def ids(descriptors):
    return [syscall.prog_info(fd).id for fd in descriptors]


async def veth(name="v0"):
    async with pyroute2.AsyncIPRoute() as netlink:
        await netlink.link("add", ifname=name, kind="veth", peer=f"{name}p")
        return (await netlink.link_lookup(ifname=name))[0]


async def delete(ifindex):
    async with pyroute2.AsyncIPRoute() as netlink:
        await netlink.link("del", index=ifindex)


def test_tcx_links_outlive_and_are_adopted(pins, loaded):
    async def work():
        device = await veth()
        await Attacher("TCX", pins).attach(Hook.FROM_POD, device, 4, loaded[0])
        await Attacher("TCX", pins).attach(Hook.FROM_POD, device, 6, loaded[1])
        before = syscall.prog_query(device, AttachType.TCX_INGRESS)
        later = Attacher("TCX", pins)  # a restarted agent
        await later.attach(Hook.FROM_POD, device, 4, loaded[2])
        after = syscall.prog_query(device, AttachType.TCX_INGRESS)
        await later.detach(Hook.FROM_POD, device, 6)
        left = await later.attached()
        await later.detach_all()
        return before, after, left, syscall.prog_query(device, AttachType.TCX_INGRESS)

    before, after, left, none = in_own_netns(work)
    first, second, third = ids(loaded)
    assert before == [first, second]
    assert after == [third, second]
    assert [(a.family, a.program_id) for a in left] == [(4, third)]
    assert none == []
    assert list(pins.links.iterdir()) == []


def test_clsact_filters_per_family_and_direction(pins, loaded):
    async def work():
        device = await veth()
        attacher = Attacher("TC", pins)
        for family in (4, 6):
            await attacher.attach(Hook.FROM_NET, device, family, loaded[0])
            await attacher.attach(Hook.TO_NET, device, family, loaded[1])
        await attacher.attach(Hook.TO_NET, device, 6, loaded[2])
        there = [(a.hook, a.family, a.kind, a.program_id) for a in await attacher.attached()]
        shown = shell("tc filter show dev v0 egress")
        await attacher.detach(Hook.FROM_NET, device, 4)
        left = len(await attacher.attached())
        await attacher.detach_all()
        return there, shown, left, shell("tc qdisc show dev v0")

    there, shown, left, qdiscs = in_own_netns(work)
    first, second, third = ids(loaded)
    assert there == [
        (Hook.FROM_NET, 4, "TC", first),
        (Hook.FROM_NET, 6, "TC", first),
        (Hook.TO_NET, 4, "TC", second),
        (Hook.TO_NET, 6, "TC", third),
    ]
    assert "protocol ip pref 4 bpf chain 0 handle 0x1 bpfdp_to_net4 direct-action" in shown
    assert left == 3
    assert "clsact" not in qdiscs


def test_a_foreign_filter_and_its_qdisc_are_left(pins, loaded):
    async def work():
        device = await veth()
        attacher = Attacher("TC", pins)
        await attacher.attach(Hook.FROM_NET, device, 4, loaded[0])
        async with pyroute2.AsyncIPRoute() as netlink:
            await netlink.tc(
                "add-filter", "bpf", device, fd=loaded[1], name="foreign", parent=0xFFFFFFF2, prio=9
            )
        await attacher.detach_all()
        return shell("tc filter show dev v0 ingress")

    assert "foreign" in in_own_netns(work)


@pytest.mark.parametrize(("old", "new"), [("TC", "TCX"), ("TCX", "TC")])
def test_changing_the_way_of_attaching(pins, loaded, old, new):
    async def work():
        device = await veth()
        await Attacher(old, pins).attach(Hook.TO_POD, device, 4, loaded[0])
        attacher = Attacher(new, pins)
        await attacher.attach(Hook.TO_POD, device, 4, loaded[1])
        await attacher.remove_other_kind()
        return [a.kind for a in await attacher.attached()]

    assert in_own_netns(work) == [new]


def test_a_vanished_device_leaves_a_stale_pin_that_goes(pins, loaded):
    async def work():
        device = await veth()
        attacher = Attacher("TCX", pins)
        await attacher.attach(Hook.FROM_POD, device, 4, loaded[0])
        await delete(device)
        there = await attacher.attached()
        stale = attacher.remove_stale()
        with pytest.raises(AttachFailed, match=f"from_pod4 to interface {device}"):
            await attacher.attach(Hook.FROM_POD, device, 4, loaded[0])
        return there, [pin.name for pin in stale], device

    there, stale, device = in_own_netns(work)
    assert there == []
    assert stale == [f"from_pod4_{device}"]
    assert list(pins.links.iterdir()) == []


def test_cgroup_links(pins):
    root = cgroup2_root()
    need(root is not None, "a cgroup2 hierarchy")
    assert root is not None
    group = root / f"bpfdp-test-{os.getpid()}"
    group.mkdir()
    fds = [
        syscall.prog_load(
            ProgramType.CGROUP_SOCK_ADDR,
            asm.set_register(1, n) + asm.returning(1),
            attach_type=AttachType.CGROUP_INET4_CONNECT,
        )
        for n in range(2)
    ]
    try:
        attacher = Attacher("TCX", pins, group)
        attacher.attach_cgroup("connect4", fds[0])
        attacher.attach_cgroup("connect4", fds[1])
        assert attacher.cgroup_attached() == {"connect4": ids(fds)[1]}
        group.rmdir()
        group.mkdir()  # the link's cgroup is gone: attach to the new one
        attacher.attach_cgroup("connect4", fds[0])
        assert attacher.cgroup_attached() == {"connect4": ids(fds)[0]}
        attacher.detach_cgroup("connect4")
        assert attacher.cgroup_attached() == {}
    finally:
        group.rmdir()
        for fd in fds:
            os.close(fd)


def test_maps_are_adopted_with_their_content(pins):
    first = MapStore(pins, sizes=SIZES)
    first.open()
    key, entry = ADDRESS_KEY.pack(4, addr=bytes([10, 0, 0, 1])), U32.pack(4, value=3)
    first.write("own_addresses", 4, {key: entry})
    first.close()
    second = MapStore(pins, sizes={**SIZES, "own_addresses": 32})  # and copied to another size
    second.open()
    assert second.read("own_addresses", 4) == {key: entry}
    assert second["own_addresses", 4].info.max_entries == 32
    assert second["nodes", 4] is second["nodes", 6]
    assert second.stale_pins() == []
    syscall.obj_pin(second["nodes", 4].descriptor, pins.maps / "nodes_v0")
    assert [pin.name for pin in second.remove_stale()] == ["nodes_v0"]
    second.close()


def test_what_old_programs_still_write_follows_to_a_larger_map(pins):
    first = MapStore(pins, sizes=SIZES)
    first.open()
    known = AFFINITY_KEY.pack(4, client=bytes([10, 0, 0, 1]), service=1)
    first.write("affinity", 4, {known: AFFINITY.pack(4, backend=1)})
    first.close()
    second = MapStore(pins, sizes={**SIZES, "affinity": 64})
    second.open()
    late = AFFINITY_KEY.pack(4, client=bytes([10, 0, 0, 2]), service=1)
    (outgrown,) = {old.name: old for old, _ in second._outgrown if old.name == "affinity4"}.values()
    outgrown.write({late: AFFINITY.pack(4, backend=2)})
    assert second.carry_over() == 1
    assert set(second.read("affinity", 4)) == {known, late}
    second.close()


def test_a_map_that_holds_too_much_keeps_its_size(pins):
    first = MapStore(pins, sizes=SIZES)
    first.open()
    entry = U32.pack(4, value=1)
    many = {ADDRESS_KEY.pack(4, addr=bytes([10, 0, 0, n])): entry for n in range(6)}
    first.write("own_addresses", 4, many)
    size = first["own_addresses", 4].info.max_entries
    first.close()
    second = MapStore(pins, sizes={**SIZES, "own_addresses": 4})
    second.open()
    assert second.read("own_addresses", 4) == many
    assert second["own_addresses", 4].info.max_entries == size
    assert [error.name for error in second.unfit] == ["own_addresses4"]
    second.close()


def test_a_full_map_is_named_and_deletes_make_room(pins):
    store = create_map(Map("tiny", MapType.HASH, INDEX, U32, 2), 4)
    keys = [INDEX.pack(4, index=n) for n in range(4)]
    store.write({keys[0]: U32.pack(4), keys[1]: U32.pack(4)})
    store.write({keys[2]: U32.pack(4)}, [keys[0]])
    assert set(store.read()) == {keys[1], keys[2]}
    with pytest.raises(MapFull, match="tiny4 is full"):
        store.write({keys[3]: U32.pack(4)})
    store.close()


def test_a_pin_of_another_layout_is_not_taken_for_ours(pins):
    pin = pins.maps / "a_v1"
    create_map(Map("a", MapType.HASH, INDEX, U32, 2), 4, pin=pin).close()
    with pytest.raises(MapMismatch, match="bpfdp cleanup"):
        open_map(Map("a", MapType.LRU_HASH, INDEX, U32, 2), 4, pin)


def test_cleanup_leaves_nothing_and_may_be_repeated(pins, loaded):
    async def work():
        device = await veth()
        await Attacher("TCX", pins).attach(Hook.FROM_POD, device, 4, loaded[0])
        await Attacher("TC", pins).attach(Hook.FROM_POD, device, 6, loaded[1])
        store = MapStore(pins, sizes=SIZES)
        store.open()
        programs.set_slot(store["jumps", 4].descriptor, 0, loaded[2])
        store.close()
        await tunnel.ensure(4789, 0)
        first = await clean(pins)
        second = await clean(pins)
        return first, second, shell("tc qdisc show; ip -o link show"), pins.root.exists()

    first, second, shown, exists = in_own_netns(work)
    assert (first.attachments, first.tunnel, first.failures) == (2, True, [])
    assert (second.attachments, second.pins, second.tunnel) == (0, 0, False)
    assert "clsact" not in shown
    assert "bpfdp" not in shown
    assert not exists
    assert Path(pins.bpffs).exists()

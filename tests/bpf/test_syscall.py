# SPDX-License-Identifier: Apache-2.0
"""bpf(2): maps with batches and without, programs, verifier logs, test runs."""

from __future__ import annotations

import contextlib
import errno
import os
import struct

import pytest
from bpf.kernel import need, private_bpffs
from bpfdp_agent.bpf import instructions as asm
from bpfdp_agent.bpf import syscall
from bpfdp_agent.bpf.errors import NotFound, ProgramRejected, SyscallFailed
from bpfdp_agent.bpf.syscall import ProgramType
from bpfdp_agent.layouts import NO_PREALLOC, MapType


@pytest.fixture(autouse=True)
def root():
    need(os.geteuid() == 0, "root")


@contextlib.contextmanager
def new_map(kind, key_size=4, value_size=8, entries=64, flags=0):
    fd = syscall.map_create(kind, key_size, value_size, entries, flags=flags, name="test")
    try:
        yield fd
    finally:
        os.close(fd)


def key(number):
    return struct.pack("=I", number)


def value(number):
    return struct.pack("=Q", number)


def test_one_entry():
    with new_map(MapType.HASH) as fd:
        assert syscall.map_lookup(fd, key(1), 8) is None
        syscall.map_update(fd, key(1), value(2))
        assert syscall.map_lookup(fd, key(1), 8) == value(2)
        assert syscall.map_delete(fd, key(1))
        assert not syscall.map_delete(fd, key(1))


def test_info():
    with new_map(MapType.LPM_TRIE, 8, 4, 16, NO_PREALLOC) as fd:
        info = syscall.map_info(fd)
    assert (info.type, info.key_size, info.value_size, info.max_entries) == (11, 8, 4, 16)
    assert (info.flags, info.name) == (NO_PREALLOC, "test")


@pytest.mark.parametrize("kind", [MapType.HASH, MapType.LRU_HASH])
def test_more_entries_than_a_page(kind):
    count = 3 * syscall.BATCH + 17
    wanted = {key(n): value(n) for n in range(count)}
    with new_map(kind, entries=4 * count) as fd:
        syscall.map_update_all(fd, wanted)
        assert syscall.map_items(fd) == wanted
        assert syscall.map_count(fd) == count
        syscall.map_delete_all(fd, [key(n) for n in range(0, 2 * count, 2)])  # half are not there
        assert len(syscall.map_items(fd)) == count // 2


def test_a_bucket_larger_than_the_page_is_read_with_a_larger_page():
    wanted = {key(n): value(n) for n in range(60)}
    with new_map(MapType.HASH) as fd:
        syscall.map_update_all(fd, wanted)
        pages = list(syscall.map_lookup_batches(fd, syscall.map_info(fd), batch=1))
    assert dict(entry for page in pages for entry in page) == wanted
    assert len(pages) > 1


def test_an_empty_map_has_no_entries():
    with new_map(MapType.HASH) as fd:
        assert syscall.map_items(fd) == {}
        syscall.map_delete_all(fd, [key(1)])


def test_tries_and_arrays():
    wanted = {struct.pack("=I4s", 32, bytes([10, 0, 0, n])): bytes(8) for n in range(40)}
    with new_map(MapType.LPM_TRIE, 8, 8, 64, NO_PREALLOC) as fd:
        syscall.map_update_all(fd, wanted)
        assert syscall.map_items(fd) == wanted
    with new_map(MapType.ARRAY, entries=3) as fd:
        syscall.map_update(fd, key(1), value(5))
        assert list(syscall.map_items(fd).values()) == [value(0), value(5), value(0)]


def test_per_cpu_values_are_one_of_every_cpu():
    with new_map(MapType.PERCPU_ARRAY, entries=1) as fd:
        (found,) = syscall.map_items(fd).values()
    assert len(found) == 8 * syscall.possible_cpus()


def test_where_batches_are_not_supported_entries_go_one_by_one():
    program = syscall.prog_load(ProgramType.SCHED_CLS, asm.returning(0))
    with new_map(MapType.PROG_ARRAY, 4, 4, 4) as fd:
        syscall.map_update_all(fd, {key(2): key(program)})
        assert list(syscall.map_items(fd)) == [key(2)]
        syscall.map_delete_all(fd, [key(2), key(3)])
        assert syscall.map_items(fd) == {}
    os.close(program)


@pytest.mark.parametrize(
    ("kind", "code"), [(MapType.HASH, errno.E2BIG), (MapType.LPM_TRIE, errno.ENOSPC)]
)
def test_a_full_map_says_so(kind, code):
    entries = {struct.pack("=II", 32, n): value(n) for n in range(5)}
    with (
        new_map(kind, 8, 8, 4, NO_PREALLOC) as fd,
        pytest.raises(SyscallFailed) as caught,
    ):
        syscall.map_update_all(fd, entries)
    assert caught.value.errno == code


def test_a_program_runs_on_a_packet_and_a_context():
    # skb->mark = skb->mark + 1; return 7
    code = (
        asm.instruction(0x61, 2, 1, 8)
        + asm.add(2, 1)
        + asm.instruction(0x63, 1, 2, 8)
        + asm.returning(7)
    )
    fd = syscall.prog_load(ProgramType.SCHED_CLS, code, name="from-pod 4")
    try:
        context = bytearray(192)
        struct.pack_into("=I", context, 8, 41)
        result = syscall.prog_test_run(fd, bytes(range(64)), context=bytes(context))
        info = syscall.prog_info(fd)
    finally:
        os.close(fd)
    assert result.retval == 7
    assert struct.unpack_from("=I", result.context, 8) == (42,)
    assert result.data == bytes(range(64))
    assert (info.type, info.name) == (ProgramType.SCHED_CLS, "from_pod_4")


def test_a_rejected_program_brings_the_verifiers_log():
    with pytest.raises(ProgramRejected) as caught:
        syscall.prog_load(ProgramType.SCHED_CLS, asm.leave(), name="bad")
    assert "R0 !read_ok" in caught.value.log
    assert "bad: R0 !read_ok" in str(caught.value)


def test_pins(tmp_path):
    with private_bpffs(tmp_path) as pins, new_map(MapType.HASH) as fd:
        path = pins.maps / "test_v1"
        with pytest.raises(NotFound):
            syscall.obj_get(path)
        syscall.obj_pin(fd, path)
        again = syscall.obj_get(path)
        assert syscall.map_info(again).id == syscall.map_info(fd).id
        os.close(again)

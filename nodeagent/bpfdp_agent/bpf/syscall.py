# SPDX-License-Identifier: Apache-2.0
"""bpf(2) by ctypes: the commands the agent uses, typed, errors as exceptions.

File descriptors are plain ints owned by the caller (close with os.close). Keys and values are
bytes of exactly the map's sizes; per-CPU values are the concatenation of every possible CPU's
value, each rounded up to 8 bytes. Layouts of the attributes: `union bpf_attr` in uapi/linux/bpf.h.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import os
import platform
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bpfdp_agent.bpf.errors import ENOTSUPP, NotFound, ProgramRejected, SyscallFailed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

_SYSCALL_NUMBER = {"x86_64": 321, "aarch64": 280}
_ATTR_SIZE = 128
_LOG_SIZE = 4 << 20
_NAME_SIZE = 16
BATCH = 4096
"""Entries per batch call: large enough to hide the call, small enough not to hold the CPU."""
PAGE_BYTES = 1 << 20
"""Of keys and values, at most, in a batch that is read: a Maglev table has kilobytes."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Command(enum.IntEnum):
    """`enum bpf_cmd`."""

    MAP_CREATE = 0
    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    MAP_DELETE_ELEM = 3
    MAP_GET_NEXT_KEY = 4
    PROG_LOAD = 5
    OBJ_PIN = 6
    OBJ_GET = 7
    PROG_TEST_RUN = 10
    PROG_GET_FD_BY_ID = 13
    MAP_GET_FD_BY_ID = 14
    OBJ_GET_INFO_BY_FD = 15
    PROG_QUERY = 16
    MAP_LOOKUP_BATCH = 24
    MAP_UPDATE_BATCH = 26
    MAP_DELETE_BATCH = 27
    LINK_CREATE = 28
    LINK_UPDATE = 29
    LINK_DETACH = 34


class ProgramType(enum.IntEnum):
    """`enum bpf_prog_type`, the ones in use."""

    SOCKET_FILTER = 1
    SCHED_CLS = 3
    XDP = 6
    CGROUP_SOCK_ADDR = 18


class AttachType(enum.IntEnum):
    """`enum bpf_attach_type`, the ones in use."""

    NONE = 0
    CGROUP_INET4_CONNECT = 10
    CGROUP_INET6_CONNECT = 11
    CGROUP_UDP4_SENDMSG = 14
    CGROUP_UDP6_SENDMSG = 15
    CGROUP_UDP4_RECVMSG = 19
    CGROUP_UDP6_RECVMSG = 20
    CGROUP_INET4_GETPEERNAME = 29
    CGROUP_INET6_GETPEERNAME = 30
    TCX_INGRESS = 46
    TCX_EGRESS = 47


class UpdateFlag(enum.IntEnum):
    """Flags of a map update."""

    ANY = 0
    NOEXIST = 1
    EXIST = 2


_NO_BATCHES = (ENOTSUPP, errno.EINVAL, errno.EOPNOTSUPP)
_PERCPU_TYPES = frozenset({5, 6, 10, 21})


@dataclass(frozen=True, slots=True)
class MapInfo:
    """`struct bpf_map_info`, its first fields."""

    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str

    @property
    def value_bytes(self) -> int:
        """Bytes a lookup returns: per-CPU maps return one value of every possible CPU."""
        if self.type in _PERCPU_TYPES:
            return (self.value_size + 7) // 8 * 8 * possible_cpus()
        return self.value_size


@dataclass(frozen=True, slots=True)
class ProgramInfo:
    """`struct bpf_prog_info`, its first fields."""

    type: int
    id: int
    tag: bytes
    name: str


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """`struct bpf_link_info`; `ifindex` of tcx links (0: the device is gone), else 0."""

    type: int
    id: int
    program_id: int
    ifindex: int
    attach_type: int


@dataclass(frozen=True, slots=True)
class TestRun:
    """Result of a test run: the program's return value, packet and context afterwards, ns each."""

    __test__ = False  # not a pytest class

    retval: int
    data: bytes
    context: bytes
    duration_ns: int


_LINK_CGROUP = 3
_LINK_TCX = 11


def _call(command: Command, attr: ctypes.Array[ctypes.c_char], what: str = "") -> int:
    result = int(
        _libc.syscall(
            _SYSCALL_NUMBER[platform.machine()], int(command), ctypes.byref(attr), len(attr)
        )
    )
    if result < 0:
        raise failure(f"bpf {command.name}{' ' + what if what else ''}", ctypes.get_errno())
    return result


def failure(operation: str, code: int) -> SyscallFailed:
    """The exception for an errno."""
    return (NotFound if code == errno.ENOENT else SyscallFailed)(operation, code)


def _attr(fmt: str, *values: int | bytes) -> ctypes.Array[ctypes.c_char]:
    """A zero-padded `union bpf_attr`; `fmt` has the kernel's padding spelled out."""
    attr = ctypes.create_string_buffer(_ATTR_SIZE)
    struct.pack_into("=" + fmt, attr, 0, *values)
    return attr


def _address(buffer: ctypes.Array[ctypes.c_char]) -> int:
    return ctypes.addressof(buffer)


def _buffer(data: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(data, max(len(data), 1))


def _name(name: str) -> bytes:
    """An object's name as the kernel takes it: 15 characters of [A-Za-z0-9_.]."""
    clean = "".join(c if c.isalnum() or c in "_." else "_" for c in name)
    return clean.encode("ascii", "replace")[: _NAME_SIZE - 1]


def possible_cpus() -> int:
    """Number of possible CPUs (per-CPU values have one slot for each)."""
    last = Path("/sys/devices/system/cpu/possible").read_text().strip().split(",")[-1]
    return int(last.split("-")[-1]) + 1


# -- maps -------------------------------------------------------------------------------------


def map_create(
    map_type: int,
    key_size: int,
    value_size: int,
    max_entries: int,
    *,
    flags: int = 0,
    name: str = "",
) -> int:
    """Create a map; returns its descriptor."""
    attr = _attr(
        "IIIIIII16s", map_type, key_size, value_size, max_entries, flags, 0, 0, _name(name)
    )
    return _call(Command.MAP_CREATE, attr, name)


def map_info(fd: int) -> MapInfo:
    """What the map behind the descriptor is."""
    raw = struct.unpack_from("=IIIIII16s", _object_info(fd, 80))
    kind, map_id, key_size, value_size, max_entries, flags, name = raw
    return MapInfo(
        kind, map_id, key_size, value_size, max_entries, flags, name.rstrip(b"\0").decode()
    )


def map_lookup(fd: int, key: bytes, value_bytes: int) -> bytes | None:
    """Value of the key, or None. `value_bytes`: MapInfo.value_bytes."""
    key_buffer, value = _buffer(key), ctypes.create_string_buffer(value_bytes)
    try:
        _call(
            Command.MAP_LOOKUP_ELEM, _attr("IIQQQ", fd, 0, _address(key_buffer), _address(value), 0)
        )
    except NotFound:
        return None
    return value.raw


def map_update(fd: int, key: bytes, value: bytes, flag: UpdateFlag = UpdateFlag.ANY) -> None:
    """Write one entry. SyscallFailed E2BIG or ENOSPC: the map is full."""
    key_buffer, value_buffer = _buffer(key), _buffer(value)
    _call(
        Command.MAP_UPDATE_ELEM,
        _attr("IIQQQ", fd, 0, _address(key_buffer), _address(value_buffer), flag),
    )


def map_delete(fd: int, key: bytes) -> bool:
    """Delete one entry; False when there was none."""
    key_buffer = _buffer(key)
    try:
        _call(Command.MAP_DELETE_ELEM, _attr("IIQQQ", fd, 0, _address(key_buffer), 0, 0))
    except NotFound:
        return False
    return True


def map_next_key(fd: int, key: bytes | None, key_size: int) -> bytes | None:
    """The key after `key` (None: the first), or None at the end."""
    key_buffer, following = _buffer(key or b""), ctypes.create_string_buffer(key_size)
    attr = _attr(
        "IIQQQ", fd, 0, _address(key_buffer) if key is not None else 0, _address(following), 0
    )
    try:
        _call(Command.MAP_GET_NEXT_KEY, attr)
    except NotFound:
        return None
    return following.raw


def map_items(fd: int, info: MapInfo | None = None) -> dict[bytes, bytes]:
    """Every entry of the map: by batches, or key by key where the kernel has no batches for it."""
    info = info or map_info(fd)
    items: dict[bytes, bytes] = {}
    try:
        for page in map_lookup_batches(fd, info):
            items.update(page)
    except SyscallFailed as error:
        if error.errno not in _NO_BATCHES:
            raise
        return dict(_items_by_key(fd, info))
    return items


def map_count(fd: int, info: MapInfo | None = None) -> int:
    """Number of entries, cheaper than reading them."""
    info = info or map_info(fd)
    try:
        return sum(count for _, _, count in _raw_batches(fd, info, BATCH))
    except SyscallFailed as error:
        if error.errno not in _NO_BATCHES:
            raise
        return sum(1 for _ in _items_by_key(fd, info))


def map_lookup_batches(
    fd: int, info: MapInfo, batch: int = BATCH
) -> Iterator[list[tuple[bytes, bytes]]]:
    """Pages of entries. Entries written meanwhile may be missed, or seen twice."""
    for keys, values, count in _raw_batches(fd, info, batch):
        yield list(_split(keys, values, info, count))


def _raw_batches(fd: int, info: MapInfo, batch: int) -> Iterator[tuple[bytes, bytes, int]]:
    """Pages as (keys, values, number of entries).

    ENOSPC (a hash bucket holds more than the page) doubles the page; ENOENT marks the last page.
    """
    size = min(batch, info.max_entries, max(1, PAGE_BYTES // (info.key_size + info.value_bytes)))
    position: bytes | None = None
    done = False
    while not done:
        try:
            keys, values, count, position, done = _lookup_batch(fd, info, position, size)
        except SyscallFailed as error:
            if error.errno != errno.ENOSPC or size >= info.max_entries:
                raise
            size = min(size * 2, info.max_entries)
            continue
        yield keys, values, count


def _lookup_batch(
    fd: int, info: MapInfo, position: bytes | None, size: int
) -> tuple[bytes, bytes, int, bytes, bool]:
    """One page: keys, values, their number, the next page's cursor, whether it was the last."""
    keys = ctypes.create_string_buffer(info.key_size * size)
    values = ctypes.create_string_buffer(info.value_bytes * size)
    cursor_size = max(info.key_size, 4)  # hash maps: a bucket number, LPM and arrays: a key
    into, out = _buffer(position or b""), ctypes.create_string_buffer(cursor_size)
    attr = _attr(
        "QQQQIIQQ",
        _address(into) if position is not None else 0,
        _address(out),
        _address(keys),
        _address(values),
        size,
        fd,
        0,
        0,
    )
    done = False
    try:
        _call(Command.MAP_LOOKUP_BATCH, attr)
    except NotFound:
        done = True
    (count,) = struct.unpack_from("=I", attr, 32)
    return (
        ctypes.string_at(keys, info.key_size * count),
        ctypes.string_at(values, info.value_bytes * count),
        count,
        out.raw,
        done,
    )


def _split(keys: bytes, values: bytes, info: MapInfo, count: int) -> Iterator[tuple[bytes, bytes]]:
    key_size, value_size = info.key_size, info.value_bytes
    for i in range(count):
        yield (
            keys[i * key_size : (i + 1) * key_size],
            values[i * value_size : (i + 1) * value_size],
        )


def _items_by_key(fd: int, info: MapInfo) -> Iterator[tuple[bytes, bytes]]:
    key = map_next_key(fd, None, info.key_size)
    while key is not None:
        value = map_lookup(fd, key, info.value_bytes)
        if value is not None:
            yield key, value
        key = map_next_key(fd, key, info.key_size)


def map_update_all(fd: int, entries: Mapping[bytes, bytes]) -> None:
    """Write the entries in their order. SyscallFailed E2BIG or ENOSPC: the map is full."""
    pending = list(entries.items())
    for start in range(0, len(pending), BATCH):
        _update_batch(fd, pending[start : start + BATCH])


def _update_batch(fd: int, entries: Sequence[tuple[bytes, bytes]]) -> None:
    keys = _buffer(b"".join(key for key, _ in entries))
    values = _buffer(b"".join(value for _, value in entries))
    attr = _attr("QQQQIIQQ", 0, 0, _address(keys), _address(values), len(entries), fd, 0, 0)
    try:
        _call(Command.MAP_UPDATE_BATCH, attr)
    except SyscallFailed as error:
        if error.errno != ENOTSUPP:
            raise
        for key, value in entries:
            map_update(fd, key, value)


def map_delete_all(fd: int, keys: Iterable[bytes]) -> None:
    """Delete the keys in their order; those that are not there are passed over."""
    pending = list(keys)
    while pending:
        page, pending = pending[:BATCH], pending[BATCH:]
        pending = _delete_batch(fd, page) + pending


def _delete_batch(fd: int, keys: Sequence[bytes]) -> list[bytes]:
    """Delete up to the first key that is missing; returns what remains after it."""
    packed = _buffer(b"".join(keys))
    attr = _attr("QQQQIIQQ", 0, 0, _address(packed), 0, len(keys), fd, 0, 0)
    try:
        _call(Command.MAP_DELETE_BATCH, attr)
    except NotFound:
        (count,) = struct.unpack_from("=I", attr, 32)
        return list(keys[count + 1 :])
    except SyscallFailed as error:
        if error.errno != ENOTSUPP:
            raise
        for key in keys:
            map_delete(fd, key)
    return []


# -- programs ---------------------------------------------------------------------------------


def prog_load(
    program_type: ProgramType,
    instructions: bytes,
    *,
    attach_type: AttachType = AttachType.NONE,
    name: str = "",
    license: str = "GPL",  # noqa: A002 - bpf_attr's own name
) -> int:
    """Load a program; returns its descriptor. Raises ProgramRejected with the verifier's log."""
    try:
        return _prog_load(program_type, instructions, attach_type, name, license, None)
    except SyscallFailed as error:
        if error.errno == errno.EPERM:
            raise
    log = ctypes.create_string_buffer(_LOG_SIZE)
    try:
        return _prog_load(program_type, instructions, attach_type, name, license, log)
    except SyscallFailed as error:
        text = log.value.decode(errors="replace")
        raise ProgramRejected(name, error.errno, text) from error


def _prog_load(  # noqa: PLR0917 - the attribute's fields
    program_type: ProgramType,
    instructions: bytes,
    attach_type: AttachType,
    name: str,
    license_name: str,
    log: ctypes.Array[ctypes.c_char] | None,
) -> int:
    code, license_buffer = _buffer(instructions), _buffer(license_name.encode() + b"\0")
    attr = _attr(
        "IIQQIIQII16sII",
        program_type,
        len(instructions) // 8,
        _address(code),
        _address(license_buffer),
        1 if log is not None else 0,
        len(log) if log is not None else 0,
        _address(log) if log is not None else 0,
        0,
        0,
        _name(name),
        0,
        attach_type,
    )
    return _call(Command.PROG_LOAD, attr, name)


def prog_info(fd: int) -> ProgramInfo:
    """What the program behind the descriptor is."""
    raw = struct.unpack_from("=II8sIIQQQIIQ16s", _object_info(fd, 80))
    return ProgramInfo(raw[0], raw[1], raw[2], raw[11].rstrip(b"\0").decode())


def prog_test_run(
    fd: int, data: bytes, *, context: bytes = b"", repeat: int = 1, room: int = 512
) -> TestRun:
    """Run the program on a packet, `repeat` times, without any device.

    `context` is a `struct __sk_buff` (only the fields the kernel allows may be set) and comes back
    as the program left it. `room` bytes are kept for what the program adds to the packet.
    """
    data_in, data_out = _buffer(data), ctypes.create_string_buffer(len(data) + room)
    ctx_in, ctx_out = _buffer(context), ctypes.create_string_buffer(max(len(context), 1))
    has_context = bool(context)
    attr = _attr(
        "IIIIQQIIIIQQ",
        fd,
        0,
        len(data),
        len(data_out),
        _address(data_in),
        _address(data_out),
        repeat,
        0,
        len(context),
        len(context),
        _address(ctx_in) if has_context else 0,
        _address(ctx_out) if has_context else 0,
    )
    _call(Command.PROG_TEST_RUN, attr)
    _, retval, _, size, _, _, _, duration, _, ctx_size = struct.unpack_from("=IIIIQQIIII", attr)
    return TestRun(retval, data_out.raw[:size], ctx_out.raw[:ctx_size], duration)


def prog_query(target: int, attach_type: AttachType) -> list[int]:
    """Ids of the programs attached to a target: an ifindex for tcx, a cgroup's descriptor else."""
    ids = (ctypes.c_uint32 * 64)()
    attr = _attr("IIIIQI", target, attach_type, 0, 0, ctypes.addressof(ids), len(ids))
    _call(Command.PROG_QUERY, attr)
    (count,) = struct.unpack_from("=I", attr, 24)
    return list(ids[:count])


def prog_open(program_id: int) -> int:
    """Descriptor of a loaded program by its id."""
    return _call(Command.PROG_GET_FD_BY_ID, _attr("III", program_id, 0, 0), str(program_id))


# -- pins and links ---------------------------------------------------------------------------


def obj_pin(fd: int, path: Path) -> None:
    """Pin a map, program or link under a path in a bpffs."""
    pathname = _buffer(os.fsencode(path) + b"\0")
    _call(Command.OBJ_PIN, _attr("QII", _address(pathname), fd, 0), str(path))


def obj_get(path: Path) -> int:
    """Open what is pinned there; NotFound when nothing is."""
    pathname = _buffer(os.fsencode(path) + b"\0")
    return _call(Command.OBJ_GET, _attr("QII", _address(pathname), 0, 0), str(path))


def link_create(program: int, target: int, attach_type: AttachType) -> int:
    """Attach a program: target is an ifindex for tcx, a cgroup directory's descriptor else."""
    attr = _attr("IIII", program, target, attach_type, 0)
    return _call(Command.LINK_CREATE, attr, attach_type.name)


def link_update(link: int, program: int) -> None:
    """Replace a link's program atomically."""
    _call(Command.LINK_UPDATE, _attr("IIII", link, program, 0, 0))


def link_detach(link: int) -> None:
    """Detach the link's program now, whoever still holds the link."""
    _call(Command.LINK_DETACH, _attr("I", link))


def link_info(fd: int) -> LinkInfo:
    """What the link behind the descriptor is."""
    raw = _object_info(fd, 64)
    kind, link_id, program_id = struct.unpack_from("=III", raw)
    ifindex = attach_type = 0
    if kind == _LINK_TCX:
        ifindex, attach_type = struct.unpack_from("=II", raw, 16)
    elif kind == _LINK_CGROUP:
        (attach_type,) = struct.unpack_from("=I", raw, 24)
    return LinkInfo(kind, link_id, program_id, ifindex, attach_type)


def _object_info(fd: int, size: int) -> bytes:
    info = ctypes.create_string_buffer(size)
    _call(Command.OBJ_GET_INFO_BY_FD, _attr("IIQ", fd, size, _address(info)))
    return info.raw

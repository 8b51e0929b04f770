# SPDX-License-Identifier: Apache-2.0
"""The cache of compiled objects: keys, damage, the size bound."""

from __future__ import annotations

import os

import pytest
from bpfdp_agent.bpf.cache import ObjectCache, key_of
from bpfdp_agent.bpf.objects import Function, Object

OBJECT = Object("p", {"p": Function("p", bytes(16), ((0, "ct"),))}, "a warning")


def test_what_is_put_is_got(tmp_path):
    cache = ObjectCache(tmp_path)
    cache.put("k", OBJECT)
    assert cache.get("k") == OBJECT
    assert cache.get("other") is None


@pytest.mark.parametrize("position", [0, 40, -1])
def test_a_damaged_file_is_dropped(tmp_path, position):
    cache = ObjectCache(tmp_path)
    cache.put("k", OBJECT)
    path = tmp_path / "k.bpf"
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)
    assert cache.get("k") is None
    assert not path.exists()


def test_a_truncated_file_is_dropped(tmp_path):
    cache = ObjectCache(tmp_path)
    cache.put("k", OBJECT)
    (tmp_path / "k.bpf").write_bytes(b"")
    assert cache.get("k") is None


def test_the_least_recently_used_goes_first(tmp_path):
    cache = ObjectCache(tmp_path)
    for index, key in enumerate("abc"):
        cache.put(key, OBJECT)
        os.utime(tmp_path / f"{key}.bpf", (index, index))
    cache.get("a")  # makes it the newest
    size = (tmp_path / "a.bpf").stat().st_size
    ObjectCache(tmp_path, max_bytes=3 * size).put("d", OBJECT)
    assert {path.stem for path in tmp_path.iterdir()} == {"a", "c", "d"}


def test_keys_differ_in_everything_that_decides_the_bytecode():
    base = ("text", ("-O2",), "0.26")
    keys = {
        key_of(*base),
        key_of("text2", base[1], base[2]),
        key_of(base[0], ("-O3",), base[2]),
        key_of(base[0], base[1], "0.27"),
    }
    assert len(keys) == 4
    assert key_of(*base) == key_of(*base)


def test_a_failed_text_is_kept_with_what_clang_said(tmp_path):
    path = ObjectCache(tmp_path).keep_failed("from_pod4", "int x(", "1:7: error: no\nmore")
    assert path is not None
    assert path.name == "from_pod4.failed.c"
    assert path.read_text() == "// 1:7: error: no\n// more\nint x("


def test_what_the_image_has_needs_no_compiler_and_is_not_written_to(tmp_path):
    shipped = tmp_path / "shipped"
    ObjectCache(shipped).put("k", OBJECT)
    cache = ObjectCache(tmp_path / "own", shipped=shipped)
    assert cache.get("k") == OBJECT
    cache.put("other", OBJECT)
    assert [path.name for path in shipped.iterdir()] == ["k.bpf"]
    assert ObjectCache(tmp_path / "third", shipped=tmp_path / "nowhere").get("k") is None

# SPDX-License-Identifier: Apache-2.0
"""The compiler process: objects, errors, the cache, and that the agent never imports bcc."""

from __future__ import annotations

import os
import sys

import pytest
from bpf.kernel import need, private_bpffs
from bpfdp_agent import layouts
from bpfdp_agent.bpf import compiler as compiler_module
from bpfdp_agent.bpf import syscall
from bpfdp_agent.bpf.cache import ObjectCache
from bpfdp_agent.bpf.compiler import Compiler, kernel_source
from bpfdp_agent.bpf.errors import CompileFailed, CompilerUnavailable, ProgramRejected
from bpfdp_agent.bpf.objects import Source
from bpfdp_agent.bpf.render import declarations
from bpfdp_agent.dataplane import programs
from bpfdp_agent.dataplane.maps import MapStore


@pytest.fixture(autouse=True)
def ready():
    need(os.geteuid() == 0, "root")
    need(kernel_source().is_dir(), "the header tree (make kbuild)")


def text(family, body):
    return f"{declarations(family)}\nint entry(struct __sk_buff *skb)\n{{\n{body}\n}}\n"


LOOKUPS = """
    struct address_key key = {};
    struct identity *who = identities.lookup(&key);
    __u32 zero = 0;
    struct settings *node = settings.lookup(&zero);
    return (who ? who->id : 1) + (node ? node->tunnel_vni : 1);
"""


async def test_a_compiled_program_runs_on_the_real_maps(tmp_path):
    compiler = Compiler(ObjectCache(tmp_path / "cache"))
    (compiled,) = await compiler.compile([Source("entry4", text(4, LOOKUPS))])
    function = compiled.functions["entry"]
    assert function.map_names == {"identities", "settings"}
    (tmp_path / "bpf").mkdir()
    with private_bpffs(tmp_path / "bpf") as pins:
        store = MapStore(pins)
        store.open()
        key = layouts.ADDRESS_KEY.pack(4)
        store.write("identities", 4, {key: layouts.IDENTITY.pack(4, id=40)})
        index = layouts.INDEX.pack(4)
        store.write("settings", 4, {index: layouts.SETTINGS.pack(4, tunnel_vni=2)})
        program = programs.load(function, store.descriptors(4), pin=pins.programs / "entry4")
        try:
            assert syscall.prog_test_run(program.descriptor, bytes(64)).retval == 42
            again = programs.open_pinned(pins.programs / "entry4")
            assert again is not None and again.tag == program.tag
            again.close()
        finally:
            program.close()
            store.close()
    assert "bcc" not in sys.modules


async def test_one_bad_text_does_not_spoil_the_others(tmp_path):
    compiler = Compiler(ObjectCache(tmp_path))
    good, bad = Source("good", text(6, "    return 3;")), Source("bad", text(6, "    return x;"))
    outcomes = await compiler.compile_each([bad, good, bad])
    assert isinstance(outcomes[0], CompileFailed)
    assert "undeclared identifier 'x'" in str(outcomes[0])
    assert outcomes[1].name == "good"
    assert isinstance(outcomes[2], CompileFailed)
    assert "return x;" in (tmp_path / "bad.failed.c").read_text()
    with pytest.raises(CompileFailed):
        await compiler.compile([good, bad])


async def test_a_cached_text_needs_no_compiler(tmp_path, monkeypatch):
    source = Source("cached", text(4, "    return 4;"))
    first = await Compiler(ObjectCache(tmp_path)).compile([source])
    monkeypatch.setattr(compiler_module.sys, "executable", "/bin/false")
    assert await Compiler(ObjectCache(tmp_path)).compile([source]) == first
    with pytest.raises(CompilerUnavailable):
        await Compiler(ObjectCache(tmp_path)).compile([Source("new", text(4, "    return 5;"))])


async def test_a_compiler_that_hangs_is_ended(tmp_path):
    compiler = Compiler(ObjectCache(tmp_path), timeout=0.05)
    with pytest.raises(CompilerUnavailable, match="longer than"):
        await compiler.compile([Source("slow", text(4, "    return 6;"))])


async def test_a_program_with_a_map_nobody_has_is_refused_by_name(tmp_path):
    body = 'BPF_TABLE("hash", __u32, __u32, strange, 1);\n'
    source = "int entry(struct __sk_buff *skb)\n{\n    __u32 k = 0;\n    return strange.lookup(&k) ? 1 : 0;\n}\n"
    (compiled,) = await Compiler(ObjectCache(tmp_path)).compile([Source("s", body + source)])
    with pytest.raises(ProgramRejected, match="strange"):
        programs.load(compiled.functions["entry"], {})

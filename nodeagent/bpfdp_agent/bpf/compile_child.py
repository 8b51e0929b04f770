# SPDX-License-Identifier: Apache-2.0
"""The compiler process: `python -m bpfdp_agent.bpf.compile_child`.

BCC changes the working directory, is not thread-safe and never gives memory back, so it lives here
and dies with the batch. Reads a msgpack list of (name, text, cflags) from stdin, writes a msgpack
list with an Outcome for each to stdout. BCC's maps are created with the sizes in the text
(one entry) and vanish at exit; their names are what remains of them.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from typing import Any

import bcc
import msgspec
from bcc import lib

from bpfdp_agent.bpf.objects import Function, Outcome, Request, relocations_of

lib.bpf_table_name.restype = ctypes.c_char_p
lib.bpf_table_name.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def compile_text(request: Request) -> Outcome:
    """Compile one text with clang's stderr captured."""
    with tempfile.TemporaryFile() as printed:
        saved = os.dup(2)
        os.dup2(printed.fileno(), 2)
        try:
            functions = _functions(request)
        except Exception as error:
            failure: Exception | None = error
        else:
            failure = None
        finally:
            os.dup2(saved, 2)
            os.close(saved)
        printed.seek(0)
        output = printed.read().decode(errors="replace")
    if failure is not None:
        return Outcome(request.name, ok=False, output=output or str(failure))
    return Outcome(request.name, ok=True, functions=functions, output=output)


def _functions(request: Request) -> tuple[Function, ...]:
    program = bcc.BPF(text=request.text.encode(), cflags=list(request.cflags))
    try:
        tables = _tables(program.module)
        return tuple(_function(program, i, tables) for i in range(_count(program.module)))
    finally:
        program.cleanup()


def _count(module: Any) -> int:
    return int(lib.bpf_num_functions(module))


def _tables(module: Any) -> dict[int, str]:
    """Map names by the descriptors BCC put into the instructions."""
    return {
        int(lib.bpf_table_fd_id(module, i)): lib.bpf_table_name(module, i).decode()
        for i in range(int(lib.bpf_num_tables(module)))
    }


def _function(program: Any, index: int, tables: dict[int, str]) -> Function:
    name = bytes(lib.bpf_function_name(program.module, index))
    instructions = program.dump_func(name)
    return Function(name.decode(), instructions, relocations_of(instructions, tables))


def main() -> None:
    """Compile what stdin asks for. Nothing but the answer goes to stdout."""
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever BCC prints belongs to stderr
    requests = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=list[Request])
    outcomes = [compile_text(request) for request in requests]
    answer.write(msgspec.msgpack.encode(outcomes))
    answer.close()


if __name__ == "__main__":
    main()

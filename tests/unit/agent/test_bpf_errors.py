# SPDX-License-Identifier: Apache-2.0
"""Messages: the first thing that matters, where to look further."""

from __future__ import annotations

import errno

from bpfdp_agent.bpf.errors import CompileFailed, MapFull, ProgramRejected, SyscallFailed
from bpfdp_agent.bpf.syscall import failure


def test_a_rejection_says_what_the_verifier_said_last():
    log = "0: (b7) r0 = 0\nR1 invalid mem access 'scalar'\nprocessed 5 insns (limit 1000000)\n"
    error = ProgramRejected("to_pod4", errno.EACCES, log)
    assert str(error).endswith("program to_pod4: R1 invalid mem access 'scalar'")
    assert error.log == log


def test_a_rejection_without_a_log_says_the_errno():
    assert "Argument list too long" in str(ProgramRejected("p", errno.E2BIG, ""))


def test_a_compile_error_says_the_first_error():
    output = "a.c:1: warning: x\na.c:2:3: error: unknown type\na.c:9: error: later\n"
    assert str(CompileFailed("p", output)).endswith("a.c:2:3: error: unknown type")


def test_a_full_map_is_named_with_the_remedy():
    assert "backends4 is full (8 entries)" in str(MapFull("backends4", 8))
    assert "BpfDataplaneConfig" in str(MapFull("backends4", 8))


def test_errnos_become_exceptions():
    assert type(failure("x", errno.ENOENT)).__name__ == "NotFound"
    assert isinstance(failure("x", 524), SyscallFailed)
    assert "not supported" in str(failure("x", 524))

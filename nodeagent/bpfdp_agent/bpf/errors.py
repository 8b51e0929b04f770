# SPDX-License-Identifier: Apache-2.0
"""What can go wrong between this agent and the kernel or compiler; all under `BpfError`."""

from __future__ import annotations

import errno as codes
import os

ENOTSUPP = 524
"""The kernel's own "not supported" (include/linux/errno.h), which libc has no name for."""


class BpfError(Exception):
    """Base of everything raised by bpfdp_agent.bpf and bpfdp_agent.dataplane."""


class SyscallFailed(BpfError):
    """bpf(2) refused: `operation` is the command with its object, `errno` what the kernel said."""

    def __init__(self, operation: str, errno: int) -> None:
        reason = "not supported by this object" if errno == ENOTSUPP else os.strerror(errno)
        super().__init__(f"{operation}: {reason} ({codes.errorcode.get(errno, errno)})")
        self.operation = operation
        self.errno = errno


class NotFound(SyscallFailed):
    """ENOENT: no such key, pin or id."""


class MapFull(BpfError):
    """A map has no room left. `name` is the map, `max_entries` its size."""

    def __init__(self, name: str, max_entries: int) -> None:
        super().__init__(
            f"BPF map {name} is full ({max_entries} entries): raise its size in the "
            "BpfDataplaneConfig (spec.maps, spec.conntrack)"
        )
        self.name = name
        self.max_entries = max_entries


class MapMismatch(BpfError):
    """A pinned map is not what the layout says: type, key or value size, or max_entries differ."""


class ProgramRejected(BpfError):
    """The verifier refused a program; `log` is its log, `name` the program."""

    def __init__(self, name: str, errno: int, log: str) -> None:
        last = [line for line in log.splitlines() if line and not line.startswith("processed ")]
        verdict = last[-1] if last else os.strerror(errno)
        super().__init__(f"the kernel's verifier rejected program {name}: {verdict}")
        self.name = name
        self.errno = errno
        self.log = log


class CompileFailed(BpfError):
    """Clang refused a program text; `output` is what it printed, `name` the source."""

    def __init__(self, name: str, output: str) -> None:
        errors = [line for line in output.splitlines() if "error:" in line]
        first = errors[0] if errors else (output.strip().splitlines() or ["no output"])[-1]
        super().__init__(f"program {name} does not compile: {first}")
        self.name = name
        self.output = output


class CompilerUnavailable(BpfError):
    """The compiler process could not be run, died, or took too long."""


class TemplateInvalid(BpfError):
    """A template could not be rendered; the message names the template and line."""


class AttachFailed(BpfError):
    """A program could not be attached to, or detached from, a hook."""


class DeviceFailed(BpfError):
    """A network device of ours could not be made as wanted."""


class CommandFailed(BpfError):
    """A program we run (iptables, nft) failed; the message carries what it printed."""

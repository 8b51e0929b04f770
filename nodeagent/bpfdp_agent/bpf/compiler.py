# SPDX-License-Identifier: Apache-2.0
"""The parent's side of compiling: cache first, else a child process with BCC.

`await compiler.compile(sources)` → one Object per source, or the first CompileFailed;
`await compiler.compile_each(sources)` → Object or CompileFailed in each source's place.
The parent never imports bcc.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from bpfdp_agent.bpf.cache import ObjectCache, key_of
from bpfdp_agent.bpf.errors import CompileFailed, CompilerUnavailable
from bpfdp_agent.bpf.objects import Object, Outcome, Request, Source

if TYPE_CHECKING:
    from collections.abc import Sequence

INSTALLED_KERNEL_SOURCE = Path("/usr/share/bpfdp/kbuild")
CFLAGS = ("-O2", "-Wno-unused-function", "-Wno-address-of-packed-member")
NICENESS = 10


def kernel_source() -> Path:
    """The header tree: $BCC_KERNEL_SOURCE, the installed one, or the source tree's build."""
    if override := os.environ.get("BCC_KERNEL_SOURCE"):
        return Path(override)
    if INSTALLED_KERNEL_SOURCE.is_dir():
        return INSTALLED_KERNEL_SOURCE
    return Path(__file__).resolve().parents[3] / "build" / "kbuild"


@functools.cache
def compiler_version() -> str:
    """BCC's version, without importing it."""
    try:
        return importlib.metadata.version("bcc")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


class Compiler:
    """Compiles texts, at most `workers` processes at once, `batch` texts in each.

    A process that takes longer than `timeout` seconds, or dies, raises CompilerUnavailable.
    """

    def __init__(
        self,
        cache: ObjectCache,
        *,
        cflags: tuple[str, ...] = CFLAGS,
        workers: int = 2,
        batch: int = 8,
        timeout: float = 120.0,
    ) -> None:
        self._cache = cache
        self._cflags = cflags
        self._batch = batch
        self._timeout = timeout
        self._slots = asyncio.Semaphore(workers)

    async def compile(self, sources: Sequence[Source]) -> list[Object]:
        """Objects in the order of the sources. Raises the first CompileFailed."""
        outcomes = await self.compile_each(sources)
        for outcome in outcomes:
            if isinstance(outcome, CompileFailed):
                raise outcome
        return [outcome for outcome in outcomes if isinstance(outcome, Object)]

    async def compile_each(self, sources: Sequence[Source]) -> list[Object | CompileFailed]:
        """An Object or a CompileFailed for each source, in their order. Same texts compile once."""
        keys = [key_of(source.text, self._cflags, compiler_version()) for source in sources]
        found: dict[str, Object | CompileFailed] = {}
        missing: dict[str, Source] = {}
        for key, source in zip(keys, sources, strict=True):
            if key in found or key in missing:
                continue
            cached = self._cache.get(key)
            if cached is None:
                missing[key] = source
            else:
                found[key] = cached
        found.update(await self._compile_missing(missing))
        return [_named(found[key], source.name) for key, source in zip(keys, sources, strict=True)]

    async def _compile_missing(
        self, missing: dict[str, Source]
    ) -> dict[str, Object | CompileFailed]:
        pending = list(missing.items())
        pages = [pending[i : i + self._batch] for i in range(0, len(pending), self._batch)]
        answers = await asyncio.gather(
            *(self._run_child([source for _, source in page]) for page in pages)
        )
        results: dict[str, Object | CompileFailed] = {}
        for page, outcomes in zip(pages, answers, strict=True):
            for (key, source), outcome in zip(page, outcomes, strict=True):
                results[key] = self._keep(key, source, outcome)
        return results

    def _keep(self, key: str, source: Source, outcome: Outcome) -> Object | CompileFailed:
        if not outcome.ok:
            self._cache.keep_failed(source.name, source.text, outcome.output)
            return CompileFailed(source.name, outcome.output)
        functions = {function.name: function for function in outcome.functions}
        compiled = Object(source.name, functions, outcome.output)
        self._cache.put(key, compiled)
        return compiled

    async def _run_child(self, sources: Sequence[Source]) -> list[Outcome]:
        requests = [Request(s.name, s.text, self._cflags) for s in sources]
        async with self._slots:
            output, errors, status = await self._communicate(msgspec.msgpack.encode(requests))
        if status != 0:
            names = ", ".join(source.name for source in sources)
            raise CompilerUnavailable(
                f"the compiler process failed ({status}) on {names}: {errors.strip()[-2000:]}"
            )
        try:
            return msgspec.msgpack.decode(output, type=list[Outcome])
        except msgspec.DecodeError as error:
            raise CompilerUnavailable(f"the compiler process answered nonsense: {error}") from error

    async def _communicate(self, request: bytes) -> tuple[bytes, str, int]:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "bpfdp_agent.bpf.compile_child",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=_child_environment(),
        )
        try:
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
            output, errors = await asyncio.wait_for(process.communicate(request), self._timeout)
        except TimeoutError as error:
            raise CompilerUnavailable(
                f"the compiler process took longer than {self._timeout:g} s"
            ) from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return output, errors.decode(errors="replace"), process.returncode or 0


def _child_environment() -> dict[str, str]:
    package_root = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "BCC_KERNEL_SOURCE": str(kernel_source()),
        "PYTHONPATH": f"{package_root}:{path}" if path else package_root,
    }


def _named(outcome: Object | CompileFailed, name: str) -> Object | CompileFailed:
    """The outcome under the name of the source that asked for it."""
    if isinstance(outcome, CompileFailed):
        return CompileFailed(name, outcome.output)
    return msgspec.structs.replace(outcome, name=name)

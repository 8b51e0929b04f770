# SPDX-License-Identifier: Apache-2.0
"""Compiled objects on disk, so that a restarted agent needs no compiler.

One file per object, named by the hash of everything that decides its content. A file that does not
decode, or whose checksum is wrong, is dropped. The oldest-used files go when the size bound is
passed. Texts that failed to compile are kept beside them as `*.failed.c` for a person to look at.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

import msgspec

from bpfdp_agent import layouts
from bpfdp_agent.bpf.objects import Object

FORMAT_VERSION = 1
INSTALLED_BYTECODE = "/usr/share/bpfdp/bytecode"
_DIGEST = hashlib.sha256().digest_size


def key_of(text: str, cflags: tuple[str, ...], compiler_version: str) -> str:
    """The name of a text's object: what the bytecode depends on, hashed."""
    digest = hashlib.sha256()
    for part in (
        text,
        *cflags,
        compiler_version,
        f"layout {layouts.LAYOUT_VERSION}",
        f"format {FORMAT_VERSION}",
    ):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def shipped_bytecode() -> Path:
    """What the image was built with: $BPFDP_BYTECODE, else the installed place."""
    return Path(os.environ.get("BPFDP_BYTECODE", INSTALLED_BYTECODE))


class ObjectCache:
    """The cache in one directory (made when missing); at most `max_bytes` of files.

    What is not there is looked for in `shipped`, which is never written to.
    """

    def __init__(
        self, directory: Path, max_bytes: int = 64 << 20, shipped: Path | None = None
    ) -> None:
        self.directory = directory
        self._shipped = shipped
        self._max_bytes = max_bytes
        directory.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> Object | None:
        """The object, or None; a damaged file is removed."""
        found = self._read(self._path(key))
        if found is None and self._shipped is not None:
            found = self._read(self._shipped / self._path(key).name)
        return found

    def _read(self, path: Path) -> Object | None:
        try:
            data = path.read_bytes()
        except OSError:
            return None
        body = data[_DIGEST:]
        try:
            if hashlib.sha256(body).digest() != data[:_DIGEST]:
                raise msgspec.DecodeError("checksum")
            found = msgspec.msgpack.decode(body, type=Object)
        except msgspec.DecodeError:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return found

    def put(self, key: str, compiled: Object) -> None:
        """Keep the object; a full or read-only disk is not an error, the next start compiles."""
        body = msgspec.msgpack.encode(compiled)
        with contextlib.suppress(OSError):
            self._write(self._path(key), hashlib.sha256(body).digest() + body)
            self._trim()

    def keep_failed(self, name: str, text: str, output: str) -> Path | None:
        """Keep a text that does not compile, with clang's words in front; returns where."""
        path = self.directory / f"{name}.failed.c"
        words = "".join(f"// {line}\n" for line in output.splitlines())
        try:
            self._write(path, (words + text).encode())
        except OSError:
            return None
        return path

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}.bpf"

    def _write(self, path: Path, data: bytes) -> None:
        descriptor, temporary = tempfile.mkstemp(dir=self.directory)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            Path(temporary).replace(path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _trim(self) -> None:
        files = []
        for path in self.directory.iterdir():
            with contextlib.suppress(OSError):
                state = path.stat()
                files.append((state.st_mtime, state.st_size, path))
        excess = sum(size for _, size, _ in files) - self._max_bytes
        for _, size, path in sorted(files):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size

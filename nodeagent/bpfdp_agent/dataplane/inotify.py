# SPDX-License-Identifier: Apache-2.0
"""inotify(7) on one directory: an event when entries come and go."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_IN_CREATE, _IN_DELETE, _IN_MOVED = 0x100, 0x200, 0xC0
_IN_NONBLOCK, _IN_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC
_libc = ctypes.CDLL(None, use_errno=True)


class DirectoryWatch:
    """Sets `event` when the directory's entries change; open with `async with`.

    Where the directory does not exist yet, or inotify is exhausted, nothing is heard: whoever waits
    must also look from time to time, and may call `renew`.
    """

    def __init__(self, directory: Path, event: asyncio.Event) -> None:
        self._directory = directory
        self._event = event
        self._descriptor = -1
        self._watching = False

    async def __aenter__(self) -> DirectoryWatch:
        self._descriptor = _libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
        if self._descriptor >= 0:
            asyncio.get_running_loop().add_reader(self._descriptor, self._drain)
            self.renew()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def renew(self) -> bool:
        """Watch the directory if it exists; True when it is being watched."""
        if self._descriptor >= 0:
            mask = _IN_CREATE | _IN_DELETE | _IN_MOVED
            added = _libc.inotify_add_watch(self._descriptor, os.fsencode(self._directory), mask)
            self._watching = added >= 0
        return self._watching

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._descriptor, 65536):
                pass
        self._event.set()

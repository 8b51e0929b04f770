# SPDX-License-Identifier: Apache-2.0
"""Doing something in another network namespace: in a thread that enters it and then ends.

A namespace belongs to a thread, so a thread of its own can enter one without the rest of the
process noticing, and needs no way back.
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)

T = TypeVar("T")


def in_new_netns(work: Callable[[], T]) -> T:
    """The result of `work` in a fresh network namespace, which is gone afterwards."""
    return _in_thread(lambda: _check(_libc.unshare(_CLONE_NEWNET)), work)


def in_netns(descriptor: int, work: Callable[[], T]) -> T:
    """The result of `work` in the namespace behind an open /run/netns file."""
    return _in_thread(lambda: _check(_libc.setns(descriptor, _CLONE_NEWNET)), work)


def _in_thread(enter: Callable[[], None], work: Callable[[], T]) -> T:
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            enter()
            results.append(work())
        except BaseException as error:  # handed to the caller below
            errors.append(error)

    thread = threading.Thread(target=run, name="netns")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _check(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))

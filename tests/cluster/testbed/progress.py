# SPDX-License-Identifier: Apache-2.0
"""Progress of long steps, on stderr: what is being done, and for how long."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()


def say(text: str) -> None:
    """Print one progress line."""
    with _lock:
        print(f"[testbed] {text}", file=sys.stderr, flush=True)


@contextmanager
def step(what: str, every: float = 15.0) -> Iterator[None]:
    """Announce a step, repeat the elapsed time while it runs, and say how long it took."""
    start, done = time.monotonic(), threading.Event()

    def tick() -> None:
        while not done.wait(every):
            say(f"{what} … {time.monotonic() - start:.0f} s")

    say(what)
    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        done.set()
        ticker.join()
    say(f"{what}: done in {time.monotonic() - start:.1f} s")

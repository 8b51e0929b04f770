# SPDX-License-Identifier: Apache-2.0
# The part of Debian's python3-bpfcc that compile_child.py uses.
from collections.abc import Sequence
from typing import Any

lib: Any

class BPF:
    module: Any
    def __init__(self, *, text: bytes, cflags: Sequence[str] = ...) -> None: ...
    def dump_func(self, func_name: bytes) -> bytes: ...
    def cleanup(self) -> None: ...

# SPDX-License-Identifier: Apache-2.0
"""What a Session holds of the kernel: open maps, where pins are, and how programs come about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bpfdp_agent.bpf.compiler import Compiler
    from bpfdp_agent.bpf.render import Renderer
    from bpfdp_agent.dataplane.maps import MapStore
    from bpfdp_agent.dataplane.pins import Pins


@dataclass(frozen=True, slots=True)
class Kernel:
    """One per Session."""

    maps: MapStore
    pins: Pins
    compiler: Compiler
    renderer: Renderer

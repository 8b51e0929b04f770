# SPDX-License-Identifier: Apache-2.0
"""Compile the catalogue's texts into a directory: `python -m bpfdp_agent.bpf.precompile DIR`.

For the image, so that the first start on a node needs no compiler. A text whose hash is not there
(another BCC, an edited template) is compiled on the node as ever.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bpfdp_agent import catalog
from bpfdp_agent.bpf.cache import ObjectCache
from bpfdp_agent.bpf.compiler import Compiler
from bpfdp_agent.bpf.objects import Source
from bpfdp_agent.bpf.render import Renderer

if TYPE_CHECKING:
    from bpfdp_agent.bpf.objects import Object


def generic_sources(renderer: Renderer, fault: str = "") -> list[Source]:
    """The texts in the order of `catalog.texts()`; `fault` is put into the datapath's."""
    return [
        Source(
            f"{template.rpartition('/')[2].partition('.')[0]}{family}",
            renderer.render(template, family=family)
            + (fault if template == catalog.DATAPATH else ""),
        )
        for template, family in catalog.texts()
    ]


async def precompile(compiler: Compiler) -> list[Object]:
    """Every generic text, into the compiler's cache. Raises CompileFailed."""
    return await compiler.compile(generic_sources(Renderer()))


if __name__ == "__main__":
    asyncio.run(precompile(Compiler(ObjectCache(Path(sys.argv[1])))))

# SPDX-License-Identifier: Apache-2.0
"""A loopback port of the machine that leads to the API server inside the testbed.

Run as a program: `forward.py PORT NETNS ADDRESS ADDRESS_PORT`. It listens before it enters the
control plane's network namespace, so that it has one foot in each.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import sys
from contextlib import suppress

_CLONE_NEWNET = 0x40000000


def main() -> None:
    """Listen on loopback, enter the namespace, serve until killed."""
    port, netns, host, host_port = sys.argv[1:]
    listener = socket.create_server(("127.0.0.1", int(port)))
    namespace = os.open(netns, os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"cannot enter {netns}")
    asyncio.run(_serve(listener, host, int(host_port)))


async def _serve(listener: socket.socket, host: str, port: int) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(host, port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))

    server = await asyncio.start_server(connected, sock=listener)
    await server.serve_forever()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    with suppress(OSError):
        writer.close()


if __name__ == "__main__":
    main()

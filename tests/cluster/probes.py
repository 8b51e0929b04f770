# SPDX-License-Identifier: Apache-2.0
"""Requests over TCP and UDP, many at a time: one shell script runs them side by side.

The script is run by a pod, a node or the outside client, so a whole matrix of requests costs one
`kubectl exec`. An answer is `HOSTNAME CLIENT-ADDRESS`, empty where nothing came back.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass

Run = Callable[[str], str]
"""Runs a shell script somewhere and gives its standard output."""

PARALLEL = 12


@dataclass(frozen=True, slots=True)
class Request:
    """One request: `proto` is tcp or udp; `source` an address to bind to, or empty."""

    proto: str
    address: str
    port: int

    def script(self) -> str:
        """Shell that prints `HOSTNAME CLIENT-ADDRESS` on one line."""
        if self.proto == "tcp":
            host = f"[{self.address}]" if ":" in self.address else self.address
            url = f"http://{host}:{self.port}"
            get = "curl -gs --connect-timeout 3 -m 5"
            return f'echo "$({get} {url}/hostname) $({get} {url}/clientip)"'
        # One datagram out, one back (-W 1): netcat would otherwise wait for its time limit.
        ask = f"timeout 4 nc -u -W1 -w3 {shlex.quote(self.address)} {self.port}"
        return f'echo "$(echo hostname | {ask}) $(echo clientip | {ask})"'


@dataclass(frozen=True, slots=True)
class Answer:
    """Who answered and the client address it saw (without the port)."""

    hostname: str
    client: str

    @property
    def arrived(self) -> bool:
        """Whether anything answered."""
        return bool(self.hostname)


def ask(run: Run, requests: Iterable[Request]) -> dict[Request, Answer]:
    """Ask all of them at the same place; the order does not matter."""
    wanted = list(dict.fromkeys(requests))
    answers: dict[Request, Answer] = {}
    for start in range(0, len(wanted), PARALLEL):
        chunk = wanted[start : start + PARALLEL]
        lines = [
            f"( r=$({{ {r.script()}; }} 2>/dev/null | tr '\\n' ' '); echo \"{i} $r\" ) &"
            for i, r in enumerate(chunk)
        ]
        for line in run("\n".join([*lines, "wait"])).splitlines():
            index, _, rest = line.partition(" ")
            words = rest.split()
            answers[chunk[int(index)]] = Answer(
                words[0] if words else "", host_of(words[1]) if len(words) > 1 else ""
            )
    return {r: answers.get(r, Answer("", "")) for r in wanted}


def ask_one(run: Run, request: Request) -> Answer:
    """Ask one."""
    return ask(run, [request])[request]


def host_of(address: str) -> str:
    """`1.2.3.4:5` or `[::1]:5` without the port; an IPv4 address mapped into IPv6 as IPv4."""
    host = address.rpartition(":")[0].strip("[]")
    return host.removeprefix("::ffff:")

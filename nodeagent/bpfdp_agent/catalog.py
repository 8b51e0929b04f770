# SPDX-License-Identifier: Apache-2.0
"""Every program there is: its text, its type, and where it goes. Pure; names are the C functions'.

A program exists once per family, both attached side by side on a hook. Its place is a hook
(an interface's ingress or egress, or the cgroup), or a slot of the `jumps` or `policy` prog array.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

from bpfdp_agent import layouts

SCHED_CLS = 3
CGROUP_SOCK_ADDR = 18
"""`enum bpf_prog_type`."""

DATAPATH = "programs/datapath.c.j2"
SOCKETS = "programs/sockets.c.j2"


class Attachment(enum.Enum):
    """Where a program is put. Tail-called programs are in a prog array instead."""

    POD_INGRESS = "pod ingress"  # of the pod's host-side veth: packets from the pod
    POD_EGRESS = "pod egress"
    NET_INGRESS = "net ingress"  # of the data interface
    NET_EGRESS = "net egress"
    TUNNEL_INGRESS = "tunnel ingress"
    CGROUP = "cgroup"
    JUMP = "jump"
    POLICY = "policy"


@dataclass(frozen=True, slots=True)
class Program:
    """One program of one family. `slot`: of `jumps` (JUMP) or `policy` (POLICY).

    `expected_attach_type` is 0 for tc programs: they tail-call each other, and the kernel wants
    all of them loaded alike.
    """

    name: str
    family: Literal[4, 6]
    template: str
    program_type: int
    attachment: Attachment
    expected_attach_type: int = 0
    slot: int | None = None

    @property
    def pin_name(self) -> str:
        """Name under programs/."""
        return f"{self.name}_{self.family}"


_TC = (
    ("from_pod", Attachment.POD_INGRESS, None),
    ("to_pod", Attachment.POD_EGRESS, None),
    ("from_net", Attachment.NET_INGRESS, None),
    ("to_net", Attachment.NET_EGRESS, None),
    ("from_tunnel", Attachment.TUNNEL_INGRESS, None),
    ("new_flow", Attachment.JUMP, layouts.Jump.NEW_FLOW),
    ("finish", Attachment.JUMP, layouts.Jump.FINISH),
    ("reject", Attachment.JUMP, layouts.Jump.REJECT),
    ("icmp_error", Attachment.JUMP, layouts.Jump.ICMP_ERROR),
    ("deny", Attachment.POLICY, layouts.POLICY_SLOT_DENY),
)

_CGROUP_ATTACH_TYPES: dict[str, tuple[int, int]] = {
    "connect": (10, 11),
    "sendmsg": (14, 15),
    "recvmsg": (19, 20),
    "getpeername": (29, 30),
}
"""`enum bpf_attach_type` by what the process calls: for IPv4 sockets, for IPv6 sockets."""


def _cgroup(family: Literal[4, 6]) -> list[Program]:
    """An IPv6 socket may speak IPv4 (::ffff:a.b.c.d): family 4 has a `…_mapped` program for it."""
    programs = []
    for name, (inet4, inet6) in _CGROUP_ATTACH_TYPES.items():
        own = inet4 if family == 4 else inet6
        programs.append(Program(name, family, SOCKETS, CGROUP_SOCK_ADDR, Attachment.CGROUP, own))
        if family == 4:
            programs.append(
                Program(f"{name}_mapped", 4, SOCKETS, CGROUP_SOCK_ADDR, Attachment.CGROUP, inet6)
            )
    return programs


def _tc(family: Literal[4, 6]) -> list[Program]:
    return [
        Program(name, family, DATAPATH, SCHED_CLS, attachment, slot=slot)
        for name, attachment, slot in _TC
    ]


PROGRAMS: tuple[Program, ...] = (*_tc(4), *_cgroup(4), *_tc(6), *_cgroup(6))


def texts() -> tuple[tuple[str, int], ...]:
    """Each (template, family) to render and compile, once."""
    return tuple(dict.fromkeys((p.template, p.family) for p in PROGRAMS))

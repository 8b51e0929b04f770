# SPDX-License-Identifier: Apache-2.0
"""What kube-proxy has in an `iptables-save` text, and the `iptables-restore` text that removes it.

Pure. kube-proxy's chains all begin with KUBE-; a few of that name are the kubelet's and are left.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PREFIX = "KUBE-"
KUBELETS = frozenset({"KUBE-KUBELET-CANARY", "KUBE-IPTABLES-HINT"})
_CANARY = "KUBE-KUBELET-CANARY"
_SHARED = "KUBE-FIREWALL"
"""Made by both kubelet and kube-proxy, the same: the kubelet's where its canary is."""


@dataclass(slots=True)
class Table:
    """One table: kube-proxy's chains, the rules in them, and the rules elsewhere that go there."""

    name: str
    chains: list[str] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    jumps: list[str] = field(default_factory=list)


def parse(text: str) -> list[Table]:
    """kube-proxy's part of each table that has any."""
    kept = KUBELETS | ({_SHARED} if f":{_CANARY} " in text else frozenset())
    tables: list[Table] = []
    for line in text.splitlines():
        if line.startswith("*"):
            tables.append(Table(line[1:]))
        elif line.startswith(":") and _is_kube_proxys(line[1:].split()[0], kept):
            tables[-1].chains.append(line[1:].split()[0])
        elif line.startswith("-A "):
            _add_rule(tables[-1], line, kept)
    return [table for table in tables if table.chains or table.jumps]


def removal(tables: list[Table]) -> str:
    """Input for `iptables-restore --noflush`, one transaction per table; empty: nothing to do.

    Naming a chain empties it, so that it can be deleted once no rule goes there.
    """
    lines: list[str] = []
    for table in tables:
        lines.append(f"*{table.name}")
        lines += [f":{chain} - [0:0]" for chain in table.chains]
        lines += [f"-D {jump.removeprefix('-A ')}" for jump in table.jumps]
        lines += [f"-X {chain}" for chain in table.chains]
        lines.append("COMMIT")
    return "".join(f"{line}\n" for line in lines)


def _add_rule(table: Table, line: str, kept: frozenset[str]) -> None:
    words = line.split()
    if _is_kube_proxys(words[1], kept):
        table.rules.append(line)
        return
    targets = [words[i + 1] for i, word in enumerate(words[:-1]) if word in ("-j", "-g")]
    if targets and _is_kube_proxys(targets[-1], kept):
        table.jumps.append(line)


def _is_kube_proxys(chain: str, kept: frozenset[str]) -> bool:
    return chain.startswith(PREFIX) and chain not in kept

# SPDX-License-Identifier: Apache-2.0
"""kube-proxy's rules on this node: counting them, clearing them, telling when they are back.

Every variant is looked at (iptables legacy and nft, IPv4 and IPv6; nftables' `kube-proxy` tables),
since kube-proxy chooses by what it finds. Clearing keeps the nat hooks registered with an empty
table of ours: without any nat chain the kernel stops translating flows that netfilter still
carries.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from typing import Any

import msgspec

from bpfdp_agent.bpf.errors import CommandFailed
from bpfdp_agent.dataplane import commands
from bpfdp_agent.dataplane.iptables_save import Table, parse, removal

_VARIANTS = ("iptables-legacy", "ip6tables-legacy", "iptables-nft", "ip6tables-nft")
_NFT_FAMILIES = ("ip", "ip6")
_NFT_TABLE = "kube-proxy"
KEEP_TABLE = "bpfdp_nat_keep"
_LOCK_SECONDS = "10"
_NAT_HOOKS = (
    ("prerouting", -100),
    ("input", 100),
    ("output", -100),
    ("postrouting", 100),
)
"""With the kernel's priorities of destination and source NAT (NF_IP_PRI_NAT_DST, _SRC)."""


@dataclass(frozen=True, slots=True)
class RuleCount:
    """kube-proxy's chains and rules on this node, over all variants."""

    chains: int = 0
    rules: int = 0

    def __add__(self, other: RuleCount) -> RuleCount:
        return RuleCount(self.chains + other.chains, self.rules + other.rules)

    def __bool__(self) -> bool:
        return bool(self.chains or self.rules)


async def count() -> RuleCount:
    """What there is now."""
    total = RuleCount()
    for variant in _variants():
        total += _count_of(await _tables(variant))
    for family in await _nft_families(_NFT_TABLE):
        total += await _nft_count(family)
    return total


async def clear() -> RuleCount:
    """Remove all of it, keeping the nat hooks; returns what was there. CommandFailed: tried all."""
    before = RuleCount()
    failures: list[CommandFailed] = []
    nft_families = await _nft_families(_NFT_TABLE)
    if commands.available("nft"):
        await keep_nat_hooks()
    for variant in _variants():
        tables = await _tables(variant)
        before += _count_of(tables)
        if tables:
            try:
                await _restore(variant, tables)
            except CommandFailed as error:
                failures.append(error)
    for family in nft_families:
        before += await _nft_count(family)
        try:
            await commands.run("nft", "delete", "table", family, _NFT_TABLE)
        except CommandFailed as error:
            failures.append(error)
    if failures:
        raise failures[0]
    return before


async def settled(pause: float = 1.0) -> bool:
    """Whether kube-proxy's rules exist and are the same after `pause` seconds."""
    first = await _fingerprint()
    if first is None:
        return False
    await asyncio.sleep(pause)
    return await _fingerprint() == first


async def keep_nat_hooks() -> None:
    """Make our empty nat chains, one per hook and family."""
    chains = "".join(
        f"chain {hook} {{ type nat hook {hook} priority {priority}; policy accept; }}\n"
        for hook, priority in _NAT_HOOKS
    )
    text = "".join(f"table {f} {KEEP_TABLE} {{\n{chains}}}\n" for f in _NFT_FAMILIES)
    await commands.run("nft", "-f", "-", given=text)


async def release_nat_hooks() -> bool:
    """Remove our nat chains; False when there were none."""
    families = await _nft_families(KEEP_TABLE)
    for family in families:
        await commands.run("nft", "delete", "table", family, KEEP_TABLE)
    return bool(families)


def _variants() -> list[str]:
    return [variant for variant in _VARIANTS if commands.available(f"{variant}-save")]


async def _tables(variant: str) -> list[Table]:
    return parse(await commands.run(f"{variant}-save"))


async def _restore(variant: str, tables: list[Table]) -> None:
    command = [f"{variant}-restore", "--noflush"]
    if variant.endswith("-legacy"):
        command += ["-w", _LOCK_SECONDS]
    await commands.run(*command, given=removal(tables))


def _count_of(tables: list[Table]) -> RuleCount:
    return RuleCount(
        sum(len(table.chains) for table in tables),
        sum(len(table.rules) + len(table.jumps) for table in tables),
    )


async def _nft_families(table: str) -> list[str]:
    """Families in which the table exists."""
    if not commands.available("nft"):
        return []
    listed = await _nft_json("list", "tables")
    found = {
        item["table"]["family"] for item in listed if item.get("table", {}).get("name") == table
    }
    return [family for family in _NFT_FAMILIES if family in found]


async def _nft_count(family: str) -> RuleCount:
    listed = await _nft_json("list", "table", family, _NFT_TABLE)
    return RuleCount(
        sum("chain" in item for item in listed), sum("rule" in item for item in listed)
    )


async def _nft_json(*command: str) -> list[dict[str, Any]]:
    answer = msgspec.json.decode(await commands.run("nft", "-j", *command))
    items: list[dict[str, Any]] = answer["nftables"]
    return items


async def _fingerprint() -> str | None:
    """A digest of kube-proxy's rules; None when it has no chain with rules."""
    digest = hashlib.sha256()
    rules = 0
    for variant in _variants():
        for table in await _tables(variant):
            rules += len(table.rules)
            for line in (variant, table.name, *table.chains, *table.rules, *table.jumps):
                digest.update(line.encode() + b"\n")
    for family in await _nft_families(_NFT_TABLE):
        rules += (await _nft_count(family)).rules
        digest.update(
            (await commands.run("nft", "-s", "list", "table", family, _NFT_TABLE)).encode()
        )
    return digest.hexdigest() if rules else None

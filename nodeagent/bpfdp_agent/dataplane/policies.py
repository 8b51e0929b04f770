# SPDX-License-Identifier: Apache-2.0
"""The policy slots of this node: programs compiled, switched in, kept up to date, freed.

A version of a program sits in one slot of `policy4` and `policy6` from when its maps are full until
no endpoint has had the slot for a while. Programs whose text and peers are the same share a
version. What a restarted agent finds pinned stays as it is until somebody asks for it.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bpfdp_agent.bpf.errors import BpfError, CompileFailed, MapFull
from bpfdp_agent.bpf.objects import Object, Source
from bpfdp_agent.dataplane import policyversion, programs
from bpfdp_agent.dataplane.pins import listing
from bpfdp_agent.dataplane.policyversion import Version, read_folder
from bpfdp_agent.desired.programspec import ProgramSpec
from bpfdp_agent.layouts import FAMILIES, LAYOUT_VERSION, POLICY_SLOT_DENY, POLICY_SLOT_FIRST

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from bpfdp_agent.bpf.compiler import Compiler
    from bpfdp_agent.bpf.render import Renderer
    from bpfdp_agent.dataplane.maps import MapStore
    from bpfdp_agent.dataplane.pins import Pins

TEMPLATE = "policy.c.j2"
GRACE = 5.0
"""Seconds a version stays after it was last needed, so that packets on their way to it finish."""
FREE_PAUSE = 0.1
"""Seconds between two versions freed (dataplane/programs.py says why)."""

DENY = ProgramSpec("ingress", 0, False, None, (), (), 0, (), (), ()).sealed()
"""Nothing is allowed; the same in either direction."""


class PolicyNotLoaded(BpfError):
    """A program could not be rendered, compiled, filled or loaded; `cause` says why.

    `policies` (namespace/name) are those it was made from. What was loaded before is untouched.
    """

    def __init__(self, spec: ProgramSpec, cause: Exception) -> None:
        of = f"policy {', '.join(spec.policies)}" if spec.policies else "the deny program"
        super().__init__(f"{of} ({spec.direction}): {cause}")
        self.policies = spec.policies
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Wanted:
    """A program to have in a slot. `values` is called when its identity map is filled."""

    spec: ProgramSpec
    values: Callable[[], Mapping[int, bytes]]


@dataclass(slots=True)
class _Held:
    """A version in its slot. Without a spec it was found pinned and not asked for since.

    `stale`: a change of its peers could not be written.
    """

    version: Version
    spec: ProgramSpec | None = None
    stale: bool = False
    unused_since: float | None = None


@dataclass(frozen=True, slots=True)
class _Missing:
    wanted: Wanted
    digest: str
    sources: Sequence[Source]


class PolicyPrograms:
    """Used in this order: `open`; `ensure_all` what the pods need; point their endpoints at the
    slots; `write` what changes of the peers; now and then `forget` and `free` what no endpoint
    uses. `maps` must be open.
    """

    def __init__(
        self,
        compiler: Compiler,
        renderer: Renderer,
        maps: MapStore,
        pins: Pins,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._compiler = compiler
        self._renderer = renderer
        self._maps = maps
        self._folder = pins.policy
        self._clock = clock
        self._held: dict[str, _Held] = {}  # by digest
        self._asked: dict[str, _Held] = {}  # by spec key
        self._leaving: dict[int, Version] = {}  # by slot, not given out before it is empty

    async def open(self) -> None:
        """Adopt what is pinned, load the deny program. Raises PolicyNotLoaded."""
        self._maps_id = str(sorted(each.info.id for each in self._maps.all()))
        folders = listing(self._folder)
        found = [version for folder in folders if (version := read_folder(folder)) is not None]
        adopted: dict[int, Version] = {}
        for version in sorted(found, key=lambda v: v.growth, reverse=True):
            if version.slot not in adopted and self._switched_in(version):
                adopted[version.slot] = version
                self._held[version.digest] = _Held(version)
        kept = {version.folder for version in adopted.values()}
        for folder in folders:
            if folder not in kept:
                await self._remove(folder)
        await self._ensure_deny()

    async def ensure(self, spec: ProgramSpec, values: Callable[[], Mapping[int, bytes]]) -> int:
        """The slot of a program, loaded when it is not yet. Raises PolicyNotLoaded."""
        result = (await self.ensure_all([Wanted(spec, values)]))[spec.key]
        if isinstance(result, PolicyNotLoaded):
            raise result
        return result

    async def ensure_all(self, wanted: Iterable[Wanted]) -> dict[str, int | PolicyNotLoaded]:
        """The slot, or why there is none, by spec key. What is missing compiles together."""
        results: dict[str, int | PolicyNotLoaded] = {}
        missing: list[_Missing] = []
        for each in {w.spec.key: w for w in wanted}.values():
            if (held := self._asked.get(each.spec.key)) and not held.stale:
                held.unused_since = None
                results[each.spec.key] = held.version.slot
                continue
            try:
                digest, sources = self._rendered(each.spec)
                slot = self._slot_of(each, digest)
            except BpfError as error:
                results[each.spec.key] = PolicyNotLoaded(each.spec, error)
                continue
            if slot is None:
                missing.append(_Missing(each, digest, sources))
            else:
                results[each.spec.key] = slot
        compiled = await self._compile([m.sources for m in missing])
        for one, objects in zip(missing, compiled, strict=True):
            results[one.wanted.spec.key] = self._load(one, objects)
        return results

    async def write(self, changes: Mapping[str, Mapping[int, bytes | None]]) -> int:
        """Put and (None) delete identities, by spec key; returns the number of map operations.

        Programs that are not loaded are passed over: they are filled when they are. Where a map is
        full, the program is loaded again around a larger one. Raises PolicyNotLoaded, after all
        others are written; what failed is `stale` until `ensure_all` has filled it anew.
        """
        failure: PolicyNotLoaded | None = None
        operations = 0
        for key, values in changes.items():
            held = self._asked.get(key)
            if held is None or held.spec is None:
                continue
            try:
                await self._write(held.spec, values)
            except (BpfError, OSError) as error:
                self._asked.get(key, held).stale = True
                failure = PolicyNotLoaded(held.spec, error)
            operations += len(values)
        if failure is not None:
            raise failure
        return operations

    def forget(self, in_use: Collection[int]) -> list[str]:
        """Give up the versions whose slot nobody has had for GRACE seconds; `free` removes them.

        `in_use`: the slots in the endpoints maps, and those about to be written there. Returns the
        spec keys of what is not loaded any more: no endpoint may be pointed at their slots from
        now on. To be called every few seconds.
        """
        now = self._clock()
        doomed = []
        for held in self._held.values():
            if held.version.slot == POLICY_SLOT_DENY or held.version.slot in in_use:
                held.unused_since = None
            elif held.unused_since is None:
                held.unused_since = now
            elif now - held.unused_since >= GRACE:
                doomed.append(held)
        for held in doomed:
            self._leaving[held.version.slot] = held.version
            del self._held[held.version.digest]
            if held.spec is not None:
                del self._asked[held.spec.key]
        return [held.spec.key for held in doomed if held.spec is not None]

    async def free(self) -> None:
        """Remove what was forgotten, one by one; after an error the next call goes on."""
        for slot, version in list(self._leaving.items()):
            for family in FAMILIES:
                await programs.clear_slots(self._maps["policy", family].descriptor, [slot])
            await self._remove(version.folder)
            del self._leaving[slot]

    @property
    def stale(self) -> list[str]:
        """The spec keys of programs that missed a change of their peers."""
        return [key for key, held in self._asked.items() if held.stale]

    @property
    def slots(self) -> frozenset[int]:
        """The slots that have a program, adopted ones too."""
        return frozenset(held.version.slot for held in self._held.values())

    def policies_in(self, slot: int) -> tuple[str, ...]:
        """The policies (namespace/name) a slot's program was made from, as far as known."""
        specs = (held.spec for held in self._held.values() if held.version.slot == slot)
        return next((spec.policies for spec in specs if spec is not None), ())

    # -- finding ------------------------------------------------------------------------------

    def _rendered(self, spec: ProgramSpec) -> tuple[str, list[Source]]:
        """Digest and sources. The digest covers all that makes one version differ from another."""
        texts = [self._renderer.render(TEMPLATE, spec=spec, family=f) for f in FAMILIES]
        whole = "\0".join([*texts, spec.key, self._maps_id])
        digest = hashlib.sha256(whole.encode()).hexdigest()[:16]
        names = [f"policy_{spec.key}_{family}" for family in FAMILIES]
        return digest, [Source(name, text) for name, text in zip(names, texts, strict=True)]

    def _slot_of(self, wanted: Wanted, digest: str) -> int | None:
        """The slot when the program is loaded; an adopted or stale one gets the peers it should."""
        held = self._held.get(digest)
        if held is None:
            return None
        if held.spec is None or held.stale:
            if not self._refilled(wanted, held.version):
                return None
            held.spec, held.stale = wanted.spec, False
            self._asked[wanted.spec.key] = held
        held.unused_since = None
        return held.version.slot

    @staticmethod
    def _refilled(wanted: Wanted, version: Version) -> bool:
        """False when the identity map is too small for what it should hold now."""
        if not wanted.spec.by_identity:
            return True
        values = wanted.values()
        actual = policyversion.read_peers(wanted.spec, version.folder)
        puts = {n: value for n, value in values.items() if actual.get(n) != value}
        deletes = actual.keys() - values.keys()
        try:
            policyversion.write_peers(wanted.spec, version.folder, puts, deletes)
        except MapFull:
            return False
        return True

    def _switched_in(self, version: Version) -> bool:
        try:
            policyversion.switch_in(version, self._maps)
        except BpfError:
            return False
        return True

    # -- loading ------------------------------------------------------------------------------

    async def _compile(
        self, programs_sources: Sequence[Sequence[Source]]
    ) -> list[list[Object] | BpfError]:
        """For each program the objects of both families, or what went wrong."""
        if not programs_sources:
            return []
        try:
            found = await self._compiler.compile_each([s for p in programs_sources for s in p])
        except BpfError as error:
            return [error for _ in programs_sources]
        results: list[list[Object] | BpfError] = []
        for start in range(0, len(found), len(FAMILIES)):
            pair = found[start : start + len(FAMILIES)]
            failed = next((o for o in pair if isinstance(o, CompileFailed)), None)
            results.append(failed or [o for o in pair if isinstance(o, Object)])
        return results

    def _load(self, missing: _Missing, objects: list[Object] | BpfError) -> int | PolicyNotLoaded:
        wanted, spec = missing.wanted, missing.wanted.spec
        if isinstance(objects, BpfError):
            return PolicyNotLoaded(spec, objects)
        try:
            slot = self._slot_of(wanted, missing.digest)
            if slot is not None:  # another task was faster
                return slot
            values = wanted.values() if spec.by_identity else {}
            return self._install(missing.digest, spec, objects, values)
        except (BpfError, OSError) as error:
            return PolicyNotLoaded(spec, error)

    async def _write(self, spec: ProgramSpec, values: Mapping[int, bytes | None]) -> None:
        puts = {number: value for number, value in values.items() if value is not None}
        deletes = values.keys() - puts.keys()
        try:
            policyversion.write_peers(spec, self._asked[spec.key].version.folder, puts, deletes)
            return
        except MapFull:
            digest, sources = self._rendered(spec)
            (objects,) = await self._compile([sources])
        if isinstance(objects, BpfError):
            raise objects
        held = self._asked[spec.key]  # another task may have been faster
        grown = {**policyversion.read_peers(spec, held.version.folder), **puts}
        for number in deletes:
            grown.pop(number, None)
        self._install(digest, spec, objects, grown)
        self._asked[spec.key].stale = held.stale

    def _install(
        self,
        digest: str,
        spec: ProgramSpec,
        objects: Sequence[Object],
        values: Mapping[int, bytes],
        slot: int | None = None,
    ) -> int:
        """Build and switch in, where the digest has no slot yet in an unused one; returns it."""
        held = self._held.get(digest)
        old = held.version if held else None
        if slot is None:
            slot = old.slot if old else self._unused_slot()
        growth = old.growth + 1 if old else 0
        folder = self._folder / f"{slot}_{digest}_{growth}_v{LAYOUT_VERSION}"
        version = Version(slot, digest, growth, folder)
        policyversion.build(spec, objects, values, version, self._maps)
        policyversion.switch_in(version, self._maps)
        self._held[digest] = self._asked[spec.key] = _Held(version, spec)
        if old:
            policyversion.remove(old.folder)
        return slot

    async def _ensure_deny(self) -> None:
        digest, sources = self._rendered(DENY)
        stale = [h for h in self._held.values() if h.version.slot == POLICY_SLOT_DENY]
        if [h.version.digest for h in stale] == [digest]:
            return
        (objects,) = await self._compile([sources])
        if isinstance(objects, BpfError):
            raise PolicyNotLoaded(DENY, objects)
        try:
            self._install(digest, DENY, objects, {}, POLICY_SLOT_DENY)
        except (BpfError, OSError) as error:
            raise PolicyNotLoaded(DENY, error) from error
        for old in stale:
            del self._held[old.version.digest]
            await self._remove(old.version.folder)

    def _unused_slot(self) -> int:
        taken = {held.version.slot for held in self._held.values()} | self._leaving.keys()
        room = self._maps["policy", FAMILIES[0]].info.max_entries
        free = (slot for slot in range(POLICY_SLOT_FIRST, room) if slot not in taken)
        slot = next(free, None)
        if slot is None:
            raise MapFull("policy", room)
        return slot

    # -- freeing ------------------------------------------------------------------------------

    @staticmethod
    async def _remove(folder: Path) -> None:
        policyversion.remove(folder)
        await asyncio.sleep(FREE_PAUSE)

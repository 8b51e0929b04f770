# SPDX-License-Identifier: Apache-2.0
"""The maps of layouts.MAPS in the kernel: opened or created, pinned, read and written.

`MapStore.open()` first, then `store["frontends", 4]` is an OpenMap with `read`, `write`, `lookup`;
`store.descriptors(4)` gives what Function.with_maps wants. All calls block for well under a
millisecond per thousand entries.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from bpfdp_agent import layouts
from bpfdp_agent.bpf import syscall
from bpfdp_agent.bpf.errors import MapFull, MapMismatch, NotFound, SyscallFailed
from bpfdp_agent.dataplane.pins import Pins, listing, replace_pin

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

_FULL = (errno.E2BIG, errno.ENOSPC)
_NOT_COPIED = (layouts.MapType.PROG_ARRAY, layouts.MapType.PERCPU_ARRAY)


class OpenMap:
    """A map of one family, open. Keys and values are bytes as layouts.py packs them."""

    def __init__(self, layout: layouts.Map, family: int, descriptor: int) -> None:
        self.layout = layout
        self.family = family
        self.descriptor = descriptor
        self.info = syscall.map_info(descriptor)

    @property
    def name(self) -> str:
        """Name with the family, as in messages and metrics."""
        return f"{self.layout.name}{self.family if self.layout.per_family else ''}"

    def read(self) -> dict[bytes, bytes]:
        """Every entry."""
        return syscall.map_items(self.descriptor, self.info)

    def count(self) -> int:
        """Number of entries, cheaper than `len(read())`."""
        return syscall.map_count(self.descriptor, self.info)

    def lookup(self, key: bytes) -> bytes | None:
        """One value, or None."""
        return syscall.map_lookup(self.descriptor, key, self.info.value_bytes)

    def write(self, puts: Mapping[bytes, bytes], deletes: Iterable[bytes] = ()) -> None:
        """Put, then delete. Where there is no room to put, delete first. Raises MapFull."""
        leaving = list(deletes)
        try:
            syscall.map_update_all(self.descriptor, puts)
        except SyscallFailed as error:
            if error.errno not in _FULL:
                raise
            syscall.map_delete_all(self.descriptor, leaving)
            self._put_again(puts, made_room=bool(leaving))
            return
        syscall.map_delete_all(self.descriptor, leaving)

    def _put_again(self, puts: Mapping[bytes, bytes], *, made_room: bool) -> None:
        full = MapFull(self.name, self.info.max_entries)
        if not made_room:
            raise full
        try:
            syscall.map_update_all(self.descriptor, puts)
        except SyscallFailed as error:
            if error.errno in _FULL:
                raise full from error
            raise

    def close(self) -> None:
        """Close the descriptor; pins and programs keep the map."""
        os.close(self.descriptor)


def create_map(
    layout: layouts.Map, family: int, *, max_entries: int | None = None, pin: Path | None = None
) -> OpenMap:
    """A new, empty map, pinned (in place of an old one) where `pin` says."""
    descriptor = syscall.map_create(
        layout.type,
        layout.key.size(family),
        layout.value.size(family),
        max_entries or layout.max_entries,
        flags=layout.flags,
        name=f"bpfdp_{layout.name}",
    )
    if pin is not None:
        try:
            replace_pin(descriptor, pin)
        except SyscallFailed:
            os.close(descriptor)
            raise
    return OpenMap(layout, family, descriptor)


def open_map(layout: layouts.Map, family: int, pin: Path) -> OpenMap | None:
    """The map pinned there, or None. Raises MapMismatch when it is not of this layout."""
    try:
        found = OpenMap(layout, family, syscall.obj_get(pin))
    except NotFound:
        return None
    wanted = (int(layout.type), layout.key.size(family), layout.value.size(family))
    actual = (found.info.type, found.info.key_size, found.info.value_size)
    if actual != wanted:
        found.close()
        raise MapMismatch(
            f"pinned map {pin} has (type, key, value) {actual}, this version needs {wanted}: "
            "another version of this agent left it there; run `bpfdp cleanup` on the node"
        )
    return found


class MapStore:
    """All maps of `maps` for both families; `sizes` overrides max_entries by map name."""

    def __init__(
        self,
        pins: Pins | None = None,
        maps: Sequence[layouts.Map] = layouts.MAPS,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        self._pins = pins or Pins()
        self._layouts = maps
        self._sizes = dict(sizes or {})
        self._open: dict[tuple[str, int], OpenMap] = {}
        self._outgrown: list[tuple[OpenMap, OpenMap]] = []
        self.unfit: list[MapFull] = []
        """Maps that hold more than the size asked for: they keep the size they have."""

    def open(self) -> None:
        """Open or create and pin every map. A map of another size is copied into a new one.

        Raises MapMismatch and SyscallFailed; nothing is open then.
        """
        self._pins.make()
        try:
            self._open_all()
        except BaseException:
            self.close()
            raise

    def _open_all(self) -> None:
        for layout in self._layouts:
            if layout.per_family:
                for family in layouts.FAMILIES:
                    self._open[layout.name, family] = self._open_or_create(layout, family)
            else:
                shared = self._open_or_create(layout, layouts.FAMILIES[0])
                self._open.update({(layout.name, family): shared for family in layouts.FAMILIES})

    def __getitem__(self, which: tuple[str, int]) -> OpenMap:
        """The open map by (name, family)."""
        return self._open[which]

    def all(self) -> list[OpenMap]:
        """Every open map, once."""
        return list({each.descriptor: each for each in self._open.values()}.values())

    def descriptors(self, family: int) -> dict[str, int]:
        """Descriptors by the maps' names in C."""
        return {n: each.descriptor for (n, f), each in self._open.items() if f == family}

    def read(self, name: str, family: int) -> dict[bytes, bytes]:
        """Every entry of a map."""
        return self[name, family].read()

    def write(
        self, name: str, family: int, puts: Mapping[bytes, bytes], deletes: Iterable[bytes] = ()
    ) -> None:
        """Put and delete entries. Raises MapFull."""
        self[name, family].write(puts, deletes)

    def stale_pins(self) -> list[Path]:
        """Pins of maps that this version does not know: of older layouts, or dropped."""
        known = {layout.pin_name(family) for layout in self._layouts for family in layouts.FAMILIES}
        return [pin for pin in listing(self._pins.maps) if pin.name not in known]

    def remove_stale(self) -> list[Path]:
        """Unpin those; to be called when no program uses them any more."""
        stale = self.stale_pins()
        for pin in stale:
            pin.unlink(missing_ok=True)
        return stale

    def carry_over(self) -> int:
        """What programs still wrote to maps that have a successor of another size, to that one.

        To be called when no hook leads to those programs any more. Returns the entries carried.
        """
        carried = 0
        while self._outgrown:
            old, new = self._outgrown.pop()
            known = new.read()
            late = {key: value for key, value in old.read().items() if key not in known}
            old.close()
            new.write(late)
            carried += len(late)
        return carried

    def close(self) -> None:
        """Close every descriptor; what is pinned stays."""
        for old, _ in self._outgrown:
            old.close()
        self._outgrown.clear()
        for each in self.all():
            each.close()
        self._open.clear()

    def _open_or_create(self, layout: layouts.Map, family: int) -> OpenMap:
        pin = self._pins.maps / layout.pin_name(family)
        wanted = self._sizes.get(layout.name, layout.max_entries)
        found = open_map(layout, family, pin)
        if found is None:
            return create_map(layout, family, max_entries=wanted, pin=pin)
        if found.info.max_entries == wanted or layout.type in _NOT_COPIED:
            return found
        try:
            return self._resized(found, wanted, pin)
        except MapFull as error:
            self.unfit.append(error)
            return found
        except BaseException:
            found.close()
            raise

    def _resized(self, old: OpenMap, max_entries: int, pin: Path) -> OpenMap:
        """A copy of another size in the old one's place; programs must be loaded again to use it.

        Raises MapFull when the entries do not fit. After an error the old map is there, and open.
        """
        new = create_map(old.layout, old.family, max_entries=max_entries)
        try:
            new.write(old.read())
            replace_pin(new.descriptor, pin)
        except BaseException:
            new.close()
            raise
        if old.layout.type is layouts.MapType.LRU_HASH:  # what programs write
            self._outgrown.append((old, new))
        else:
            old.close()
        return new

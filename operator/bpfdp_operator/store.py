# SPDX-License-Identifier: Apache-2.0
"""The latest of every object that is watched, by kind and name.

Watch events come in through `put` and `drop`. A watch that was interrupted never tells of what was
deleted meanwhile, so every kind is also listed now and then and taken over whole by `replace`.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bpfdp_operator.world import Metadata


class HasMetadata(Protocol):
    """Any object of the API."""

    @property
    def metadata(self) -> Metadata:
        """ObjectMeta."""


T = TypeVar("T", bound=HasMetadata)
Key = tuple[str, str]


class Store:
    """Typed objects by kind; an older version never takes the place of a newer one."""

    def __init__(self) -> None:
        self._kinds: dict[type[HasMetadata], dict[Key, HasMetadata]] = defaultdict(dict)

    def put(self, item: HasMetadata) -> bool:
        """Keep the object unless a newer version is known; tell whether anything in it changed."""
        kept = self._kinds[type(item)]
        old = kept.get(_key(item))
        if old is None or _age(item) >= _age(old) or item.metadata.uid != old.metadata.uid:
            kept[_key(item)] = item
            return old is None or _content(item) != _content(old)
        return False

    def drop(self, item: HasMetadata) -> None:
        """Forget the object."""
        self._kinds[type(item)].pop(_key(item), None)

    def replace(self, kind: type[T], items: Iterable[T]) -> None:
        """Take over a complete list: what is not in it is gone."""
        old = self._kinds[kind]
        self._kinds[kind] = {_key(item): item for item in items}
        for key in self._kinds[kind].keys() & old.keys():
            self.put(old[key])

    def get(self, kind: type[T], name: str, namespace: str = "") -> T | None:
        """Return one object, or None."""
        found = self._kinds[kind].get((namespace, name))
        return found if isinstance(found, kind) else None

    def all(self, kind: type[T]) -> tuple[T, ...]:
        """Return every object of that kind, by name."""
        items = sorted(self._kinds[kind].items())
        return tuple(item for _, item in items if isinstance(item, kind))


def _key(item: HasMetadata) -> Key:
    return item.metadata.namespace, item.metadata.name


def _content(item: HasMetadata) -> list[tuple[str, object]]:
    """What is kept of the object, but for its version: a Node's changes with every heartbeat."""
    unversioned = msgspec.structs.replace(item.metadata, resource_version="")
    fields = msgspec.structs.asdict(item)  # type: ignore[arg-type]
    return sorted((fields | {"metadata": unversioned}).items())


def _age(item: HasMetadata) -> int:
    version = item.metadata.resource_version
    return int(version) if version.isdigit() else 0

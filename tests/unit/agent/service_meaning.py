# SPDX-License-Identifier: Apache-2.0
"""What the service maps of one family say, whatever ids and slots say it."""

from __future__ import annotations

from bpfdp_agent.diff.tables import SERVICE_MAPS
from bpfdp_agent.layouts import (
    FRONTEND,
    INDEX,
    LIST_KEY,
    MAGLEV,
    MEMBER_KEY,
    SLOT_KEY,
    SOURCE_RANGE_KEY,
    U32,
    ListKind,
)


def meaning(family, tables):
    """Frontends with all that they lead to, the backends, and the sizes of all maps.

    The sizes: nothing is left over that no frontend leads to.
    """
    backends = {INDEX.unpack(family, k)["index"]: v for k, v in tables["backends"].items()}
    lists, members, ranges = {}, {}, {}
    for key, value in tables["slots"].items():
        raw = SLOT_KEY.unpack(family, key)
        backend = backends[U32.unpack(family, value)["value"]]
        lists.setdefault(raw["list"], {})[raw["slot"]] = backend
    for key in tables["members"]:
        raw = MEMBER_KEY.unpack(family, key)
        members.setdefault(raw["list"], set()).add(backends[raw["backend"]])
    for key in tables["source_ranges"]:
        raw = SOURCE_RANGE_KEY.unpack(family, key)
        ranges.setdefault(raw["service"], set()).add((raw["prefixlen"], raw["addr"]))
    chosen = {}
    for key, value in tables["maglev"].items():
        list_id = LIST_KEY.unpack(family, key)["list"]
        chosen[list_id] = [lists[list_id][s] for s in MAGLEV.unpack(family, value)["slots"]]
    said = {}
    for key, value in tables["frontends"].items():
        entry = FRONTEND.unpack(family, value)
        service = entry.pop("service")
        ids = [service * 2 + kind for kind in ListKind]
        said[key] = (
            entry,
            [sorted(lists.get(i, {}).values()) for i in ids],
            [members.get(i, set()) for i in ids],
            [chosen.get(i, []) for i in ids],
            ranges.get(service, set()),
        )
    return said, sorted(backends.values()), {name: len(tables[name]) for name in SERVICE_MAPS}

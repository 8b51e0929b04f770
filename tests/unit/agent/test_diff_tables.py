# SPDX-License-Identifier: Apache-2.0
"""Differences: applied to the actual they give the desired; a second time they are empty."""

from __future__ import annotations

from bpfdp_agent.diff.tables import SERVICE_MAPS, difference, replace, service_writes
from hypothesis import given
from hypothesis import strategies as st

tables = st.dictionaries(st.binary(max_size=1), st.binary(max_size=1))
maps = st.fixed_dictionaries(dict.fromkeys(SERVICE_MAPS, tables))


def apply(writes, actual):
    result = {name: dict(content) for name, content in actual.items()}
    for step in writes:
        result[step.map].update(step.puts)
        for key in step.deletes:
            del result[step.map][key]  # a delete of nothing would be an error
    return result


@given(tables, tables)
def test_one_map(actual, desired):
    writes = replace("endpoints", 4, actual, desired)
    assert apply(writes, {"endpoints": actual}) == {"endpoints": desired}
    assert replace("endpoints", 4, desired, desired).steps == ()


@given(maps, maps)
def test_service_maps(actual, desired):
    writes = service_writes(6, {n: difference(actual[n], desired[n]) for n in SERVICE_MAPS})
    assert apply(writes, actual) == desired
    assert all(step.family == 6 and len(step) for step in writes)
    assert len(writes) == sum(len(step) for step in writes)


@given(maps, maps)
def test_frontends_go_first_and_come_last(actual, desired):
    writes = service_writes(4, {n: difference(actual[n], desired[n]) for n in SERVICE_MAPS})
    order = [(step.map, bool(step.puts)) for step in writes]
    if ("frontends", False) in order:
        assert order.index(("frontends", False)) == 0
    if ("frontends", True) in order:
        place = order.index(("frontends", True))
        assert all(puts for name, puts in order[:place] if name != "frontends")
        assert not any(puts for _, puts in order[place + 1 :])

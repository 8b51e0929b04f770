# SPDX-License-Identifier: Apache-2.0
"""Maglev tables: fair, the same whatever the order of the slots, and little moves."""

from __future__ import annotations

from collections import Counter

import pytest
from bpfdp_agent.desired.maglev import LARGEST, lookup_table
from bpfdp_agent.layouts import MAGLEV_SIZE
from unit.agent.kube_objects import added, service
from unit.agent.test_desired_services import change, ends, running

BACKENDS = [(bytes([10, 0, 0, n]), 8080) for n in range(LARGEST)]


@pytest.mark.parametrize("size", [1, 2, 3, 40, LARGEST])
def test_shares_differ_by_one_place_at_most(size):
    shares = Counter(lookup_table(BACKENDS[:size]))
    assert len(shares) == size
    assert max(shares.values()) - min(shares.values()) <= 1


def test_nodes_with_other_slots_choose_alike():
    one, other = BACKENDS[:7], BACKENDS[6::-1]
    first, second = lookup_table(one), lookup_table(other)
    assert [one[slot] for slot in first] == [other[slot] for slot in second]


def test_a_backend_that_goes_moves_little_else():
    before, rest = BACKENDS[:10], BACKENDS[:9]
    old, new = lookup_table(before), lookup_table(rest)
    moved = sum(a != b for a, b in zip(old, new, strict=True) if a != 9)
    assert moved < MAGLEV_SIZE * 0.15


def test_tables_are_written_where_there_is_a_choice_and_taken_back():
    view, tables, kernel = running(service(), ends(1, 2, 3))
    tables.use_maglev(True)
    kernel.write(tables.update({}))
    assert len(kernel.tables["maglev"]) == 1, "the Local list is of no use to this service"
    kernel.write(change(view, tables, added(ends(1))))
    assert not kernel.tables["maglev"]
    kernel.write(change(view, tables, added(ends(1, 2))))
    assert len(kernel.tables["maglev"]) == 1
    assert tables.resync(kernel.tables).steps == ()
    tables.use_maglev(False)
    kernel.write(tables.update({}))
    assert not kernel.tables["maglev"]

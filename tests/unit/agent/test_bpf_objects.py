# SPDX-License-Identifier: Apache-2.0
"""Relocations: which instruction refers to which map."""

from __future__ import annotations

import struct

import pytest
from bpfdp_agent.bpf import instructions as asm
from bpfdp_agent.bpf.objects import Function, relocations_of

CODE = (
    asm.load_map(1, 7)
    + asm.instruction(0x18, 2, immediate=7)  # a plain 64-bit constant, not a map
    + asm.instruction(0)
    + asm.load_map(3, 9)
    + asm.returning(0)
)


def test_only_map_references_are_relocations():
    assert relocations_of(CODE, {7: "ct", 9: "nodes"}) == ((0, "ct"), (4, "nodes"))


def test_with_maps_puts_the_descriptors_in_and_nothing_else():
    function = Function("f", CODE, ((0, "ct"), (4, "nodes")))
    patched = function.with_maps({"ct": 70, "nodes": 90, "other": 1})
    assert struct.unpack_from("<i", patched, 4) == (70,)
    assert struct.unpack_from("<i", patched, 4 * 8 + 4) == (90,)
    assert relocations_of(patched, {70: "ct", 90: "nodes"}) == function.relocations
    assert [i for i in range(len(CODE)) if CODE[i] != patched[i]] == [4, 36]


def test_a_missing_map_is_a_key_error():
    with pytest.raises(KeyError, match="nodes"):
        Function("f", CODE, ((4, "nodes"),)).with_maps({})

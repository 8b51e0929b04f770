# SPDX-License-Identifier: Apache-2.0
"""Probing: this kernel has what is needed, and a missing feature is named."""

from __future__ import annotations

import os

import pytest
from bpf.kernel import need
from bpfdp_agent.bpf.features import FAKE_MISSING, FEATURES, missing_required, probe


@pytest.fixture(autouse=True)
def root():
    need(os.geteuid() == 0, "root")


def test_this_kernel_has_everything_but_perhaps_the_mount():
    missing = [f for f in probe(frozenset()) if not f.supported and f.name != "bpffs"]
    assert missing == []


def test_a_feature_made_missing_is_named(monkeypatch):
    monkeypatch.setenv(FAKE_MISSING, "redirect_peer,map_batch")
    found = {f.name: f for f in probe()}
    assert list(found) == [each.name for each in FEATURES]
    assert not found["redirect_peer"].supported
    assert found["redirect_peer"].message
    lacking = [f.name for f in missing_required(tuple(found.values())) if f.name != "bpffs"]
    assert lacking == ["redirect_peer"]


def test_one_way_to_attach_is_enough_and_none_is_not():
    one = probe(frozenset({"tcx"}))
    none = probe(frozenset({"tcx", "clsact"}))
    assert "tcx" not in {f.name for f in missing_required(one)}
    assert {"tcx", "clsact"} <= {f.name for f in missing_required(none)}

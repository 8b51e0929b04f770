# SPDX-License-Identifier: Apache-2.0
"""Templates: delimiters that C does not use, and errors that name the place."""

from __future__ import annotations

import pytest
from bpfdp_agent import layouts
from bpfdp_agent.bpf.errors import TemplateInvalid
from bpfdp_agent.bpf.render import Renderer, declarations


def render(tmp_path, text, **variables):
    (tmp_path / "t.c.j2").write_text(text)
    return Renderer(tmp_path).render("t.c.j2", **variables)


def test_c_passes_through_untouched(tmp_path):
    text = "struct a b = {{0}}; // 100% {%d} #define X {#}\n/* @ % # */ int x[] = {{1}, {2}};\n"
    assert render(tmp_path, text) == text


def test_statements_and_variables(tmp_path):
    text = "//% if family == 4\nfour @{ family }\n//% else\nsix\n//% endif\nend\n"
    assert render(tmp_path, text, family=4) == "four 4\nend\n"
    assert render(tmp_path, text, family=6) == "six\nend\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("@{ nowhere }\n", "nowhere"),
        ("a\n//% if x\n", r"t\.c\.j2:2"),
        ('//% include "gone.h"\n', r"gone\.h"),
    ],
)
def test_mistakes_name_their_place(tmp_path, text, words):
    with pytest.raises(TemplateInvalid, match=words):
        render(tmp_path, text)


@pytest.mark.parametrize("family", layouts.FAMILIES)
def test_every_map_is_declared_once(family):
    text = declarations(family)
    for described in layouts.MAPS:
        assert text.count(f", {described.name}, 1") == 1
        for struct in (described.key, described.value):
            assert struct in (layouts.U32, layouts.INDEX) or (
                text.count(f"struct {struct.name} {{") == 1
            )

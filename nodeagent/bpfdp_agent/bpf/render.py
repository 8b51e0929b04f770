# SPDX-License-Identifier: Apache-2.0
"""Program texts from the templates under bpf_templates/.

Jinja's default delimiters occur in C, so: `//% if …` lines are statements, `@{ … }` is a variable,
`/*% … %*/` a block inside a line, `/*# … #*/` a comment. An undefined variable is an error.

Templates see `declarations(family)` (= `structs(family)` + `maps()`), generated from
layouts.py. In C a map has its layout's name without the family suffix, a u32 key or value is a
plain `__u32`, and every map is declared with one entry: the real one is created by
dataplane/maps.py and put in when the program is loaded. `addr_t` is
`struct { __be32 w[family == 4 ? 1 : 4]; }` unless ADDR_T_DEFINED is defined before.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jinja2

from bpfdp_agent import layouts
from bpfdp_agent.bpf.errors import TemplateInvalid

INSTALLED_TEMPLATES = Path("/usr/share/bpfdp/templates")

_BCC_KIND = {
    layouts.MapType.HASH: "hash",
    layouts.MapType.ARRAY: "array",
    layouts.MapType.PROG_ARRAY: "prog",
    layouts.MapType.PERCPU_ARRAY: "percpu_array",
    layouts.MapType.LRU_HASH: "lru_hash",
    layouts.MapType.LPM_TRIE: "lpm_trie",
}
_PLAIN = (layouts.U32, layouts.INDEX)


def templates_dir() -> Path:
    """Where the templates are: $BPFDP_TEMPLATES, the installed place, or the source tree's."""
    if override := os.environ.get("BPFDP_TEMPLATES"):
        return Path(override)
    if INSTALLED_TEMPLATES.is_dir():
        return INSTALLED_TEMPLATES
    return Path(__file__).resolve().parents[3] / "bpf_templates"


class Renderer:
    """Renders templates of one directory. Raises TemplateInvalid."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory or templates_dir()
        self._environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(self.directory),
            line_statement_prefix="//%",
            variable_start_string="@{",
            variable_end_string="}",
            block_start_string="/*%",
            block_end_string="%*/",
            comment_start_string="/*#",
            comment_end_string="#*/",
            undefined=jinja2.StrictUndefined,
            keep_trailing_newline=True,
            autoescape=False,  # noqa: S701 - the output is C
        )
        self._environment.globals.update(
            structs=structs, maps=maps, declarations=declarations, layouts=layouts
        )

    def render(self, template: str, **variables: Any) -> str:
        """The text of `template` (a path below the directory)."""
        try:
            return self._environment.get_template(template).render(**variables)
        except jinja2.TemplateNotFound as error:
            raise TemplateInvalid(
                f"template {template}: {error.name} is not in {self.directory}"
            ) from error
        except jinja2.TemplateSyntaxError as error:
            raise TemplateInvalid(f"{error.filename}:{error.lineno}: {error.message}") from error
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise TemplateInvalid(f"template {template}: {error}") from error


def declarations(family: int) -> str:
    """Every struct and map of layouts.py as C for one address family."""
    return structs(family) + "\n" + maps()


def structs(family: int) -> str:
    """`addr_t` and the structs of every map's key and value, each with its size check."""
    found: dict[str, layouts.Struct] = {}
    for described in layouts.MAPS:
        for struct in (described.key, described.value):
            if struct not in _PLAIN:
                found.setdefault(struct.name, struct)
    return _address_type(family) + "\n".join(s.c_source(family) for s in found.values())


def maps() -> str:
    """The BCC declaration of every map, with one entry each."""
    return "".join(map_declaration(described) + "\n" for described in layouts.MAPS)


def map_declaration(described: layouts.Map) -> str:
    """BCC declaration of one map; policies declare their own maps with it."""
    kind = _BCC_KIND[described.type]
    key, value = _c_type(described.key), _c_type(described.value)
    return (
        f'BPF_F_TABLE("{kind}", {key}, {value}, {described.name}, 1, {described.flags});'
        if described.flags
        else f'BPF_TABLE("{kind}", {key}, {value}, {described.name}, 1);'
    )


def _c_type(struct: layouts.Struct) -> str:
    return "__u32" if struct in _PLAIN else f"struct {struct.name}"


def _address_type(family: int) -> str:
    words = 1 if family == 4 else 4
    return (
        "#ifndef ADDR_T_DEFINED\n#define ADDR_T_DEFINED\n"
        f"typedef struct {{\n    __be32 w[{words}];\n}} addr_t;\n#endif\n\n"
    )

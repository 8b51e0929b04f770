# SPDX-License-Identifier: Apache-2.0
"""What operator and agent read and write are fields that the CRDs have: a structural schema drops others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from bpfdp_agent import config, layouts
from bpfdp_agent.serve import nodestatus
from bpfdp_agent.watch import wire
from bpfdp_operator import world

REPO = Path(__file__).resolve().parents[3]


def section(name: str, part: str) -> dict[str, Any]:
    crd = yaml.safe_load((REPO / "crds" / f"{name}.yaml").read_text())
    root = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    found: dict[str, Any] = root["properties"][part]
    return found


def parts(info: Any) -> Iterator[Any]:
    """The types in a union, or the type itself."""
    yield from info.types if isinstance(info, msgspec.inspect.UnionType) else [info]


def strays(info: Any, field: dict[str, Any], path: str = "") -> Iterator[str]:
    """Fields of a struct, and values of its enums, that the schema does not have."""
    match info:
        case msgspec.inspect.StructType():
            for member in info.fields:
                here = f"{path}.{member.encode_name}"
                child = field.get("properties", {}).get(member.encode_name)
                if child is None:
                    yield here
                    continue
                for part in parts(member.type):
                    yield from strays(part, child, here)
        case msgspec.inspect.VarTupleType() | msgspec.inspect.ListType():
            yield from strays(info.item_type, field["items"], f"{path}[]")
        case msgspec.inspect.LiteralType() if "enum" in field:
            yield from (f"{path}={value}" for value in info.values if value not in field["enum"])


@pytest.mark.parametrize(
    ("struct", "crd", "part"),
    [
        (world.ConfigSpec, "bpfdataplanes", "spec"),
        (world.ConfigStatus, "bpfdataplanes", "status"),
        (world.BpfNodeStatus, "bpfnodes", "status"),
        (config.DataplaneSpec, "bpfdataplanes", "spec"),
        (wire.ConfigStatus, "bpfdataplanes", "status"),
        (nodestatus.Status, "bpfnodes", "status"),
    ],
)
def test_every_field_in_code_is_in_the_crd(struct: type, crd: str, part: str) -> None:
    assert list(strays(msgspec.inspect.type_info(struct), section(crd, part))) == []


def test_every_field_of_the_spec_has_a_reader() -> None:
    readers = (world.ConfigSpec, config.DataplaneSpec)
    read = {field.encode_name for reader in readers for field in msgspec.structs.fields(reader)}
    assert section("bpfdataplanes", "spec")["properties"].keys() == read


def test_every_field_of_the_status_is_written() -> None:
    for struct, crd in ((world.ConfigStatus, "bpfdataplanes"), (nodestatus.Status, "bpfnodes")):
        written = {field.encode_name for field in msgspec.structs.fields(struct)}
        assert section(crd, "status")["properties"].keys() == written


def test_states_are_the_same_words() -> None:
    status = section("bpfdataplanes", "status")["properties"]
    assert set(status["kubeProxy"]["properties"]["state"]["enum"]) == set(world.KubeProxyState)
    assert set(status["agents"]["properties"]["mode"]["enum"]) == set(world.AgentsMode)


def test_map_sizes_are_those_of_the_layouts() -> None:
    sizes = {entry.name: entry.max_entries for entry in layouts.MAPS}
    for name, field in section("bpfdataplanes", "spec")["properties"]["maps"]["properties"].items():
        assert sizes[re.sub("[A-Z]", lambda m: "_" + m[0].lower(), name)] == field["default"], name

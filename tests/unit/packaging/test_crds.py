# SPDX-License-Identifier: Apache-2.0
"""The CRDs as files: every field described, defaulted and bounded; copies and docs without drift."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).resolve().parents[3]
NAMES = ["bpfdataplanes", "bpfnodes"]

# Absent has a meaning of its own, which the description says.
WITHOUT_DEFAULT = {
    "spec.apiServer.host",
    "spec.apiServer.port",
    "spec.nodeAgent.image",
    "spec.nodeAgent.tolerations[].key",
    "spec.nodeAgent.tolerations[].operator",
    "spec.nodeAgent.tolerations[].value",
    "spec.nodeAgent.tolerations[].effect",
    "spec.nodeAgent.tolerations[].tolerationSeconds",
    "spec.nodeAgent.updateStrategy.rollingUpdate",
}


def load(name: str) -> dict[str, Any]:
    crd: dict[str, Any] = yaml.safe_load((REPO / "crds" / f"{name}.yaml").read_text())
    return crd


def schema(name: str) -> dict[str, Any]:
    root: dict[str, Any] = load(name)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return root


def walk(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema below the root by path, items and map values included."""
    for name, child in node.get("properties", {}).items():
        here = f"{path}.{name}".lstrip(".")
        if here == "metadata":
            continue
        yield here, child
        yield from walk(child, here)
    for key, mark in (("items", "[]"), ("additionalProperties", "{}")):
        if key in node:
            yield f"{path}{mark}", node[key]
            yield from walk(node[key], f"{path}{mark}")


def bounded(field: dict[str, Any]) -> bool:
    if field.get("x-kubernetes-int-or-string"):
        return "maxLength" in field or "x-kubernetes-validations" in field
    match field["type"]:
        case "string":
            return "enum" in field or "maxLength" in field
        case "integer":
            return {"minimum", "maximum", "format"} <= field.keys()
        case "array":
            return "maxItems" in field and "x-kubernetes-list-type" in field
        case "object":
            return "properties" in field or "maxProperties" in field
        case kind:
            return bool(kind == "boolean")


@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_described_and_bounded(name: str) -> None:
    for path, field in walk(schema(name)):
        assert field.get("description"), path
        if path not in ("apiVersion", "kind"):
            assert bounded(field), path


def test_every_field_of_the_spec_has_a_default() -> None:
    without = {
        path
        for path, field in walk(schema("bpfdataplanes"))
        if path.startswith("spec") and "default" not in field and not path.endswith(("[]", "{}"))
    }
    assert without == WITHOUT_DEFAULT


@pytest.mark.parametrize("name", NAMES)
def test_conditions_are_a_map_by_type(name: str) -> None:
    conditions = schema(name)["properties"]["status"]["properties"]["conditions"]
    assert conditions["x-kubernetes-list-type"] == "map"
    assert conditions["x-kubernetes-list-map-keys"] == ["type"]


@pytest.mark.parametrize("name", NAMES)
def test_messages_of_rules_say_what_to_do(name: str) -> None:
    """A rule without a message would show its expression to the user."""
    for path, field in [("", schema(name)), *walk(schema(name))]:
        for rule in field.get("x-kubernetes-validations", []):
            text = rule.get("messageExpression") or rule.get("message", "")
            assert len(text) > 40, (path, rule["rule"])


@pytest.mark.parametrize("name", NAMES)
def test_the_charts_copy_is_the_source(name: str) -> None:
    source = (REPO / "crds" / f"{name}.yaml").read_text()
    copy = (REPO / "charts" / "bpf-dataplane" / "crds" / f"{name}.yaml").read_text()
    assert copy == source, "run `make chart`"


def test_the_chart_has_no_other_crds() -> None:
    found = {path.stem for path in (REPO / "charts" / "bpf-dataplane" / "crds").iterdir()}
    assert found == set(NAMES)


def test_the_reference_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location(
        "make_configuration", REPO / "docs" / "make_configuration.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (REPO / "docs" / "configuration.md").read_text() == module.document(), "run `make docs`"

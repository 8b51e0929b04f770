# SPDX-License-Identifier: Apache-2.0
"""Write docs/configuration.md from the CRDs: `make docs`. A test keeps the two equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator

REPO = Path(__file__).resolve().parents[1]
TARGET = REPO / "docs" / "configuration.md"

HEAD = """\
<!-- Made from crds/ by `make docs`; edit the descriptions there. -->
# Configuration

One object, `BpfDataplaneConfig` named `default`, says what the dataplane of a cluster should be.
The chart creates it after the first install; from then on it is yours:

    kubectl edit bpfdataplanes default
    kubectl explain bpfdataplanes.spec.services

Everything has a default, so the smallest one is:

```yaml
apiVersion: bpfdataplane.io/v1alpha1
kind: BpfDataplaneConfig
metadata:
  name: default
spec:
  kubeProxyManagement: Enabled
```

Contradictions are refused at once, with a message that says what to change. What only a node can
tell (a regular expression that does not compile, a map that is too small) is reported in the
conditions.
"""


def load(name: str) -> dict[str, Any]:
    """Return a CRD of crds/."""
    crd: dict[str, Any] = yaml.safe_load((REPO / "crds" / f"{name}.yaml").read_text())
    return crd


def schema(crd: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of the CRD's only version."""
    (version,) = crd["spec"]["versions"]
    root: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    return root


def fields(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every field below `node` with its dotted path, parents first."""
    for name, child in node.get("properties", {}).items():
        here = f"{path}.{name}" if path else name
        yield here, child
        yield from fields(child, here)
        if "items" in child:
            yield from fields(child["items"], f"{here}[]")


def values(field: dict[str, Any]) -> str:
    """Say in words what a field may hold."""
    if field.get("x-kubernetes-int-or-string"):
        return "number or string"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field["type"] == "array":
        return f"up to {field['maxItems']}: {values(field['items'])}"
    if field["type"] == "integer":
        return f"{field['minimum']} to {field['maximum']}"
    if "additionalProperties" in field:
        return f"map of up to {field['maxProperties']}"
    limit = f", up to {field['maxLength']} characters" if "maxLength" in field else ""
    return str(field["type"]) + limit


def default(field: dict[str, Any]) -> str:
    """Return a field's default; sections show none, as their fields have their own."""
    if "default" not in field or "properties" in field:
        return ""
    value = field["default"]
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def cell(text: str) -> str:
    """Return the text fit for a table's cell."""
    return text.replace("|", "\\|")


def spec_table(spec: dict[str, Any]) -> Iterator[str]:
    """Yield the table of the spec's fields."""
    yield "| Field | Values | Default | Meaning |"
    yield "|---|---|---|---|"
    for path, field in fields(spec):
        meaning = cell(field["description"])
        if "properties" in field:
            yield f"| **`{path}`** | | | {meaning} |"
        else:
            yield f"| `{path}` | {cell(values(field))} | {cell(default(field))} | {meaning} |"


def status_table(status: dict[str, Any]) -> Iterator[str]:
    """Yield the table of a status' fields."""
    yield "| Field | Meaning |"
    yield "|---|---|"
    for path, field in fields(status):
        yield f"| `{path}` | {cell(field['description'])} |"


def refusals(root: dict[str, Any]) -> Iterator[str]:
    """Yield the messages of the rules over several fields."""
    for rule in root["x-kubernetes-validations"]:
        yield f"- {rule['message']}"


def columns(crd: dict[str, Any]) -> Iterator[str]:
    """Yield what `kubectl get` prints."""
    for column in crd["spec"]["versions"][0]["additionalPrinterColumns"]:
        wide = " (with `-o wide`)" if column.get("priority") else ""
        yield f"- `{column['name'].upper()}`{wide}: {column['description']}"


def document() -> str:
    """Return the whole page."""
    config, node = load("bpfdataplanes"), load("bpfnodes")
    root = schema(config)
    parts = [
        HEAD,
        "## Fields of spec\n",
        *spec_table(root["properties"]["spec"]),
        "\n## What is refused\n",
        *refusals(root),
        "\n## `kubectl get bpfdataplanes`\n",
        *columns(config),
        "\n## Fields of status\n",
        *status_table(root["properties"]["status"]),
        "\n## `kubectl get bpfnodes`\n",
        f"{schema(node)['description']}\n",
        *columns(node),
        "\n## Fields of a BpfNode's status\n",
        *status_table(schema(node)["properties"]["status"]),
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(document())

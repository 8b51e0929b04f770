# SPDX-License-Identifier: Apache-2.0
"""Label selectors (meta/v1 LabelSelector): read once into a canonical form, then matched.

Two selectors that say the same in another order are equal, hash alike and have the same `key`, so
everything built from them can be shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bpfdp_agent.watch.wire import LabelSelector, LabelSelectorRequirement

OPERATORS = ("In", "NotIn", "Exists", "DoesNotExist")


class InvalidSelector(ValueError):
    """A selector that cannot be read; `field` is the path below the selector."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


@dataclass(frozen=True, slots=True, order=True)
class Requirement:
    """One condition on one label. `values` is sorted and empty for Exists and DoesNotExist."""

    label: str
    operator: str
    values: tuple[str, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether the labels meet the condition. An absent label meets NotIn and DoesNotExist."""
        value = labels.get(self.label)
        if self.operator == "In":
            return value is not None and value in self.values
        if self.operator == "NotIn":
            return value is None or value not in self.values
        return (value is not None) == (self.operator == "Exists")


@dataclass(frozen=True, slots=True, order=True)
class Selector:
    """All requirements must be met; without any it matches everything."""

    requirements: tuple[Requirement, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether the labels meet every requirement."""
        return all(r.matches(labels) for r in self.requirements)

    @property
    def key(self) -> str:
        """Canonical text. Label keys and values hold none of its separators."""
        return ",".join(f"{r.label} {r.operator} {'|'.join(r.values)}" for r in self.requirements)


EVERYTHING = Selector()


def read_selector(selector: LabelSelector | None) -> Selector:
    """The canonical form; absent and empty selectors match everything. Raises InvalidSelector."""
    requirements, problems = _requirements(selector)
    if problems:
        raise problems[0]
    return Selector(requirements)


def read_superset(selector: LabelSelector | None) -> Selector:
    """The readable part of a selector: what it selects, this selects too (so it fails closed)."""
    return Selector(_requirements(selector)[0])


def _requirements(
    selector: LabelSelector | None,
) -> tuple[tuple[Requirement, ...], list[InvalidSelector]]:
    if selector is None:
        return (), []
    found = {Requirement(k, "In", (v,)) for k, v in (selector.match_labels or {}).items()}
    problems = []
    for position, expression in enumerate(selector.match_expressions or ()):
        try:
            found.add(_requirement(f"matchExpressions[{position}]", expression))
        except InvalidSelector as error:
            problems.append(error)
    return tuple(sorted(found)), problems


def _requirement(field: str, expression: LabelSelectorRequirement) -> Requirement:
    operator, values = expression.operator, tuple(sorted(set(expression.values or ())))
    if not expression.key:
        raise InvalidSelector(f"{field}.key", "is empty; name a label")
    if operator not in OPERATORS:
        raise InvalidSelector(
            f"{field}.operator", f"{operator!r} is unknown; use one of {', '.join(OPERATORS)}"
        )
    if (operator in ("In", "NotIn")) != bool(values):
        problem = "is needed for In and NotIn" if not values else f"must be absent for {operator}"
        raise InvalidSelector(f"{field}.values", problem)
    return Requirement(expression.key, operator, values)

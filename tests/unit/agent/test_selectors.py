# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from bpfdp_agent.model.selectors import (
    EVERYTHING,
    InvalidSelector,
    read_selector,
    read_superset,
)
from bpfdp_agent.watch.wire import LabelSelector, LabelSelectorRequirement
from hypothesis import given, settings
from policy_reference import selector_matches
from policy_strategies import labels, selectors


def expression(key: str, operator: str, *values: str) -> LabelSelector:
    requirement = LabelSelectorRequirement(key=key, operator=operator, values=values)
    return LabelSelector(match_expressions=(requirement,))


@pytest.mark.parametrize(
    ("selector", "present", "other", "absent"),
    [
        (expression("app", "In", "web", "db"), True, False, False),
        (expression("app", "NotIn", "web"), False, True, True),
        (expression("app", "Exists"), True, True, False),
        (expression("app", "DoesNotExist"), False, False, True),
        (LabelSelector(match_labels={"app": "web"}), True, False, False),
        (LabelSelector(), True, True, True),
    ],
)
def test_operators(selector, present, other, absent):
    compiled = read_selector(selector)
    assert compiled.matches({"app": "web"}) is present
    assert compiled.matches({"app": "cache"}) is other
    assert compiled.matches({"tier": "web"}) is absent


def test_an_empty_label_value_is_a_value():
    assert read_selector(LabelSelector(match_labels={"app": ""})).matches({"app": ""})
    assert not read_selector(LabelSelector(match_labels={"app": ""})).matches({})
    assert not read_selector(expression("app", "DoesNotExist")).matches({"app": ""})


def test_absent_selects_everything():
    assert read_selector(None) == EVERYTHING


def test_order_and_form_do_not_matter():
    one = LabelSelector(match_labels={"a": "x", "b": "y"})
    two = LabelSelector(
        match_labels={"b": "y"},
        match_expressions=(LabelSelectorRequirement(key="a", operator="In", values=("x", "x")),),
    )
    assert read_selector(one) == read_selector(two)
    assert read_selector(one).key == read_selector(two).key == "a In x,b In y"


@pytest.mark.parametrize(
    ("selector", "field", "says"),
    [
        (expression("app", "Equals", "x"), "matchExpressions[0].operator", "use one of In, NotIn"),
        (expression("app", "In"), "matchExpressions[0].values", "is needed"),
        (expression("app", "Exists", "x"), "matchExpressions[0].values", "must be absent"),
        (expression("", "Exists"), "matchExpressions[0].key", "name a label"),
    ],
)
def test_what_cannot_be_read_is_named(selector, field, says):
    with pytest.raises(InvalidSelector, match=says) as caught:
        read_selector(selector)
    assert caught.value.field == field


def test_the_superset_of_an_unreadable_selector_keeps_the_rest():
    bad = LabelSelectorRequirement(key="v", operator="Gt", values=("3",))
    superset = read_superset(LabelSelector(match_labels={"app": "x"}, match_expressions=(bad,)))
    assert superset.matches({"app": "x"})
    assert not superset.matches({"app": "y", "v": "4"})


@settings(deadline=None)
@given(selectors, labels)
def test_agrees_with_the_reference(selector, found):
    assert read_selector(selector).matches(found) == selector_matches(selector, found)


@settings(deadline=None)
@given(selectors, selectors)
def test_equal_keys_mean_equal_selectors(one, two):
    first, second = read_selector(one), read_selector(two)
    assert (first.key == second.key) == (first == second)

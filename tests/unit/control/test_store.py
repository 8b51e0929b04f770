# SPDX-License-Identifier: Apache-2.0
"""The store takes the newest of everything, from watches, lists and answers to our own writes."""

from __future__ import annotations

from bpfdp_operator import world as w
from bpfdp_operator.store import Store


def node(version: int, *, ready: bool = True, name: str = "n", uid: str = "u") -> w.Node:
    state = w.Condition(type="Ready", status=str(ready))
    return w.Node(
        metadata=w.Metadata(name=name, uid=uid, resource_version=str(version)),
        status=w.NodeStatus(conditions=(state,)),
    )


def test_an_older_version_is_not_taken() -> None:
    store = Store()
    store.put(node(7))
    assert not store.put(node(6, ready=False))
    assert store.get(w.Node, "n") == node(7)


def test_one_made_anew_is_taken_whatever_its_version() -> None:
    store = Store()
    store.put(node(7))
    assert store.put(node(3, ready=False, uid="other"))


def test_a_heartbeat_wakes_nobody() -> None:
    store = Store()
    assert store.put(node(1))
    assert not store.put(node(2))
    assert store.put(node(3, ready=False))


def test_a_list_tells_what_is_gone_and_does_not_go_back_in_time() -> None:
    store = Store()
    store.put(node(9, name="a"))
    store.put(node(2, name="gone"))
    store.replace(w.Node, [node(5, name="a", ready=False), node(5, name="b")])
    assert store.all(w.Node) == (node(9, name="a"), node(5, name="b"))


def test_kinds_do_not_mix() -> None:
    store = Store()
    store.put(node(1))
    assert store.get(w.BpfNode, "n") is None
    store.drop(node(1))
    assert store.all(w.Node) == ()

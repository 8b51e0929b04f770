# SPDX-License-Identifier: Apache-2.0
"""The pods of this node: `endpoints`, address → host-side veth and policy programs, and
`pod_namespaces`, network namespace → address.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from bpfdp_agent.layouts import (
    ADDRESS_KEY,
    ENDPOINT,
    NAMESPACE,
    NAMESPACE_KEY,
    POLICY_SLOT_ALLOW,
    POLICY_SLOT_DENY,
)
from bpfdp_agent.model.addresses import family_of
from bpfdp_agent.model.pods import pod_addresses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from bpfdp_agent.model.cluster import ClusterView
    from bpfdp_agent.model.pods import PodLink
    from bpfdp_agent.watch.wire import Pod


class PolicySlots(NamedTuple):
    """Which policy programs judge a pod's two directions (layouts.POLICY_SLOT_*)."""

    ingress: int = POLICY_SLOT_ALLOW
    egress: int = POLICY_SLOT_ALLOW


def endpoint_entries(
    view: ClusterView,
    family: int,
    links: Iterable[PodLink],
    slots_of: Callable[[Pod], PolicySlots],
    actual: Mapping[bytes, bytes],
) -> dict[bytes, bytes]:
    """The whole map (a node has few pods), for `diff.tables.replace`. `actual` is what it holds.

    A pod's veth exists before the API server knows its address. Until then the address gets what
    the pods that still wait for theirs would get, so that no pod starts outside its policies;
    an address that belongs to no pod we know of, with none waiting, gets no entry.

    A pod can give itself any address. It gets those that the API server says are its own; where
    two veths have the same, the one that had it keeps it.
    """
    waiting = slots_while_unknown(view, slots_of)
    had = {key: ENDPOINT.unpack(family, value)["ifindex"] for key, value in actual.items()}
    entries: dict[bytes, bytes] = {}
    given: dict[bytes, int] = {}
    for link in sorted(links, key=lambda each: each.ifindex):
        owner = _owner(view, family, link, had)
        for address in link.addresses:
            if family_of(address) != family:
                continue
            pod = view.pod_at(address)
            slots = slots_of(pod) if pod and pod is owner else None
            if owner is None and (pod is None or pod.metadata.deletion_timestamp):
                slots = waiting  # of nobody, or the API server still has its last holder
            key = ADDRESS_KEY.pack(family, addr=address)
            if slots is None or (key in given and given[key] == had.get(key)):
                continue
            given[key] = link.ifindex
            entries[key] = ENDPOINT.pack(
                family,
                ifindex=link.ifindex,
                ingress_slot=slots.ingress,
                egress_slot=slots.egress,
            )
    return entries


def namespace_entries(
    family: int, links: Iterable[PodLink], endpoints: Mapping[bytes, bytes]
) -> dict[bytes, bytes]:
    """The map `pod_namespaces`: for each pod the first address that `endpoints` says is its own."""
    entries: dict[bytes, bytes] = {}
    for link in links:
        for address in link.addresses:
            if family_of(address) != family or not link.netns_cookie:
                continue
            own = endpoints.get(ADDRESS_KEY.pack(family, addr=address))
            if own is not None and ENDPOINT.unpack(family, own)["ifindex"] == link.ifindex:
                key = NAMESPACE_KEY.pack(family, cookie=link.netns_cookie)
                entries.setdefault(key, NAMESPACE.pack(family, addr=address))
    return entries


def _owner(view: ClusterView, family: int, link: PodLink, had: Mapping[bytes, int]) -> Pod | None:
    """The pod of this node that the veth is of; None while none of its addresses is known.

    Where it has addresses of several pods, the one whose address it had (`had`), else the first.
    """
    found = [
        (ADDRESS_KEY.pack(family, addr=address) if family_of(address) == family else b"", pod)
        for address in link.addresses
        if (pod := view.pod_at(address)) is not None and pod.spec.node_name == view.nodes.own
    ]
    kept = (pod for key, pod in found if had.get(key) == link.ifindex)
    return next(kept, found[0][1] if found else None)


def slots_while_unknown(
    view: ClusterView, slots_of: Callable[[Pod], PolicySlots]
) -> PolicySlots | None:
    """Slots for an address not yet known to be some pod's; None when no pod waits for one.

    Where the waiting pods agree, theirs; where they do not, deny: it could be any of them.
    """
    waiting = [
        slots_of(pod)
        for pod in view.pods_on(view.nodes.own)
        if not pod.spec.host_network and not pod.terminated and not pod_addresses(pod)
    ]
    if not waiting:
        return None
    return PolicySlots(
        _agreed({slots.ingress for slots in waiting}), _agreed({slots.egress for slots in waiting})
    )


def _agreed(slots: set[int]) -> int:
    return next(iter(slots)) if len(slots) == 1 else POLICY_SLOT_DENY


def slots_by_pod(
    view: ClusterView,
    family: int,
    entries: Mapping[bytes, bytes],
    exists: Callable[[int], bool],
) -> dict[str, PolicySlots]:
    """`endpoint_entries` read backwards: the slots of this node's pods by uid.

    An entry whose interface (by ifindex, which is not used again) is gone was another pod's.
    """
    found = {}
    for key, value in entries.items():
        pod = view.pod_at(ADDRESS_KEY.unpack(family, key)["addr"])
        entry = ENDPOINT.unpack(family, value)
        if pod and pod.spec.node_name == view.nodes.own and exists(entry["ifindex"]):
            found[pod.metadata.uid] = PolicySlots(entry["ingress_slot"], entry["egress_slot"])
    return found

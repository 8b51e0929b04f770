# SPDX-License-Identifier: Apache-2.0
"""The pods of this node: the `endpoints` map, address → host-side veth and policy programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from bpfdp_agent.layouts import ADDRESS_KEY, ENDPOINT, POLICY_SLOT_ALLOW, POLICY_SLOT_DENY
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
) -> dict[bytes, bytes]:
    """The whole map (a node has few pods), for `diff.tables.replace`.

    A pod's veth exists before the API server knows its address. Until then the address gets what
    the pods that still wait for theirs would get, so that no pod starts outside its policies;
    an address that belongs to no pod we know of, with none waiting, gets no entry.
    """
    waiting = slots_while_unknown(view, slots_of)
    entries = {}
    for link in links:
        for address in link.addresses:
            if family_of(address) != family:
                continue
            pod = view.pod_at(address)
            if pod is not None and pod.spec.node_name != view.nodes.own:
                pod = None  # the API server still has the address's last holder
            slots = slots_of(pod) if pod else waiting
            if slots is not None:
                entries[ADDRESS_KEY.pack(family, addr=address)] = ENDPOINT.pack(
                    family,
                    ifindex=link.ifindex,
                    ingress_slot=slots.ingress,
                    egress_slot=slots.egress,
                )
    return entries


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

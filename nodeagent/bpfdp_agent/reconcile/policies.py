# SPDX-License-Identifier: Apache-2.0
"""NetworkPolicies: which program judges each pod of this node, and what programs know of peers.

A pod keeps what it has in a direction until a new program is loaded and filled. Where one cannot
be, it keeps the last good program, or is denied everything: what a policy isolates does not stay
open. A new pod is denied from the start until its program is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

import msgspec

from bpfdp_agent.bpf.errors import BpfError
from bpfdp_agent.dataplane.policies import PolicyNotLoaded, PolicyPrograms, Wanted
from bpfdp_agent.desired.endpoints import PolicySlots, slots_by_pod
from bpfdp_agent.desired.policy import PolicyRefused, PolicyRules, normal_rules, read_policy
from bpfdp_agent.desired.policyprogram import Membership, Program, program_of
from bpfdp_agent.layouts import FAMILIES, POLICY_SLOT_ALLOW, POLICY_SLOT_DENY
from bpfdp_agent.model.pods import named_ports
from bpfdp_agent.model.policies import Direction, PolicyIndex
from bpfdp_agent.reconcile.hooks import exists
from bpfdp_agent.reconcile.surroundings import reason_of
from bpfdp_agent.serve.events import ref_of
from bpfdp_agent.watch.wire import Kind, ObjectKey, Pod

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from bpfdp_agent.desired import identities
    from bpfdp_agent.desired.policyprogram import Deltas
    from bpfdp_agent.model.cluster import Changes
    from bpfdp_agent.reconcile.kernel import Kernel
    from bpfdp_agent.reconcile.surroundings import Surroundings

log = logging.getLogger(__name__)

NEEDS = (Kind.POD, Kind.NAMESPACE, Kind.NODE, Kind.NETWORK_POLICY)
FREE_EVERY = 5.0


class Judge(msgspec.Struct):
    """Who judges one direction of one pod: a slot that is known, or a program to be loaded."""

    slot: int
    program: Program | None = None
    refused: PolicyRefused | None = None


class PolicySync:
    """Keeps the policy slots. `started` after the first round.

    PodSync tells it of identities (`identities_known` once all are), which fill programs, and of
    the slots that endpoints have (`in_use`).
    """

    def __init__(self, around: Surroundings, kernel: Kernel, changed: Callable[[], None]) -> None:
        self._around = around
        self._changed = changed
        self._maps = kernel.maps
        self._programs = PolicyPrograms(kernel.compiler, kernel.renderer, kernel.maps, kernel.pins)
        self._index = PolicyIndex()
        self._membership = Membership()
        self._peers = asyncio.Lock()
        self._rules: dict[ObjectKey, PolicyRules] = {}
        self._judges: dict[ObjectKey, dict[Direction, Judge]] = {}
        self._slots: dict[str, PolicySlots] = {}
        self._loaded: dict[str, int] = {}
        self._dirty: set[ObjectKey] = set()
        self._dirty_namespaces: set[str] = set()
        self._changes: list[Changes] = []
        self._troubled: dict[ObjectKey, str] = {}
        self._opened = False
        self.identities_known = False
        self.started = False
        self.failing: PolicyNotLoaded | None = None
        self.in_use: frozenset[int] = frozenset()

    def changed(self, changes: Changes) -> None:
        """Take what the next round shall look at."""
        self._changes.append(changes)

    # -- identities, for PodSync ----------------------------------------------------------

    @property
    def behind(self) -> bool:
        """Whether a program missed a change of its peers and no round is due that makes it good.

        (After a round that failed one is due, with growing pauses.)
        """
        return self.failing is None and bool(self._programs.stale)

    async def add_identities(self, new: Mapping[int, identities.Identity]) -> int:
        """Tell the programs of identities, before any address maps to them."""
        async with self._peers:
            return await self._write(self._membership.set_identity(n, i) for n, i in new.items())

    async def drop_identities(self, gone: Iterable[int]) -> int:
        """Let the programs forget identities, after no address maps to them any more."""
        async with self._peers:
            return await self._write(self._membership.delete_identity(n) for n in gone)

    async def _write(self, changes: Iterable[Deltas]) -> int:
        """Write all; the first that failed is raised then. Its program is filled anew by a round.

        Not sooner, as `changes` tell Membership, which must have all before anything is raised.
        """
        failure: PolicyNotLoaded | None = None
        operations = 0
        for deltas in changes:
            try:
                operations += await self._programs.write(deltas) if deltas else 0
            except PolicyNotLoaded as error:
                failure = failure or error
        if failure is not None:
            self._tell(failure)
            raise failure
        return operations

    # -- slots, for PodSync ---------------------------------------------------------------

    def slots_of(self, pod: Pod) -> PolicySlots:
        """The slots of a pod of this node; a pod not met before is judged here and now."""
        if pod.key not in self._judges or pod.metadata.uid not in self._slots:
            self._take_changes()  # a policy that came with it counts
            self._meet(pod)
        return self._slots[pod.metadata.uid]

    def _meet(self, pod: Pod) -> None:
        self._index.set_pod(pod.key, pod.metadata.labels)
        self._judges[pod.key] = {d: self._judge(pod, d) for d in Direction}
        self._settle(pod, loading=True)

    def _judge(self, pod: Pod, direction: Direction) -> Judge:
        selecting = self._index.selecting(pod.key, direction)
        if not selecting:
            return Judge(POLICY_SLOT_ALLOW)
        try:
            rules = normal_rules((self._rules[k] for k in selecting), direction, named_ports(pod))
            if rules.allows_all:
                return Judge(POLICY_SLOT_ALLOW)
            if rules.denies_all:
                return Judge(POLICY_SLOT_DENY)
            return Judge(POLICY_SLOT_DENY, program_of(rules))
        except PolicyRefused as error:
            return Judge(POLICY_SLOT_DENY, refused=error)

    def _settle(self, pod: Pod, *, loading: bool = False) -> None:
        """The pod's slots from its judges; `loading` says that its programs are still to come."""
        last = self._slots.get(pod.metadata.uid, PolicySlots(POLICY_SLOT_DENY, POLICY_SLOT_DENY))
        judges = self._judges.get(pod.key)
        if judges is None:  # gone while its programs were loaded
            return
        self._slots[pod.metadata.uid] = PolicySlots(
            self._slot(judges[Direction.INGRESS], last.ingress, loading=loading),
            self._slot(judges[Direction.EGRESS], last.egress, loading=loading),
        )

    def _slot(self, judge: Judge, last: int, *, loading: bool) -> int:
        """The slot that is known or loaded; else the last one, open only as long as we load."""
        if judge.program is None and judge.refused is None:
            return judge.slot
        loaded = self._loaded.get(judge.program.spec.key) if judge.program else None
        if loaded is None and last == POLICY_SLOT_ALLOW and not (loading and judge.program):
            return POLICY_SLOT_DENY
        return last if loaded is None else loaded

    # -- the round ------------------------------------------------------------------------

    async def reconcile(self) -> int:
        """Judge what changed, load what is needed; PodSync then writes the endpoints."""
        if not self.identities_known or not self._around.view.synced(*NEEDS):
            return 0
        await self._open()
        self._take_changes()
        operations = 0
        with contextlib.suppress(PolicyNotLoaded):  # told of, and filled anew below
            operations = await self._write_namespaces()
        dirty, self._dirty = self._dirty, set()
        pods = [p for key in dirty if (p := self._own_pod(key)) is not None]
        for pod in pods:
            self._meet(pod)
        try:
            await self._load(pods)
        except BaseException:
            self._dirty |= dirty
            raise
        finally:
            for pod in pods:
                self._settle(pod)
        self._follow_trouble()
        self._publish()
        self.started = True
        self._changed()
        if self.failing is not None:
            raise self.failing
        return operations

    async def _open(self) -> None:
        """Adopt what an earlier agent left. Without the deny program empty slots still deny."""
        if self._opened:
            return
        self._opened = True
        try:
            await self._programs.open()
        except BpfError as error:
            log.error("policies: %s", error)
        self._slots = self._slots_left()

    def _slots_left(self) -> dict[str, PolicySlots]:
        """What judged each pod under an earlier agent, where that program was adopted."""
        view, held = self._around.view, self._programs.slots
        left: dict[str, PolicySlots] = {}
        for family in FAMILIES:
            left |= slots_by_pod(view, family, self._maps.read("endpoints", family), exists)
        return {
            uid: PolicySlots(*(slot if slot in held else POLICY_SLOT_DENY for slot in slots))
            for uid, slots in left.items()
        }

    def _take_changes(self) -> None:
        """Policies into the index; which pods and namespaces to look at goes to the dirty sets."""
        view = self._around.view
        taken, self._changes = self._changes, []
        if self.started:
            names = {n for c in taken for n in c.namespaces}
            policies = {p for c in taken for p in c.policies}
            for key in {p for c in taken for p in c.pods}:
                self._look_again(key)
        else:
            names, policies = set(view.namespaces), set(view.policies)
            self._dirty.update(p.key for p in view.pods_on(view.nodes.own))
        self._dirty_namespaces |= names
        for key in policies:
            self._set_policy(key)

    async def _write_namespaces(self) -> int:
        """Tell the programs of namespaces' labels."""
        names, self._dirty_namespaces = self._dirty_namespaces, set()
        found = {name: self._around.view.namespaces.get(name) for name in names}
        async with self._peers:
            return await self._write(
                self._membership.set_namespace(name, each.metadata.labels if each else None)
                for name, each in found.items()
            )

    def _look_again(self, key: ObjectKey) -> None:
        if self._own_pod(key) is not None:
            self._dirty.add(key)
        elif key in self._judges:
            self._index.delete_pod(key)
            del self._judges[key]

    def _set_policy(self, key: ObjectKey) -> None:
        policy = self._around.view.policies.get(key)
        if policy is None:
            self._rules.pop(key, None)
            self._dirty |= self._index.delete_policy(key)
        else:
            self._rules[key] = read_policy(policy)
            self._dirty |= self._index.set_policy(policy)

    def _own_pod(self, key: ObjectKey) -> Pod | None:
        view = self._around.view
        pod = view.pods.get(key)
        if pod is None or pod.spec.node_name != view.nodes.own:
            return None
        return None if pod.spec.host_network or pod.terminated else pod

    async def _load(self, pods: Iterable[Pod]) -> None:
        """Load the programs of these pods, and fill anew those that missed a change of peers.

        Those that fail are tried again next round.
        """
        needed = {p.spec.key: p for p in self._membership.programs(self._programs.stale)}
        for pod in pods:
            for judge in self._judges[pod.key].values():
                if judge.program:
                    needed[judge.program.spec.key] = judge.program
        for program in needed.values():
            self._membership.add_program(program)
        results = await self._programs.ensure_all(
            Wanted(p.spec, lambda p=p: self._membership.values(p))  # type: ignore[misc]
            for p in needed.values()
        )
        self.failing = None
        for key, result in results.items():
            if isinstance(result, PolicyNotLoaded):
                self.failing = result
                self._tell(result)
            else:
                self._loaded[key] = result
        for pod in pods:
            if any(self._is_missing(j) for j in self._judges.get(pod.key, {}).values()):
                self._dirty.add(pod.key)

    def _is_missing(self, judge: Judge) -> bool:
        return judge.program is not None and judge.program.spec.key not in self._loaded

    # -- freeing --------------------------------------------------------------------------

    async def free_unused(self) -> None:
        """Free programs that no endpoint has had for a while, until cancelled."""
        while True:
            await asyncio.sleep(FREE_EVERY)
            if not self.started:
                continue
            uids = {p.metadata.uid for p in self._around.view.pods_on(self._around.view.nodes.own)}
            self._slots = {uid: slots for uid, slots in self._slots.items() if uid in uids}
            wanted = {slot for slots in self._slots.values() for slot in slots}
            for key in self._programs.forget(self.in_use | wanted):
                self._loaded.pop(key, None)
                self._membership.delete_program(key)
            await self._programs.free()

    # -- telling --------------------------------------------------------------------------

    def _follow_trouble(self) -> None:
        """Name the policies that cannot be enforced as written, once, and when they are well."""
        now = {k: "; ".join(map(str, r.problems)) for k, r in self._rules.items() if r.problems}
        for judges in self._judges.values():
            for judge in judges.values():
                for problem in judge.refused.problems if judge.refused else ():
                    now.setdefault(problem.policy, str(problem))
        for key in self._troubled.keys() - now.keys():
            self._around.valid(ref_of(Kind.NETWORK_POLICY, key))
        for key, text in now.items():
            if self._troubled.get(key) != text:
                self._around.invalid(
                    ref_of(Kind.NETWORK_POLICY, key),
                    f"{text}. Until it is corrected, the pods it selects keep their last policy"
                    " or are denied.",
                )
        self._troubled = now

    def _tell(self, error: PolicyNotLoaded) -> None:
        """An Event on each policy whose program is not as it should be."""
        for policy in error.policies:
            ref = ref_of(Kind.NETWORK_POLICY, ObjectKey(*policy.split("/", 1)))
            self._around.events.warning(ref, reason_of(error), str(error))

    def _publish(self) -> None:
        selecting = {
            policy
            for pod in self._judges
            for direction in Direction
            for policy in self._index.selecting(pod, direction)
        }
        self._around.status.update(policies=len(selecting))
        if self.failing is not None:
            reason = reason_of(self.failing.cause)
            self._around.status.condition("PoliciesSynced", False, reason, str(self.failing))

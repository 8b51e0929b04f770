# SPDX-License-Identifier: Apache-2.0
"""Policy programs in the kernel: judged by PROG_TEST_RUN, kept, shared, adopted and freed.

Never more than a few programs at once, freed before the next (see dataplane/programs.py).
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bpfdp_agent.bpf import syscall
from bpfdp_agent.bpf.cache import ObjectCache
from bpfdp_agent.bpf.compiler import Compiler
from bpfdp_agent.bpf.errors import (
    CompileFailed,
    MapFull,
    ProgramRejected,
    SyscallFailed,
    TemplateInvalid,
)
from bpfdp_agent.bpf.render import Renderer
from bpfdp_agent.dataplane import policies, policyversion
from bpfdp_agent.dataplane.maps import MapStore
from bpfdp_agent.dataplane.pins import Pins, listing
from bpfdp_agent.dataplane.policies import PolicyNotLoaded, PolicyPrograms, Wanted
from bpfdp_agent.desired.identities import Identity
from bpfdp_agent.desired.policy import normal_rules, read_policy
from bpfdp_agent.desired.policyprogram import Membership, Program, program_of
from bpfdp_agent.layouts import (
    ADDRESS_KEY,
    FLOW,
    IDENTITY,
    MAPS,
    POLICY_SLOT_DENY,
    Jump,
)
from bpfdp_agent.model.pods import NamedPort
from bpfdp_agent.model.policies import Direction
from bpfdp_agent.watch.wire import (
    IPBlock,
    LabelSelector,
    NetworkPolicy,
    NetworkPolicyEgressRule,
    NetworkPolicyIngressRule,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    NetworkPolicySpec,
    ObjectMeta,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from policy_reference import Connection, RefPod, allowed, isolates
from policy_strategies import NUMBERS, World, connections, worlds

ALLOWED, DENIED = 7, 2  # what the test's stand-in for the end of the chain returns; TC_ACT_SHOT
FINISH = struct.pack("<BBhiBBhi", 0xB7, 0, 0, ALLOWED, 0x95, 0, 0, 0)  # r0 = 7; exit
FRAME = bytes(64)
SMALL = {m.name: 64 for m in MAPS if m.name not in ("jumps", "scratch", "settings", "counters")}
FAMILIES = (4, 6)


@pytest.fixture(autouse=True)
def _needs_root() -> None:
    if os.geteuid() != 0:
        reason = "loading BPF programs needs root: run `sudo make bpf`"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)


class Bench:
    """A bpffs of its own with every map and an end of the chain; `programs()` is one agent."""

    def __init__(self, bpffs: Path, cache: Path) -> None:
        self.pins = Pins(bpffs)
        self.maps = MapStore(self.pins, sizes=SMALL)
        self.maps.open()
        self.compiler = Compiler(ObjectCache(cache))
        self.now = 0.0
        for family in FAMILIES:
            finish = syscall.prog_load(syscall.ProgramType.SCHED_CLS, FINISH, name="finish")
            jumps = self.maps["jumps", family].descriptor
            syscall.map_update(jumps, struct.pack("=I", Jump.FINISH), struct.pack("=I", finish))
            os.close(finish)

    async def programs(self, renderer: Renderer | None = None) -> PolicyPrograms:
        found = PolicyPrograms(
            self.compiler, renderer or Renderer(), self.maps, self.pins, clock=lambda: self.now
        )
        await found.open()
        return found

    def folder(self, slot: int) -> Path:
        (found,) = [f for f in listing(self.pins.policy) if f.name.startswith(f"{slot}_")]
        return found

    def slots(self, family: int) -> dict[int, int]:
        """Program ids by slot."""
        found = {}
        for slot in range(12):
            value = syscall.map_lookup(
                self.maps["policy", family].descriptor, struct.pack("=I", slot), 4
            )
            if value is not None:
                (found[slot],) = struct.unpack("=I", value)
        return found

    def identify(self, address: str, number: int) -> None:
        packed = ipaddress.ip_address(address).packed
        family = 4 if len(packed) == 4 else 6
        key, value = ADDRESS_KEY.pack(family, addr=packed), IDENTITY.pack(family, id=number)
        self.maps.write("identities", family, {key: value})

    def judge(self, slot: int, direction: str, address: str, protocol: int, port: int) -> int:
        """Run what is in a slot on a flow; returns ALLOWED or DENIED."""
        peer = ipaddress.ip_address(address)
        ends = {"src" if direction == "ingress" else "new_dst": peer.packed}
        flow = FLOW.pack(peer.version, proto=protocol, new_dport=port, **ends)
        padded = flow.ljust(-(-len(flow) // 8) * 8, b"\0") * syscall.possible_cpus()
        scratch = self.maps["scratch", peer.version].descriptor
        syscall.map_update(scratch, bytes(4), padded)
        program = syscall.prog_open(self.slots(peer.version)[slot])
        try:
            return syscall.prog_test_run(program, FRAME).retval
        finally:
            os.close(program)

    def close(self) -> None:
        for family in FAMILIES:
            for slot in self.slots(family):
                syscall.map_delete(self.maps["policy", family].descriptor, struct.pack("=I", slot))
            syscall.map_delete(
                self.maps["jumps", family].descriptor, struct.pack("=I", Jump.FINISH)
            )
        for folder in listing(self.pins.policy):
            policyversion.remove(folder)
            time.sleep(0.05)
        self.maps.close()


@pytest.fixture(scope="session")
def object_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("objects")


@pytest.fixture
def bench(tmp_path: Path, object_cache: Path, monkeypatch) -> Iterator[Bench]:
    monkeypatch.setattr(policies, "FREE_PAUSE", 0.02)
    bpffs = tmp_path / "bpffs"
    bpffs.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", str(bpffs)], check=True)
    found = Bench(bpffs, object_cache)
    try:
        yield found
    finally:
        found.close()
        subprocess.run(["umount", str(bpffs)], check=True)
        time.sleep(0.1)


# -- shorthand --------------------------------------------------------------------------------


def pods(**labels: str) -> NetworkPolicyPeer:
    return NetworkPolicyPeer(pod_selector=LabelSelector(match_labels=labels))


def block(cidr: str, *excepts: str) -> NetworkPolicyPeer:
    return NetworkPolicyPeer(ip_block=IPBlock(cidr=cidr, except_=excepts))


def port(number: int | str | None = None, end: int | None = None, protocol: str = "TCP"):
    return NetworkPolicyPort(protocol=protocol, port=number, end_port=end)


def ingress(*peers: NetworkPolicyPeer, ports: tuple = (), name: str = "p") -> Program:
    rule = NetworkPolicyIngressRule(from_=peers, ports=ports)
    policy = NetworkPolicy(
        metadata=ObjectMeta(name=name, namespace="shop"), spec=NetworkPolicySpec(ingress=(rule,))
    )
    return program_of(normal_rules([read_policy(policy)], Direction.INGRESS, []))


def egress(*peers: NetworkPolicyPeer, ports: tuple = ()) -> Program:
    rule = NetworkPolicyEgressRule(to=peers, ports=ports)
    policy = NetworkPolicy(
        metadata=ObjectMeta(name="out", namespace="shop"), spec=NetworkPolicySpec(egress=(rule,))
    )
    return program_of(normal_rules([read_policy(policy)], Direction.EGRESS, []))


def web(*ports: NamedPort) -> Identity:
    return Identity("shop", (("app", "web"),), ports)


def wanted(program: Program, membership: Membership) -> Wanted:
    membership.add_program(program)
    return Wanted(program.spec, lambda: membership.values(program))


async def load(found: PolicyPrograms, program: Program, membership: Membership) -> int:
    each = wanted(program, membership)
    return await found.ensure(each.spec, each.values)


# -- verdicts ---------------------------------------------------------------------------------


async def test_deny_slot_denies_both_families(bench):
    await bench.programs()
    assert bench.judge(POLICY_SLOT_DENY, "ingress", "10.0.0.1", 6, 80) == DENIED
    assert bench.judge(POLICY_SLOT_DENY, "egress", "fd00::1", 17, 53) == DENIED


async def test_selected_pods_and_blocks_on_ports(bench):
    membership = Membership()
    membership.set_identity(5, web())
    bench.identify("10.0.0.1", 5)
    bench.identify("fd00::1", 5)
    program = ingress(
        pods(app="web"),
        block("192.0.2.0/24", "192.0.2.128/25"),
        block("2001:db8::/32"),
        ports=(port(80, 90), port(53, protocol="UDP")),
    )
    slot = await load(await bench.programs(), program, membership)
    for address, verdict in (
        ("10.0.0.1", ALLOWED),
        ("10.0.0.2", DENIED),
        ("192.0.2.1", ALLOWED),
        ("192.0.2.129", DENIED),
        ("fd00::1", ALLOWED),
        ("fd00::2", DENIED),
        ("2001:db8:1::1", ALLOWED),
    ):
        assert bench.judge(slot, "ingress", address, 6, 80) == verdict, address
        assert bench.judge(slot, "ingress", address, 6, 90) == verdict, address
        assert bench.judge(slot, "ingress", address, 17, 53) == verdict, address
        for protocol, number in ((6, 79), (6, 91), (6, 53), (17, 80), (132, 80), (1, 0)):
            assert bench.judge(slot, "ingress", address, protocol, number) == DENIED


async def test_portless_rules_admit_every_protocol(bench):
    slot = await load(await bench.programs(), ingress(block("10.0.0.0/8")), Membership())
    for protocol in (6, 17, 132, 1, 47):
        assert bench.judge(slot, "ingress", "10.0.0.1", protocol, 0) == ALLOWED
        assert bench.judge(slot, "ingress", "11.0.0.1", protocol, 0) == DENIED


async def test_egress_names_follow_each_pods_own_port(bench):
    membership = Membership()
    membership.set_identity(5, web(NamedPort("http", 6, 8080)))
    membership.set_identity(6, web(NamedPort("http", 6, 9090), NamedPort("http", 17, 53)))
    bench.identify("10.0.0.5", 5)
    bench.identify("10.0.0.6", 6)
    slot = await load(await bench.programs(), egress(ports=(port("http"),)), membership)
    assert bench.judge(slot, "egress", "10.0.0.5", 6, 8080) == ALLOWED
    assert bench.judge(slot, "egress", "10.0.0.6", 6, 9090) == ALLOWED
    assert bench.judge(slot, "egress", "10.0.0.5", 6, 9090) == DENIED
    assert bench.judge(slot, "egress", "10.0.0.6", 17, 53) == DENIED
    assert bench.judge(slot, "egress", "10.0.0.7", 6, 0) == DENIED


async def test_the_other_pods_program_comes_next(bench):
    """Egress allows, then the chain goes on to the ingress program in flow.next_slot."""
    found = await bench.programs()
    out = await load(found, egress(block("10.0.0.0/8")), Membership())
    into = await load(found, ingress(block("10.1.0.0/16")), Membership())
    for source, verdict in (("10.1.0.1", ALLOWED), ("10.2.0.1", DENIED)):
        flow = FLOW.pack(
            4,
            src=ipaddress.ip_address(source).packed,
            new_dst=ipaddress.ip_address("10.9.9.9").packed,
            proto=6,
            new_dport=80,
            next_slot=into,
        )
        padded = flow.ljust(-(-len(flow) // 8) * 8, b"\0") * syscall.possible_cpus()
        syscall.map_update(bench.maps["scratch", 4].descriptor, bytes(4), padded)
        program = syscall.prog_open(bench.slots(4)[out])
        assert syscall.prog_test_run(program, FRAME).retval == verdict
        os.close(program)


async def test_the_largest_programs_load(bench):
    """At both limits: 1,024 peers, and 2,000 tests."""
    peers = [block(f"10.{i // 250}.{i % 250}.0/24") for i in range(1024)]
    tests = tuple(port(1 + 2 * i) for i in range(2000))
    found = await bench.programs()
    wide = await load(found, ingress(*peers), Membership())
    assert bench.judge(wide, "ingress", "10.4.23.9", 6, 1) == ALLOWED
    assert bench.judge(wide, "ingress", "10.4.24.9", 6, 1) == DENIED
    long = await load(found, ingress(block("10.0.0.0/8"), ports=tests), Membership())
    assert bench.judge(long, "ingress", "10.0.0.1", 6, 3999) == ALLOWED
    assert bench.judge(long, "ingress", "10.0.0.1", 6, 4000) == DENIED


@settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_compiled_programs_agree_with_the_reference(bench, data):
    asyncio.run(
        compare(bench, data.draw(worlds(4, narrow=True)), data.draw(worlds(6, narrow=True)))
    )


async def compare(bench: Bench, *two: World) -> None:
    """Every connection of a pod in both directions: the kernel's verdict against the reference."""
    found = await bench.programs()
    for world in two:
        membership = Membership()
        for name, labels in world.namespaces.items():
            membership.set_namespace(name, labels)
        for number, pod in enumerate(world.pods, 1):
            ports = tuple(NamedPort(n, NUMBERS[p], to) for (n, p), to in pod.ports.items())
            membership.set_identity(
                number, Identity(pod.namespace, tuple(sorted(pod.labels.items())), ports)
            )
            bench.identify(pod.address, number)
        pod = world.pods[0]
        for direction in Direction:
            selecting = [p for p in world.policies if isolates(p, pod, direction)]
            if selecting:
                own = tuple(NamedPort(n, NUMBERS[p], to) for (n, p), to in pod.ports.items())
                rules = normal_rules([read_policy(p) for p in selecting], direction, own)
                slot = await load(found, program_of(rules), membership)
                check(bench, world, pod, direction, slot)
        for family in FAMILIES:
            addresses = bench.maps.read("identities", family)
            bench.maps.write("identities", family, {}, addresses)
    found.forget(())
    bench.now += policies.GRACE
    found.forget(())
    await found.free()


def check(bench: Bench, world: World, pod: RefPod, direction: Direction, slot: int) -> None:
    def differs(c: Connection) -> bool:
        verdict = bench.judge(slot, direction, c.peer_address, c.protocol, c.port) == ALLOWED
        return verdict != allowed(world.policies, world.namespaces, pod, direction, c)

    assert [c for c in connections(world, pod, direction) if differs(c)] == []


# -- versions ---------------------------------------------------------------------------------


async def test_equal_rules_share_a_slot_and_compile_once(bench, monkeypatch):
    found = await bench.programs()
    one, two = ingress(block("10.0.0.0/8")), ingress(block("10.0.0.0/8"), name="other")
    other = ingress(block("10.0.0.0/9"))
    results = await found.ensure_all([wanted(p, Membership()) for p in (one, two, other)])
    assert set(results.values()) == {2, 3}
    monkeypatch.setattr(bench.compiler, "compile_each", None)  # nothing compiles any more
    assert await load(found, two, Membership()) == results[one.spec.key]
    assert found.policies_in(results[other.spec.key]) == ("shop/p",)


async def test_a_membership_change_writes_maps_and_loads_nothing(bench):
    found, membership = await bench.programs(), Membership()
    membership.set_identity(5, Identity("shop", (("app", "db"),), ()))
    bench.identify("10.0.0.1", 5)
    slot = await load(found, ingress(pods(app="web")), membership)
    before = bench.slots(4), bench.slots(6)
    assert bench.judge(slot, "ingress", "10.0.0.1", 6, 80) == DENIED
    assert await found.write(membership.set_identity(6, web())) == 1
    bench.identify("10.0.0.1", 6)
    assert bench.judge(slot, "ingress", "10.0.0.1", 6, 80) == ALLOWED
    assert await found.write(membership.delete_identity(6)) == 1
    assert bench.judge(slot, "ingress", "10.0.0.1", 6, 80) == DENIED
    assert (bench.slots(4), bench.slots(6)) == before


async def test_changes_of_programs_not_loaded_are_passed_over(bench):
    found, membership = await bench.programs(), Membership()
    membership.add_program(ingress(pods(app="web")))
    assert await found.write(membership.set_identity(5, web())) == 0


async def test_a_full_identity_map_is_replaced_by_a_larger_one(bench, monkeypatch):
    monkeypatch.setattr(policyversion, "SMALLEST_PEER_MAP", 4)
    found, membership = await bench.programs(), Membership()
    program = ingress(pods(app="web"))
    slot = await load(found, program, membership)
    before = bench.slots(4)[slot]
    for number in range(1, 20):
        assert await found.write(membership.set_identity(number, web(NamedPort("x", 6, number))))
    assert policyversion.read_peers(program.spec, bench.folder(slot)) == membership.values(program)
    assert "_0_v" not in bench.folder(slot).name
    assert bench.slots(4)[slot] != before
    bench.identify("10.0.0.1", 19)
    assert bench.judge(slot, "ingress", "10.0.0.1", 6, 80) == ALLOWED
    assert await load(await bench.programs(), program, membership) == slot


async def test_a_program_that_missed_a_change_of_its_peers_is_filled_anew(bench, monkeypatch):
    def refuse(*_: object) -> None:
        raise SyscallFailed("BPF_MAP_UPDATE_BATCH", errno.ENOMEM)

    found, membership = await bench.programs(), Membership()
    program = ingress(pods(app="web"))
    slot = await load(found, program, membership)
    bench.identify("10.0.0.1", 5)
    with monkeypatch.context() as broken, pytest.raises(PolicyNotLoaded):
        broken.setattr(policyversion, "write_peers", refuse)
        await found.write(membership.set_identity(5, web()))
    assert found.stale == [program.spec.key]
    assert bench.judge(slot, "ingress", "10.0.0.1", 6, 80) == DENIED
    assert await load(found, program, membership) == slot
    assert found.stale == []
    assert bench.judge(slot, "ingress", "10.0.0.1", 6, 80) == ALLOWED


async def test_unused_versions_are_freed_after_a_grace_and_slots_used_again(bench):
    found = await bench.programs()
    one = await load(found, ingress(block("10.0.0.0/8")), Membership())
    two_program = ingress(block("10.0.0.0/9"))
    two = await load(found, two_program, Membership())
    assert found.forget({one}) == []
    bench.now += policies.GRACE - 1
    assert found.forget({one}) == []
    bench.now += 1
    assert found.forget({one}) == [two_program.spec.key]
    await found.free()
    assert set(bench.slots(4)) == set(bench.slots(6)) == {POLICY_SLOT_DENY, one}
    assert len(listing(bench.pins.policy)) == 2
    assert await load(found, ingress(block("10.0.0.0/10")), Membership()) == two


async def test_asking_for_a_version_again_keeps_it(bench):
    found, program = await bench.programs(), ingress(block("10.0.0.0/8"))
    slot = await load(found, program, Membership())
    found.forget(())
    bench.now += policies.GRACE
    assert await load(found, program, Membership()) == slot
    assert found.forget(()) == []


async def test_a_version_loaded_anew_while_it_is_freed_is_still_asked_for(bench):
    found, program = await bench.programs(), ingress(block("10.0.0.0/8"))
    await load(found, program, Membership())
    found.forget(())
    bench.now += policies.GRACE
    assert found.forget(()) == [program.spec.key]
    freeing = asyncio.create_task(found.free())
    await asyncio.sleep(0)
    slot = await load(found, program, Membership())
    await freeing
    assert set(bench.slots(4)) == {POLICY_SLOT_DENY, slot}
    assert bench.judge(slot, "ingress", "10.0.0.1", 6, 80) == ALLOWED


# -- restart ----------------------------------------------------------------------------------


async def test_a_restarted_agent_adopts_what_is_there(bench, monkeypatch):
    membership = Membership()
    membership.set_identity(5, web())
    bench.identify("10.0.0.1", 5)
    program = ingress(pods(app="web"))
    first = await bench.programs()
    await load(first, ingress(block("10.0.0.0/8")), Membership())
    slot = await load(first, program, membership)
    before = bench.slots(4), bench.slots(6)

    monkeypatch.setattr(bench.compiler, "compile_each", None)  # nothing compiles any more
    second = await bench.programs()
    assert (bench.slots(4), bench.slots(6)) == before
    fresh = Membership()
    fresh.set_identity(5, web())
    fresh.set_identity(7, web(NamedPort("x", 6, 1)))
    assert await load(second, program, fresh) == slot
    assert (bench.slots(4), bench.slots(6)) == before
    assert policyversion.read_peers(program.spec, bench.folder(slot)).keys() == {5, 7}
    second.forget({slot})
    bench.now += policies.GRACE
    second.forget({slot})
    await second.free()
    assert set(bench.slots(4)) == {POLICY_SLOT_DENY, slot}


async def test_what_a_crash_left_unfinished_is_removed(bench):
    found = await bench.programs()
    slot = await load(found, ingress(block("10.0.0.0/8")), Membership())
    for name in ("building", f"9_{'0' * 16}_0_v1", f"8_{'0' * 16}_0_v0", "junk"):
        (bench.pins.policy / name).mkdir()
    await bench.programs()
    assert len(listing(bench.pins.policy)) == 2
    assert set(bench.slots(4)) == {POLICY_SLOT_DENY, slot}


# -- failures ---------------------------------------------------------------------------------


class Broken(Renderer):
    """Templates with a fault, as an agent of another version might bring them."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def render(self, template: str, **variables: object) -> str:
        if self.fault == "template":
            raise TemplateInvalid("template policy.c.j2: 'bits' is undefined")
        text = super().render(template, **variables)
        if not variables["spec"].policies:
            return text
        assert "if (peer) {" in text
        return text.replace("if (peer) {", {"verifier": "{", "compile": "if (oops) {"}[self.fault])


@pytest.mark.parametrize(
    ("fault", "cause"),
    [("compile", CompileFailed), ("verifier", ProgramRejected)],
)
async def test_a_program_that_fails_is_named_and_harms_nothing(bench, fault, cause):
    found = await bench.programs()
    good = await load(found, ingress(block("10.0.0.0/8")), Membership())
    broken = await bench.programs(Broken(fault))
    bad = ingress(pods(app="web"), block("10.0.0.0/16"), name="bad")
    with pytest.raises(PolicyNotLoaded, match=r"^policy shop/bad \(ingress\): ") as caught:
        await load(broken, bad, Membership())
    assert isinstance(caught.value.cause, cause)
    assert caught.value.policies == ("shop/bad",)
    assert set(bench.slots(4)) == {POLICY_SLOT_DENY, good}
    assert bench.judge(good, "ingress", "10.0.0.1", 6, 80) == ALLOWED
    assert len(listing(bench.pins.policy)) == 2


async def test_a_broken_template_is_named(bench):
    found = await bench.programs()
    found._renderer = Broken("template")
    with pytest.raises(PolicyNotLoaded, match=r"policy shop/p \(ingress\): template policy.c.j2"):
        await load(found, ingress(pods(app="web")), Membership())


async def test_no_slot_left_is_said_by_name(bench, monkeypatch):
    found = await bench.programs()
    monkeypatch.setattr(policies, "POLICY_SLOT_FIRST", 64)
    with pytest.raises(PolicyNotLoaded, match="shop/p") as caught:
        await load(found, ingress(pods(app="web")), Membership())
    assert isinstance(caught.value.cause, MapFull)

# SPDX-License-Identifier: Apache-2.0
"""A pure model of a cluster: DaemonSet controller, kubelets, agents and kube-proxy, step by step.

It carries out the operator's actions as apply.py does, and checks after every step that each node
has somebody who does its services.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
from bpfdp_operator import plan as p
from bpfdp_operator import world as w
from bpfdp_operator.conditions import status_of

DEPLOYMENT = w.Deployment(namespace="bpf-dataplane", image="localhost/bpf-dataplane:dev")
PASS_SECONDS = 10.0


def condition(kind: str, status: bool, reason: str = "Synced", message: str = "") -> w.Condition:
    return w.Condition(
        type=kind, status="True" if status else "False", reason=reason, message=message
    )


@dataclass
class FakeNode:
    name: str
    supported: bool = True
    ready: bool = True
    agent_alive: bool = True
    attached: bool = False
    agent_pod: bool = False
    proxy_pod: bool = True
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    report: w.BpfNode | None = None

    @property
    def served(self) -> bool:
        return self.attached or self.proxy_pod


@dataclass
class FakeCluster:
    nodes: list[FakeNode]
    config: w.Config | None
    agent: w.DaemonSet | None = None
    proxy: w.DaemonSet | None = None
    proxy_config: str = "mode: iptables"
    memory: w.Memory = field(default_factory=w.Memory)
    now: float = 1_800_000_000.0
    resync: bool = False
    slices: tuple[w.EndpointSlice, ...] = ()
    override: w.ConfigMap | None = None

    # What the operator sees

    def world(self) -> w.World:
        since = self.memory.detaching_since
        return w.World(
            deployment=DEPLOYMENT,
            now=self.now,
            resync=self.resync,
            config=self.config,
            agent=self.agent,
            agent_pods=tuple(
                pod(n, "agent", n.agent_alive and n.ready) for n in self.nodes if n.agent_pod
            ),
            kube_proxy=self.proxy,
            kube_proxy_pods=tuple(pod(n, "kube-proxy", n.ready) for n in self.nodes if n.proxy_pod),
            kube_proxy_config=self.proxy_config,
            nodes=tuple(node(n) for n in self.nodes),
            bpf_nodes=tuple(n.report for n in self.nodes if n.report is not None),
            kubernetes_slices=self.slices,
            endpoint_override=self.override,
            detaching_for=None if since is None else self.now - since,
            selector_patches=self.memory.selector_patches,
            selector_patch_age=self.now - self.memory.selector_patched_at,
            refusal=self.memory.refusal,
        )

    # What the operator does

    def operator_pass(self, crash_after: int | None = None) -> None:
        """One pass. `crash_after` n: dies once n writes (status first) are done."""
        self.now += PASS_SECONDS
        world = self.world()
        if world.config is None:
            return
        decided = p.plan(world, world.config)
        writes = [None, *decided.actions]
        for write in writes[:crash_after]:
            if write is None:
                self.write_status(status_of(world, world.config, decided))
            else:
                self.perform(write)
            self.check()
        if crash_after is not None and crash_after <= len(writes):
            self.memory = w.Memory()

    def write_status(self, status: w.ConfigStatus) -> None:
        if self.config is not None:
            self.config = msgspec.structs.replace(self.config, status=status)
        if status.agents.mode != "Detach":
            self.memory.detaching_since = None
        elif self.memory.detaching_since is None:
            self.memory.detaching_since = self.now

    def perform(self, action: p.Action) -> None:
        match action:
            case p.AddFinalizer():
                self._set_finalizers((w.FINALIZER,))
            case p.RemoveFinalizer():
                self._set_finalizers(())
            case p.ApplyAgent():
                self._apply_agent(action)
            case p.DeleteAgent():
                self.agent = None
            case p.RemoveKubeProxy():
                self.set_proxy_selector({"kubernetes.io/os": "linux", w.KUBE_PROXY_LABEL: "true"})
                self.memory.selector_patches += 1
                self.memory.selector_patched_at = self.now
            case p.RestoreKubeProxy():
                self.set_proxy_selector({"kubernetes.io/os": "linux"})
                self.memory.selector_patches = 0
            case p.KeepKubeProxy(name):
                self.node(name).labels[w.KUBE_PROXY_LABEL] = "true"
                self.node(name).annotations[w.KEPT_ANNOTATION] = "bpfdp-operator"
            case p.ReleaseKubeProxy(name):
                self.node(name).labels.pop(w.KUBE_PROXY_LABEL, None)
                self.node(name).annotations.pop(w.KEPT_ANNOTATION, None)
            case p.DeleteBpfNode(name):
                self.node(name).report = None

    def _set_finalizers(self, finalizers: tuple[str, ...]) -> None:
        assert self.config is not None
        metadata = msgspec.structs.replace(self.config.metadata, finalizers=finalizers)
        self.config = msgspec.structs.replace(self.config, metadata=metadata)
        if not finalizers and self.config.deleting:
            self.config = None

    def _apply_agent(self, action: p.ApplyAgent) -> None:
        manifest = msgspec.convert(action.manifest, w.DaemonSet)
        generation = self.agent.metadata.generation + 1 if self.agent else 1
        metadata = msgspec.structs.replace(manifest.metadata, generation=generation)
        status = self.agent.status if self.agent else w.DaemonSetStatus()
        self.agent = msgspec.structs.replace(manifest, metadata=metadata, status=status)

    def set_proxy_selector(self, selector: dict[str, str]) -> None:
        assert self.proxy is not None
        self.proxy = kube_proxy(
            selector,
            generation=self.proxy.metadata.generation + 1,
            status=self.proxy.status,
            labels=self.proxy.metadata.labels,
        )

    # What the others do

    def daemonset_controller(self) -> None:
        for each in self.nodes:
            each.agent_pod = self.agent is not None
            each.proxy_pod = self._wants_proxy(each)
        self.check()
        if self.agent is not None:
            self.agent = settled(self.agent, len(self.nodes))
        if self.proxy is not None:
            self.proxy = settled(self.proxy, sum(n.proxy_pod for n in self.nodes))

    def _wants_proxy(self, each: FakeNode) -> bool:
        if self.proxy is None:
            return False
        asks = w.KUBE_PROXY_LABEL in self.proxy.spec.template.spec.node_selector
        return not asks or each.labels.get(w.KUBE_PROXY_LABEL) == "true"

    def agent_turn(self, each: FakeNode) -> None:
        """The agent does as the config's status says, and reports; it probes before it attaches."""
        if not (each.agent_pod and each.agent_alive and each.ready) or self.config is None:
            return
        mode = self.config.status.agents.mode or "Attach"
        probed = each.report is not None
        each.attached = each.supported and mode == "Attach" and (probed or each.attached)
        kept = each.labels.get(w.KUBE_PROXY_LABEL) == "true"
        cleared = self.config.status.kube_proxy.state == "Disabled" and not kept
        generation = self.config.metadata.generation
        each.report = report(each, generation, cleared=cleared, detached=mode == "Detach")
        self.check()

    def settle(self, passes: int = 60) -> None:
        """Let everybody have a turn, again and again."""
        for _ in range(passes):
            self.operator_pass()
            self.daemonset_controller()
            for each in self.nodes:
                self.agent_turn(each)

    # What the user does

    def edit(self, **changes: object) -> None:
        if self.config is None or self.config.deleting:
            return
        spec = msgspec.structs.replace(self.config.spec, **changes)
        generation = self.config.metadata.generation + 1
        metadata = msgspec.structs.replace(self.config.metadata, generation=generation)
        self.config = msgspec.structs.replace(self.config, spec=spec, metadata=metadata)

    def delete(self) -> None:
        if self.config is None or self.config.deleting:
            return
        if not self.config.metadata.finalizers:
            self.config = None
            return
        metadata = msgspec.structs.replace(
            self.config.metadata,
            generation=self.config.metadata.generation + 1,
            deletion_timestamp="2026-11-24T00:00:00Z",
        )
        self.config = msgspec.structs.replace(self.config, metadata=metadata)

    # What is checked

    def check(self) -> None:
        """kube-proxy is never absent from a node whose agent is not attached."""
        unserved = [n.name for n in self.nodes if not n.served]
        assert self.proxy is None or not unserved, f"nobody does services on {unserved}"

    def node(self, name: str) -> FakeNode:
        return next(n for n in self.nodes if n.name == name)

    @property
    def asks_for_label(self) -> bool:
        assert self.proxy is not None
        return w.KUBE_PROXY_LABEL in self.proxy.spec.template.spec.node_selector

    def status(self, kind: str) -> str:
        return self.found(kind).status

    def reason(self, kind: str) -> str:
        return self.found(kind).reason

    def found(self, kind: str) -> w.Condition:
        assert self.config is not None
        result = w.condition_of(self.config.status.conditions, kind)
        assert result is not None
        return result


def settled(daemonset: w.DaemonSet, number: int) -> w.DaemonSet:
    return msgspec.structs.replace(
        daemonset,
        status=w.DaemonSetStatus(
            observed_generation=daemonset.metadata.generation,
            desired_number_scheduled=number,
            updated_number_scheduled=number,
            number_ready=number,
        ),
    )


def kube_proxy(
    selector: dict[str, str] | None = None,
    *,
    generation: int = 1,
    status: w.DaemonSetStatus | None = None,
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
) -> w.DaemonSet:
    template = w.PodTemplateSpec(node_selector=selector or {"kubernetes.io/os": "linux"})
    return w.DaemonSet(
        metadata=w.Metadata(
            name="kube-proxy",
            namespace="kube-system",
            generation=generation,
            labels=labels or {"k8s-app": "kube-proxy"},
            annotations=annotations or {},
        ),
        spec=w.DaemonSetSpec(template=w.PodTemplate(spec=template)),
        status=status or w.DaemonSetStatus(),
    )


def pod(each: FakeNode, component: str, ready: bool) -> w.Pod:
    readiness = msgspec.structs.replace(
        condition("Ready", ready), last_transition_time="2026-01-01T00:00:00Z"
    )
    return w.Pod(
        metadata=w.Metadata(name=f"{component}-{each.name}"),
        spec=w.PodSpec(node_name=each.name),
        status=w.PodStatus(phase="Running", conditions=(readiness,)),
    )


def node(each: FakeNode) -> w.Node:
    return w.Node(
        metadata=w.Metadata(
            name=each.name, labels=dict(each.labels), annotations=dict(each.annotations)
        ),
        status=w.NodeStatus(conditions=(condition("Ready", each.ready),)),
    )


def report(each: FakeNode, generation: int, *, cleared: bool, detached: bool = False) -> w.BpfNode:
    absent = "Detached" if detached else "Syncing"
    lacks = "" if each.supported else "tc BPF programs cannot be loaded"
    conditions = (
        condition("FeaturesSupported", each.supported, "Supported", lacks),
        condition("Attached", each.attached, "Attached" if each.attached else absent),
        condition("ServicesSynced", each.attached),
        condition("PoliciesSynced", each.attached),
        condition("KubeProxyRulesCleared", cleared, "Cleared" if cleared else "NotCleared"),
    )
    status = w.BpfNodeStatus(
        observed_config_generation=generation, conditions=conditions, services=7
    )
    return w.BpfNode(metadata=w.Metadata(name=each.name), status=status)


def kubernetes_slice(*addresses: str, port: int = 6443) -> w.EndpointSlice:
    endpoints = tuple(w.Endpoint(addresses=(address,)) for address in addresses)
    return w.EndpointSlice(
        metadata=w.Metadata(name="kubernetes", namespace="default"),
        endpoints=endpoints,
        ports=(w.EndpointPort(name="https", port=port),),
    )


def cluster(*nodes: FakeNode, **spec: object) -> FakeCluster:
    """A cluster with kube-proxy on every node and a config just created."""
    members = list(nodes) or [FakeNode("node-1"), FakeNode("node-2"), FakeNode("node-3")]
    settings = {"kube_proxy_management": "Enabled"} | spec
    config = w.Config(
        metadata=w.Metadata(name="default", uid="u", generation=1),
        spec=w.ConfigSpec(**settings),  # type: ignore[arg-type]
    )
    proxy = settled(kube_proxy(), len(members))
    return FakeCluster(members, config, proxy=proxy, slices=(kubernetes_slice("192.0.2.10"),))

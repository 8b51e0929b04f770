# SPDX-License-Identifier: Apache-2.0
"""What the agent is told: process settings from the environment, the dataplane's from the CR.

`ProcessSettings` is fixed for the life of the process (the operator renders it into the
DaemonSet). `runtime_config` turns the `default` BpfDataplaneConfig into `Config`, what the agent
acts on, or raises ConfigError naming the field, so a bad object leaves the last good one running.
"""

from __future__ import annotations

import importlib.metadata
import ipaddress
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bpfdp_agent.watch.wire import BpfDataplaneConfig

GROUP = "bpfdataplane.io"
VERSION = "v1alpha1"

Fault = Literal["", "template-error", "verifier-reject"]
FAULTS: tuple[Fault, ...] = ("", "template-error", "verifier-reject")


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it and what it should be."""


class ProcessSettings(msgspec.Struct, frozen=True):
    """What the DaemonSet's environment says. Port 0: not served."""

    node_name: str
    node_ips: tuple[str, ...] = ()
    namespace: str = "bpf-dataplane"
    pod_name: str = ""
    version: str = "0"
    state_dir: Path = Path("/var/lib/bpfdp")
    health_port: int = 9099
    metrics_port: int = 9091
    fault: Fault = ""
    missing_features: frozenset[str] = frozenset()
    """Features to take for missing, for tests of what happens then."""

    @property
    def failed_dir(self) -> Path:
        """Where the full compiler and verifier logs of rejected programs are kept."""
        return self.state_dir / "failed"


def settings_from_env(env: Mapping[str, str]) -> ProcessSettings:
    """Process settings; raises ConfigError naming the variable that is missing or wrong."""
    node_name = env.get("NODE_NAME", "")
    if not node_name:
        raise ConfigError(
            "NODE_NAME is not set: the agent runs from the DaemonSet, which sets it from"
            " spec.nodeName; by hand, run `NODE_NAME=<node> bpfdp agent`"
        )
    return ProcessSettings(
        node_name=node_name,
        node_ips=tuple(part.strip() for part in env.get("NODE_IPS", "").split(",") if part.strip()),
        namespace=env.get("POD_NAMESPACE", "bpf-dataplane"),
        pod_name=env.get("POD_NAME", ""),
        version=env.get("BPFDP_VERSION") or importlib.metadata.version("bpf-dataplane"),
        state_dir=Path(env.get("BPFDP_STATE_DIR", "/var/lib/bpfdp")),
        health_port=_port(env, "BPFDP_HEALTH_PORT", 9099),
        metrics_port=_port(env, "BPFDP_METRICS_PORT", 9091),
        fault=_fault(env.get("BPFDP_FAULT", "")),
        missing_features=_missing(env.get("BPFDP_FAKE_MISSING_FEATURES", ""), node_name),
    )


def _missing(text: str, node_name: str) -> frozenset[str]:
    """`feature` on every node, `feature@node` on one; comma-separated."""
    pairs = (part.strip().partition("@") for part in text.split(",") if part.strip())
    return frozenset(feature for feature, _, node in pairs if node in ("", node_name))


def _port(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, "")
    if not text:
        return default
    if not text.isdigit() or not 0 <= int(text) <= 65535:
        raise ConfigError(f"{name}={text!r} is not a port: a number up to 65535, 0 for none")
    return int(text)


def _fault(text: str) -> Fault:
    for fault in FAULTS:
        if fault == text:
            return fault
    raise ConfigError(f"BPFDP_FAULT={text!r} is unknown: one of {', '.join(FAULTS[1:])} or unset")


# -- the spec, as on the wire ------------------------------------------------------------------


class _Wire(msgspec.Struct, frozen=True, rename="camel"):
    """Base of the CR's parts: camelCase names, fields that are not used are ignored."""


class ServicesSpec(_Wire, frozen=True):
    """`spec.services`."""

    external_service_mode: Literal["Tunnel", "DSR"] = "Tunnel"
    algorithm: Literal["Random", "Maglev"] = "Random"
    connect_time_load_balancing: Literal["TCP", "Enabled", "Disabled"] = "TCP"
    dsr_opt_out_cidrs: tuple[str, ...] = msgspec.field(name="dsrOptOutCIDRs", default=())
    node_port_range: str = "30000-32767"
    node_port_addresses: tuple[str, ...] = ()
    healthz_port: int = 10256


class PolicySpec(_Wire, frozen=True):
    """`spec.policy`."""

    enforcement: str = "Enabled"


class InterfacesSpec(_Wire, frozen=True):
    """`spec.interfaces`."""

    data_pattern: str = ""
    attach_type: Literal["Auto", "TCX", "TC"] = "Auto"


class TunnelSpec(_Wire, frozen=True):
    """`spec.tunnel`."""

    port: int = 4789
    vni: int = 4096
    mtu: int = 0


class ConntrackSpec(_Wire, frozen=True):
    """`spec.conntrack`."""

    max_entries: int = 131072


class ObservabilitySpec(_Wire, frozen=True):
    """`spec.observability`."""

    log_level: Literal["Debug", "Info", "Warning"] = "Info"


class DataplaneSpec(_Wire, frozen=True):
    """`spec`: the fields the agent acts on."""

    services: ServicesSpec = ServicesSpec()
    policy: PolicySpec = PolicySpec()
    interfaces: InterfacesSpec = InterfacesSpec()
    tunnel: TunnelSpec = TunnelSpec()
    conntrack: ConntrackSpec = ConntrackSpec()
    maps: dict[str, int] = {}
    observability: ObservabilitySpec = ObservabilitySpec()


# -- what the agent acts on ---------------------------------------------------------------------


class Config(msgspec.Struct, frozen=True):
    """The checked configuration. `generation` is the CR's."""

    generation: int = 0
    detach: bool = False
    kube_proxy_state: str = "Running"
    dsr: bool = False
    maglev: bool = False
    connect_tcp: bool = True
    """Pods' TCP sockets are translated at connect time."""
    connect_udp: bool = False
    dsr_optout: tuple[str, ...] = ()
    node_port_range: tuple[int, int] = (30000, 32767)
    node_port_addresses: tuple[str, ...] = ()
    healthz_port: int = 10256
    policy_enabled: bool = True
    data_pattern: str = ""
    attach_type: Literal["Auto", "TCX", "TC"] = "Auto"
    tunnel_port: int = 4789
    tunnel_vni: int = 4096
    tunnel_mtu: int = 0
    map_sizes: tuple[tuple[str, int], ...] = ()
    log_level: str = "INFO"

    @property
    def kube_proxy_removed(self) -> bool:
        """Whether the operator says that kube-proxy's pods are gone and its rules may go."""
        return self.kube_proxy_state == "Disabled"


def runtime_config(obj: BpfDataplaneConfig) -> Config:
    """The checked configuration of a CR; raises ConfigError naming the field."""
    try:
        spec = msgspec.json.decode(obj.spec, type=DataplaneSpec)
    except msgspec.DecodeError as error:
        raise ConfigError(f"spec: {error}") from None
    return Config(
        generation=obj.metadata.generation,
        detach=obj.status.agents.mode == "Detach",
        kube_proxy_state=obj.status.kube_proxy.state,
        dsr=spec.services.external_service_mode == "DSR",
        maglev=spec.services.algorithm == "Maglev",
        connect_tcp=spec.services.connect_time_load_balancing != "Disabled",
        connect_udp=spec.services.connect_time_load_balancing == "Enabled",
        dsr_optout=_cidrs("spec.services.dsrOptOutCIDRs", spec.services.dsr_opt_out_cidrs),
        node_port_range=_port_range(spec.services.node_port_range),
        node_port_addresses=_cidrs(
            "spec.services.nodePortAddresses", spec.services.node_port_addresses
        ),
        healthz_port=spec.services.healthz_port,
        policy_enabled=spec.policy.enforcement == "Enabled",
        data_pattern=_pattern("spec.interfaces.dataPattern", spec.interfaces.data_pattern),
        attach_type=spec.interfaces.attach_type,
        tunnel_port=spec.tunnel.port,
        tunnel_vni=spec.tunnel.vni,
        tunnel_mtu=spec.tunnel.mtu,
        map_sizes=_map_sizes(spec),
        log_level=spec.observability.log_level.upper(),
    )


def _map_sizes(spec: DataplaneSpec) -> tuple[tuple[str, int], ...]:
    """Map name → max entries; applied when a map is created, never to one that exists."""
    sizes = {_snake(name): size for name, size in spec.maps.items()}
    return tuple(sorted({**sizes, "ct": spec.conntrack.max_entries}.items()))


def _snake(name: str) -> str:
    return re.sub(r"([A-Z])", lambda m: "_" + m.group(1).lower(), name)


def _cidrs(field: str, values: tuple[str, ...]) -> tuple[str, ...]:
    """The CIDRs in canonical form."""
    try:
        return tuple(str(ipaddress.ip_network(value.strip(), strict=False)) for value in values)
    except ValueError as error:
        raise ConfigError(f"{field}: {error}; write CIDRs such as 10.0.0.0/8 or fd00::/8") from None


def _port_range(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})-(\d{1,5})", text)
    low, high = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= low <= high <= 65535:
        raise ConfigError(
            f"spec.services.nodePortRange: {text!r} is not a range such as 30000-32767"
        )
    return low, high


def _pattern(field: str, text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ConfigError(f"{field}: {text!r} is not a regular expression ({error})") from None
    return text

# SPDX-License-Identifier: Apache-2.0
"""What the environment and the CR may say, and what is refused with a helpful message."""

from __future__ import annotations

import msgspec
import pytest
from bpfdp_agent.config import ConfigError, runtime_config, settings_from_env
from bpfdp_agent.watch.wire import BpfDataplaneConfig, Kind, decode


def config_of(text: str) -> BpfDataplaneConfig:
    found = {"metadata": {"name": "default"}} | msgspec.json.decode(text)
    return decode(Kind.CONFIG, msgspec.json.encode(found))


def test_an_empty_cr_means_the_defaults():
    config = runtime_config(config_of("{}"))
    assert not config.dsr
    assert (config.connect_tcp, config.connect_udp) == (True, False)
    assert not config.detach
    assert not config.kube_proxy_removed
    assert config.policy_enabled
    assert config.node_port_range == (30000, 32767)
    assert dict(config.map_sizes) == {"ct": 131072}


def test_the_crs_fields_are_found_under_their_wire_names():
    config = runtime_config(
        config_of(
            """{"metadata": {"name": "default", "generation": 7}, "spec": {
            "services": {"externalServiceMode": "DSR", "dsrOptOutCIDRs": ["10.1.2.3/8"],
                         "nodePortAddresses": ["fd00::1/64"], "nodePortRange": "20000-20010"},
            "policy": {"enforcement": "Disabled"}, "maps": {"sourceRanges": 99},
            "interfaces": {"dataPattern": "^eth", "attachType": "TC"},
            "conntrack": {"maxEntries": 4096}, "observability": {"logLevel": "Debug"}},
            "status": {"agents": {"mode": "Detach"}, "kubeProxy": {"state": "Disabled"}}}"""
        )
    )
    assert config.generation == 7
    assert config.dsr
    assert config.dsr_optout == ("10.0.0.0/8",)
    assert config.node_port_addresses == ("fd00::/64",)
    assert config.node_port_range == (20000, 20010)
    assert not config.policy_enabled
    assert dict(config.map_sizes) == {"ct": 4096, "source_ranges": 99}
    assert (config.data_pattern, config.attach_type) == ("^eth", "TC")
    assert config.log_level == "DEBUG"
    assert config.detach
    assert config.kube_proxy_removed


@pytest.mark.parametrize(
    ("mode", "tcp", "udp"),
    [("TCP", True, False), ("Enabled", True, True), ("Disabled", False, False)],
)
def test_what_is_translated_at_connect_time(mode, tcp, udp):
    text = '{"spec": {"services": {"connectTimeLoadBalancing": "' + mode + '"}}}'
    config = runtime_config(config_of(text))
    assert (config.connect_tcp, config.connect_udp) == (tcp, udp)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ('{"services": {"dsrOptOutCIDRs": ["10.0.0.0/99"]}}', "dsrOptOutCIDRs"),
        ('{"services": {"nodePortAddresses": ["nonsense"]}}', "nodePortAddresses"),
        ('{"services": {"nodePortRange": "9-1"}}', "nodePortRange"),
        ('{"services": {"connectTimeLoadBalancing": "UDP"}}', "connectTimeLoadBalancing"),
        ('{"interfaces": {"dataPattern": "eth("}}', "dataPattern"),
        ('{"tunnel": {"vni": "many"}}', "vni"),
    ],
)
def test_a_bad_field_is_named(spec, field):
    with pytest.raises(ConfigError, match=field):
        runtime_config(config_of('{"spec": ' + spec + "}"))


def test_settings_say_which_variable_is_missing_or_wrong():
    with pytest.raises(ConfigError, match="NODE_NAME"):
        settings_from_env({})
    with pytest.raises(ConfigError, match="BPFDP_HEALTH_PORT"):
        settings_from_env({"NODE_NAME": "a", "BPFDP_HEALTH_PORT": "x"})
    with pytest.raises(ConfigError, match="BPFDP_FAULT"):
        settings_from_env({"NODE_NAME": "a", "BPFDP_FAULT": "surprise"})


def test_settings_from_the_daemonsets_environment():
    settings = settings_from_env({"NODE_NAME": "n1", "NODE_IPS": "192.0.2.1, 2001:db8::1"})
    assert settings.node_ips == ("192.0.2.1", "2001:db8::1")
    assert settings.health_port == 9099


def test_features_are_made_missing_on_all_nodes_or_on_one():
    env = {"BPFDP_FAKE_MISSING_FEATURES": "tcx, lpm_trie@n1,clsact@n2"}
    assert settings_from_env(env | {"NODE_NAME": "n1"}).missing_features == {"tcx", "lpm_trie"}
    assert settings_from_env({"NODE_NAME": "n1"}).missing_features == frozenset()

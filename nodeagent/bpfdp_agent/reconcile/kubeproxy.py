# SPDX-License-Identifier: Apache-2.0
"""kube-proxy's leavings: its rules are cleared once the operator says that it is gone.

In every other state, and on a node that keeps it by label, its rules are its own. Its health ports
are served while it is away.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from bpfdp_agent.dataplane import kubeproxy_rules
from bpfdp_agent.model.nodes import KUBE_PROXY_LABEL, eligible
from bpfdp_agent.watch.wire import Kind

if TYPE_CHECKING:
    from bpfdp_agent.config import Config
    from bpfdp_agent.reconcile.surroundings import Surroundings

log = logging.getLogger(__name__)

AWAY = ("Disabled", "NotFound")
EXPECTED_BACK = ("Running", "Restoring")
SETTLE_LIMIT = 90.0


class KubeProxySync:
    """Follows `status.kubeProxy.state` and this node's label."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._config: Config | None = None
        self._cleared = False

    def configure(self, config: Config) -> None:
        """Take a new config."""
        self._config = config
        servers = self._around.proxy_servers
        servers.healthz_port = config.healthz_port
        servers.active = config.kube_proxy_state in AWAY and not self._kept
        servers.wake.set()

    @property
    def _kept(self) -> bool:
        return self._around.view.nodes.keeps_kube_proxy

    async def reconcile(self) -> int:
        """Clear its rules when it is gone; 0 map operations."""
        config = self._config
        if config is None or not self._around.view.synced(Kind.NODE):
            return 0
        nodes = self._around.view.node_objects
        self._around.proxy.node_eligible = eligible(nodes.get(self._around.view.nodes.own))
        self.configure(config)  # the label may have come or gone
        if self._kept or not config.kube_proxy_removed:
            self._leave(config)
            return 0
        if not self._cleared:
            found = await kubeproxy_rules.clear()
            log.info(
                "kube-proxy is gone: cleared its %d chains, %d rules", found.chains, found.rules
            )
            self._cleared = True
        self._around.status.condition(
            "KubeProxyRulesCleared", True, "Cleared", "No rule of kube-proxy is left on the node."
        )
        return 0

    def _leave(self, config: Config) -> None:
        self._cleared = False
        why = f"kube-proxy is {config.kube_proxy_state or 'not looked at yet'}"
        if self._kept:
            why = f"this node keeps kube-proxy by the label {KUBE_PROXY_LABEL}=true"
        self._around.status.condition(
            "KubeProxyRulesCleared", False, "NotCleared", f"{why}: its rules stay."
        )


async def wait_until_back(config: Config) -> None:
    """Before we detach: until kube-proxy's rules are there and unchanged, where it is to be back.

    Bounded: a node must not keep programs for ever because kube-proxy cannot come up on it.
    """
    if config.kube_proxy_state not in EXPECTED_BACK:
        return
    try:
        async with asyncio.timeout(SETTLE_LIMIT):
            while not await kubeproxy_rules.settled():  # noqa: ASYNC110 - no event to wait for
                await asyncio.sleep(0.5)
    except TimeoutError:
        log.warning(
            "kube-proxy's rules did not settle within %.0f s: detaching all the same", SETTLE_LIMIT
        )

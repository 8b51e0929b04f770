# SPDX-License-Identifier: Apache-2.0
"""Every reason a condition may carry: one closed list, documented in docs/conditions.md."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why a condition has its status; the remedy of each stands in docs/conditions.md."""

    ALL_NODES_PROGRAMMED = "AllNodesProgrammed"
    ROLLING_OUT = "RollingOut"
    NODE_NOT_READY = "NodeNotReady"
    AGENT_NOT_READY = "AgentNotReady"
    KERNEL_UNSUPPORTED = "KernelUnsupported"
    PROGRAM_REJECTED = "ProgramRejected"
    TEMPLATE_ERROR = "TemplateError"
    MAP_FULL = "MapFull"
    KUBE_PROXY_MANAGED_EXTERNALLY = "KubeProxyManagedExternally"
    KUBE_PROXY_IPVS = "KubeProxyIPVS"
    KUBE_PROXY_RUNNING = "KubeProxyRunning"
    KUBE_PROXY_REMOVED = "KubeProxyRemoved"
    KUBE_PROXY_NOT_FOUND = "KubeProxyNotFound"
    KUBE_PROXY_CONFLICT = "KubeProxyConflict"
    API_ENDPOINT_UNKNOWN = "APIEndpointUnknown"
    API_ENDPOINT_KNOWN = "APIEndpointKnown"
    INVALID_CONFIGURATION = "InvalidConfiguration"
    INVALID_OBJECT = "InvalidObject"
    SYNCED = "Synced"
    SYNCING = "Syncing"
    ATTACHED = "Attached"
    DETACHED = "Detached"
    DISABLED = "Disabled"
    DELETING = "Deleting"
    SUPPORTED = "Supported"
    LOADED = "Loaded"
    CLEARED = "Cleared"
    NOT_CLEARED = "NotCleared"
    PAUSED = "Paused"

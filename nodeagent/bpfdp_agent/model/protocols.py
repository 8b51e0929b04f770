# SPDX-License-Identifier: Apache-2.0
"""Transport protocols by their Kubernetes names."""

from __future__ import annotations

PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}
"""IPPROTO_* of what Services and NetworkPolicies may name."""

# SPDX-License-Identifier: Apache-2.0
"""A real Kubernetes cluster on one machine, in namespaces of its own.

`python -m cluster.testbed --help` is the command line, `Testbed` what tests use.
"""

from __future__ import annotations

from cluster.testbed.cluster import Testbed
from cluster.testbed.errors import TestbedError

__all__ = ["Testbed", "TestbedError"]

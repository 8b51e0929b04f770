# SPDX-License-Identifier: Apache-2.0
"""Entry point of `python -m cluster.testbed`."""

from __future__ import annotations

from cluster.testbed.cli import main

main()

# SPDX-License-Identifier: Apache-2.0
"""`python -m bpfdp_agent` is `bpfdp`."""

from __future__ import annotations

from bpfdp_agent.cli import main

main()

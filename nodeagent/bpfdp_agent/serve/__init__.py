# SPDX-License-Identifier: Apache-2.0
"""What the agent tells the world: its BpfNode, Events, health, metrics."""

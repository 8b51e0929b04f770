# SPDX-License-Identifier: Apache-2.0
"""The node's kernel state: the only writers of maps, programs, links and devices."""

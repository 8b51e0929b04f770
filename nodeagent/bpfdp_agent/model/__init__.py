# SPDX-License-Identifier: Apache-2.0
"""What the cluster looks like now: typed stores, indexes and what changed. Pure."""

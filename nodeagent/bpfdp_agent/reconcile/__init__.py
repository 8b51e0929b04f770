# SPDX-License-Identifier: Apache-2.0
"""From the cluster view to the kernel, one module per concern; each is woken by what changed."""

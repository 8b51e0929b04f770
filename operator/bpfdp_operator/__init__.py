# SPDX-License-Identifier: Apache-2.0
"""The operator: reconciles BpfDataplaneConfig and rolls out the node agents."""

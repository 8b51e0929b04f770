# SPDX-License-Identifier: Apache-2.0
"""The node agent: keeps the kernel's maps and programs equal to what the API server says."""

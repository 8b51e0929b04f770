# SPDX-License-Identifier: Apache-2.0
"""What to write to get from the actual to the desired, in a safe order. Pure."""

# SPDX-License-Identifier: Apache-2.0
"""What the kernel's maps should hold, as bytes. Pure."""

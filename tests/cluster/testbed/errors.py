# SPDX-License-Identifier: Apache-2.0
"""The one error the testbed raises on purpose."""

from __future__ import annotations


class TestbedError(Exception):
    """Something a person can act on; the message says how."""

    __test__ = False  # the name is not a pytest class

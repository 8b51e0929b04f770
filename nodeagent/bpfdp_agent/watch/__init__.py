# SPDX-License-Identifier: Apache-2.0
"""The API server's side: bytes in, typed events out."""

# SPDX-License-Identifier: Apache-2.0
"""Words that several commands print."""

from __future__ import annotations


def number_of(number: int, what: str) -> str:
    """Return a number of things, as "1 token" or "2 tokens"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"

# SPDX-License-Identifier: Apache-2.0
"""The errors of a malformed schema."""

from __future__ import annotations


class SchemaError(ValueError):
    """A schema is malformed; the text names the file, the key and the reason."""

    def __init__(self, file: str, key: str, reason: str) -> None:
        super().__init__(f"{file}: {key}: {reason}")


class MalformedError(ValueError):
    """A part of a schema is malformed; the text is the reason. The reader adds file and key."""

    def __init__(self, reason: str, key: str = "") -> None:
        super().__init__(reason)
        self.key = key

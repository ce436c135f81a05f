# SPDX-License-Identifier: Apache-2.0
"""Reads JSON from outside: it refuses repeated keys, deep nesting and huge integers."""

from __future__ import annotations

import json
import re
from typing import Any

# A table nests objects three deep. Python has a limit too, but it depends on the depth of the caller.
_MAX_NESTING = 8
# A size has at most 64 bits. Python's own limit is far above, at some thousand digits.
_MAX_DIGITS = 19
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]', re.DOTALL)


def read_json(text: str) -> Any:
    """Return what the JSON text says.

    Raises:
        ValueError: it is not JSON, an object has a key twice, an integer has more than 19 digits, or
            lists and objects are nested more than 8 deep. The error says which.
    """
    nesting = 0
    for token in _STRING_OR_BRACKET.findall(text):
        nesting += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token, 0)
        if nesting > _MAX_NESTING:
            raise ValueError(f"expected JSON nested at most {_MAX_NESTING} deep, got more")
    try:
        return json.loads(text, object_pairs_hook=_without_repeats, parse_int=_short_integer)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {key!r} stands twice")
        content[key] = value
    return content


def _short_integer(digits: str) -> int:
    count = len(digits.removeprefix("-"))
    if count > _MAX_DIGITS:
        raise ValueError(f"expected integers of at most {_MAX_DIGITS} digits, got one of {count}")
    return int(digits)

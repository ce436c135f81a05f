# SPDX-License-Identifier: Apache-2.0
"""A JSON reader that refuses what json.loads lets through: repeated keys, deep nesting, huge numbers."""

from __future__ import annotations

import json
import re
from typing import Any

# A table has objects in objects in an object. Python's own limit depends on who calls.
_MAX_NESTING = 8
# Past 64 bits nothing is a size; Python's own limit is on the digits that it converts.
_MAX_DIGITS = 19
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]', re.DOTALL)


def read_json(text: str) -> Any:
    """What the JSON says; unlike json.loads, it takes no key that stands twice in an object.

    Raises:
        ValueError: it is not JSON, a key stands twice, an integer has more than 19 digits, or
            lists and objects are nested more than 8 deep; with the reason.
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

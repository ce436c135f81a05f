# SPDX-License-Identifier: Apache-2.0
"""Reads the `schema` of a YAML, which torch reads too: argument types, names and defaults."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from .errors import MalformedError
from .model import FLAGS, REQUIRED

_TYPES = (
    "Tensor", "Tensor?", "SymInt", "bool", "float", "float?", "str", "str?", "ScalarType",
)  # fmt: skip
# What a default may be, by type without its question mark.
_DEFAULTS: Mapping[str, tuple[type, ...]] = {
    "Tensor": (), "SymInt": (int,), "bool": (bool,), "float": (float,), "str": (str,),
    "ScalarType": (),
}  # fmt: skip


def parse_signature(text: str) -> tuple[list[tuple[str, str, Any]], list[str]]:
    """Return (name, type, default) of each argument, and the names of the returns, if any."""
    match = re.fullmatch(r"\((?P<arguments>.*)\) -> (?:Tensor|\((?P<returns>.*)\))", text)
    if match is None:
        raise MalformedError(f"expected '(arguments) -> Tensor' or '-> (Tensor a, ...)': {text}")
    arguments: list[tuple[str, str, Any]] = []
    # Split at commas, but not at those of a list.
    for part in filter(None, re.split(r", (?![^\[]*\])", match["arguments"])):
        item = re.fullmatch(r"(?P<type>[\w\[\]?]+) (?P<name>\w+)(?:=(?P<default>.+))?", part)
        if item is None or not (item["type"] in _TYPES or FLAGS.fullmatch(item["type"])):
            raise MalformedError(f"cannot read {part!r}; types are {', '.join(_TYPES)}, bool[N]")
        default = _default(part, item["type"], item["default"])
        if any(item["name"] == name for name, _, _ in arguments):
            raise MalformedError(f"argument {item['name']!r} stands twice")
        if default is REQUIRED and arguments and arguments[-1][2] is not REQUIRED:
            raise MalformedError(f"{item['name']!r} needs a default, as the argument before it")
        arguments.append((item["name"], item["type"], default))
    returns: list[str] = []
    for part in (match["returns"] or "").split(", "):
        item = re.fullmatch(r"Tensor (\w+)", part)
        if part and item is None:
            raise MalformedError(f"cannot read the return {part!r}; expected 'Tensor name'")
        returns += [item[1]] if item else []
    return arguments, returns


def _default(part: str, kind: str, text: str | None) -> Any:
    if text is None:
        return REQUIRED
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise MalformedError(f"the default of {part!r} is no literal") from None
    if flags := FLAGS.fullmatch(kind):
        is_one = isinstance(value, list) and [type(v) for v in value] == [bool] * int(flags[1])
    else:
        allowed = _DEFAULTS[kind.removesuffix("?")]
        is_one = isinstance(value, allowed) or (value is None and kind.endswith("?"))
    if not is_one:
        raise MalformedError(f"the default of {part!r} is no {kind}")
    return value

# SPDX-License-Identifier: Apache-2.0
"""Digests of Python code that see neither comments, docstrings nor layout.

A digest is the same on every Python that can read the code. `ast.dump` is not: it prints other
fields from version to version. Only the standard library is imported here, so that a bare
interpreter can run this file.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from typing import Any


@functools.cache
def code_sha256(source: str) -> str:
    """Return a digest of the code; comments, docstrings and layout do not change it."""
    return hashlib.sha256(_text(parse(source)).encode("ascii")).hexdigest()


def parse(source: str) -> ast.Module:
    """Parse the code and drop what only people and releases read."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                setattr(node, field, [s for s in statements if not _is_documentation(s)])
    return tree


def _is_documentation(statement: ast.stmt) -> bool:
    """Tell whether this is a docstring, another lone string, or `__version__ = "..."`."""
    if not isinstance(statement, ast.Expr | ast.Assign):
        return False
    if not isinstance(statement.value, ast.Constant) or not isinstance(statement.value.value, str):
        return False
    if isinstance(statement, ast.Expr):
        return True
    return [ast.unparse(target) for target in statement.targets] == ["__version__"]


def _text(value: Any) -> str:
    """Write a syntax tree as names of node classes and of the fields that are set."""
    if isinstance(value, ast.Constant):
        # ascii, since repr asks this Python's Unicode tables which characters can be printed.
        # The field `kind`, the u of u"text", is left out.
        return f"Constant({value.value!a})"
    if isinstance(value, ast.JoinedStr):
        return f"JoinedStr({_text(_merged(value.values))})"
    if isinstance(value, ast.AST):
        fields = (
            f"{name}={_text(field)}"
            for name, field in ast.iter_fields(value)
            # A new field of a later version is None or an empty list in code that does not use it.
            if field is not None and field != []
        )
        return f"{type(value).__name__}({', '.join(sorted(fields))})"
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return ascii(value)


def _merged(values: list[ast.expr]) -> list[ast.expr]:
    """Join neighbouring texts of an f-string; versions cut them at different places."""
    merged: list[ast.expr] = []
    for value in values:
        last = merged[-1] if merged else None
        if isinstance(value, ast.Constant) and isinstance(last, ast.Constant):
            merged[-1] = ast.Constant(str(last.value) + str(value.value))
        elif not isinstance(value, ast.Constant) or value.value:
            merged.append(value)
    return merged

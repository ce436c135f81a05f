# SPDX-License-Identifier: Apache-2.0
"""Expressions over dimension letters and scalar arguments: reading, evaluating, solving."""

from __future__ import annotations

import ast
import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import CodeType
from typing import Any

from .errors import MalformedError

_ALLOWED = (
    ast.Expression, ast.BinOp, ast.BoolOp, ast.UnaryOp, ast.Compare, ast.IfExp, ast.Name, ast.Load,
    ast.Constant, ast.Subscript, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.And,
    ast.Or, ast.Not, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Is, ast.IsNot,
)  # fmt: skip


@dataclass(frozen=True)
class Expr:
    """An expression. `text` is what the YAML says; `node` is its syntax tree without `let` letters."""

    text: str
    node: ast.expr

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(n.id for n in ast.walk(self.node) if isinstance(n, ast.Name))

    @cached_property
    def source(self) -> str:
        return ast.unparse(self.node)

    @cached_property
    def _code(self) -> CodeType:
        return compile(self.source, f"<{self.text}>", "eval")

    def evaluate(self, values: Mapping[str, Any]) -> Any:
        return eval(self._code, {"__builtins__": {}}, dict(values))


def parse(
    text: str, dims: Collection[str], let: Mapping[str, Expr], types: Mapping[str, str]
) -> Expr:
    """Read an expression over letters and arguments; `types` has the type of each argument."""
    try:
        node = _tree(text)
    except SyntaxError as error:
        raise MalformedError(f"not an expression: {text!r} ({error.msg})") from None
    compared_with_none = set()
    for item in ast.walk(node):
        if not isinstance(item, _ALLOWED):
            raise MalformedError(f"{type(item).__name__} is not allowed in {text!r}")
        if isinstance(item, ast.Compare) and isinstance(item.ops[0], (ast.Is, ast.IsNot)):
            compared_with_none.add(item.left)
    for item in ast.walk(node):
        if not isinstance(item, ast.Name):
            continue
        kind = types.get(item.id)
        if item.id not in dims and item.id not in let and kind is None:
            raise MalformedError(f"{item.id!r} in {text!r} is neither a dimension nor an argument")
        if kind is not None and kind.startswith("Tensor") and item not in compared_with_none:
            raise MalformedError(
                f"{item.id!r} in {text!r} is a tensor: only 'is None' may be asked"
            )
    return Expr(text, _substitute(node, {letter: expr.node for letter, expr in let.items()}))


@functools.cache
def _tree(text: str) -> ast.expr:
    """Return the syntax tree of an expression. The schemas say the same few things many times."""
    return ast.parse(text, mode="eval").body


def _substitute(node: ast.expr, nodes: Mapping[str, ast.expr]) -> ast.expr:
    """Return `node` with each name replaced by its entry in `nodes`. `node` itself stays as it is."""
    if not any(isinstance(n, ast.Name) and n.id in nodes for n in ast.walk(node)):
        return node
    replaced: ast.expr = _Substitute(nodes).visit(ast.parse(ast.unparse(node), mode="eval").body)
    return replaced


def solve(node: ast.expr, letter: str, size: str) -> str | None:
    """Return the source of the `letter` for which `node` equals `size`; None if no rule gives it.

    There are three rules. A letter alone is the size. `letter * factor` divides the size. A
    conditional expression solves both of its branches.
    """
    if isinstance(node, ast.Name) and node.id == letter:
        return size
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        for side, factor in ((node.left, node.right), (node.right, node.left)):
            if isinstance(side, ast.Name) and side.id == letter and not _mentions(factor, letter):
                return f"{size} // ({ast.unparse(factor)})"
    if isinstance(node, ast.IfExp) and not _mentions(node.test, letter):
        branches = solve(node.body, letter, size), solve(node.orelse, letter, size)
        if None not in branches:
            return f"({branches[0]} if {ast.unparse(node.test)} else {branches[1]})"
    return None


class _Substitute(ast.NodeTransformer):
    def __init__(self, nodes: Mapping[str, ast.expr]) -> None:
        self.nodes = nodes

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.nodes.get(node.id, node)


def _mentions(node: ast.expr, letter: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == letter for n in ast.walk(node))

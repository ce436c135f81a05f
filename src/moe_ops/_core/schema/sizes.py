# SPDX-License-Identifier: Apache-2.0
"""Decides which axis of which tensor binds a letter, and which must agree with it."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from .errors import MalformedError
from .expressions import solve
from .model import Argument, Size


def bind_sizes(arguments: tuple[Argument, ...], dims: Collection[str]) -> Iterator[Size]:
    """Yield a Size for each axis, in argument order, required tensors first.

    An axis waits while its letters are bound by none of the axes before it.
    """
    required = [a for a in arguments if a.type == "Tensor"]
    optional = [a for a in arguments if a.type == "Tensor?"]
    bound: set[str] = set()
    waiting = [Size(a, axis, e) for a in required for axis, e in enumerate(a.shape)]
    while waiting:
        for size in waiting:
            unbound = sorted((size.expr.names & set(dims)) - bound)
            if not unbound:
                yield size
                break
            if len(unbound) == 1 and solve(size.expr.node, unbound[0], "size") is not None:
                bound.add(unbound[0])
                yield Size(size.argument, size.axis, size.expr, unbound[0])
                break
        else:
            stuck = waiting[0]
            key = f"arguments.{stuck.argument.name}.shape[{stuck.axis}]"
            raise MalformedError(
                f"no rule solves {stuck.expr.text!r} for its unbound dimension", key
            )
        waiting.remove(size)
    if missing := sorted(set(dims) - bound):
        raise MalformedError("no required tensor has this dimension", f"dims.{missing[0]}")
    for argument in optional:
        sizes = [Size(argument, axis, expr) for axis, expr in enumerate(argument.shape)]
        # A wrong scalar, such as a forgotten top_k, is named before the sizes derived from it.
        yield from sorted(sizes, key=lambda size: bool(size.expr.names & set(dims)))

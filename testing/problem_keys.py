# SPDX-License-Identifier: Apache-2.0
"""Builds a Problem of moe_ops.configs from the words of its key."""

from collections.abc import Iterable
from typing import Any

from moe_ops.configs.problem import Problem


def make_problem(
    kind: str,
    dtype: str,
    num_experts: int,
    out_features: int,
    in_features: int,
    rows: int,
    words: Iterable[str] = (),
) -> Problem:
    """Return the Problem whose flags are these words."""
    flags: dict[str, Any] = dict.fromkeys(words, True)
    if flags.pop("activated", False):
        flags["epilogue"] = "activation"
    if flags.pop("gated", False):
        is_forward = kind == "forward"
        flags["epilogue"] = "gated_activation" if is_forward else "gated_activation_backward"
    return Problem(kind, dtype, num_experts, out_features, in_features, rows, **flags)


def problem_of(key: str) -> Problem:
    """Return the Problem of a key."""
    kind, dtype, *sizes = key.split()
    numbers = [int(word.lstrip("ENDrows")) for word in sizes[:4]]
    return make_problem(kind, dtype, numbers[0], numbers[1], numbers[2], numbers[3], sizes[4:])


def with_words(given: Problem, words: Iterable[str]) -> Problem:
    """Return the same product with other flags."""
    sizes = (given.num_experts, given.out_features, given.in_features, given.rows)
    return make_problem(given.kind, given.dtype, *sizes, words)

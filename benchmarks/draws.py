# SPDX-License-Identifier: Apache-2.0
"""Draw the shapes of the sweep from a seed.

T num_tokens, H hidden_size, I intermediate_size, E num_experts, K top_k, R = T * K routed rows.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from benchmarks.suite import Shape

WIDTHS, STEP = (256, 8192), 8
EXPERTS = (2, 512)
TOKENS = (256, 65536)
MOST_SLOTS = 10
ROUTINGS = ("uniform", "zipf")
GB = 10**9


@dataclass(frozen=True)
class Draw:
    """A shape, and how its tokens are routed: one of ROUTINGS."""

    shape: Shape
    routing: str


def draw_shapes(seed: int, count: int, limit_bytes: float) -> tuple[list[Draw], list[str]]:
    """Return `count` draws, and what was drawn again because it exceeds the limit.

    H and I are multiples of 8, and log-uniform as E and T are. K is uniform. The routings take
    turns. A larger count begins with the same shapes.
    """
    generator = random.Random(seed)
    draws: list[Draw] = []
    repeated = []
    while len(draws) < count:
        shape = _draw_shape(generator, f"{seed}/{len(draws):02}")
        if num_bytes(shape) > limit_bytes:
            repeated.append(f"{shape.name} {sizes(shape)}: {num_bytes(shape) / GB:.0f} GB")
        else:
            draws.append(Draw(shape, ROUTINGS[len(draws) % len(ROUTINGS)]))
    return draws, repeated


def _draw_shape(generator: random.Random, name: str) -> Shape:
    hidden_size, intermediate_size = (_log_uniform(generator, *WIDTHS, STEP) for _ in range(2))
    num_experts = _log_uniform(generator, *EXPERTS)
    num_tokens = _log_uniform(generator, *TOKENS)
    top_k = 1 + int(generator.random() * min(MOST_SLOTS, num_experts))
    return Shape(name, num_tokens, hidden_size, intermediate_size, num_experts, top_k)


def _log_uniform(generator: random.Random, low: int, high: int, step: int = 1) -> int:
    """Return a multiple of `step` between low and high, which are such themselves."""
    drawn = math.exp(math.log(low) + generator.random() * (math.log(high) - math.log(low)))
    return step * round(drawn / step)


def num_bytes(shape: Shape, itemsize: int = 2) -> int:
    """Return the bytes of weights, their gradients and the activations of a step.

    Activations are hidden states, output and their gradients (T, H), and what grouped_mm keeps for
    the backward: the rows (R, H) before and after the projections, their product (R, 2I) and the
    activated rows (R, I).
    """
    tokens = 4 * shape.num_tokens * shape.hidden_size
    rows = shape.num_rows * (2 * shape.hidden_size + 3 * shape.intermediate_size)
    return itemsize * (2 * shape.num_weights + tokens + rows)


def sizes(shape: Shape) -> str:
    """Return the sizes of a shape as text."""
    return (
        f"T {shape.num_tokens} H {shape.hidden_size} I {shape.intermediate_size} "
        f"E {shape.num_experts} K {shape.top_k}"
    )

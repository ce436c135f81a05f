# SPDX-License-Identifier: Apache-2.0
"""What a width costs that is no multiple of 8 elements: TMA can describe no row of it in bf16.

Our block beside our block of the next widths that are multiples, in turns. Each is compared with a
reference of its own.

T num_tokens, H hidden_size, I intermediate_size, E num_experts, K top_k.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace

from benchmarks import suite
from benchmarks.cuda.experts import PASSES, Block, Comparison, ours
from benchmarks.cuda.timing import OURS, Bench, Case, Record, compare
from benchmarks.suite import Shape

# The block of the next widths.
NEXT = "next"
# What TMA asks for is 16 bytes; that is so many elements.
MULTIPLE = 8


def cases(bench: Bench, shapes: Iterable[Shape]) -> Iterator[Case]:
    del shapes
    for shape in suite.TINY_WIDTHS if bench.tiny else suite.WIDTHS:
        yield shape.name, functools.partial(run_widths, bench, shape)


def next_widths(shape: Shape) -> Shape:
    """The shape with both widths rounded up to multiples of 8."""
    hidden_size, intermediate_size = (
        width + -width % MULTIPLE for width in (shape.hidden_size, shape.intermediate_size)
    )
    return replace(shape, hidden_size=hidden_size, intermediate_size=intermediate_size)


def run_widths(bench: Bench, shape: Shape) -> Iterator[Record]:
    """Both passes; the ratio is our time over that of the next widths."""
    blocks = {OURS: Block(bench, shape), NEXT: Block(bench, next_widths(shape))}
    comparisons = {
        who: Comparison(block, block.route("uniform"), {who: ours(block)})
        for who, block in blocks.items()
    }
    following = blocks[NEXT].shape
    sizes = {
        "T": shape.num_tokens, "H": shape.hidden_size, "I": shape.intermediate_size,
        "E": shape.num_experts, "K": shape.top_k,
        "next_H": following.hidden_size, "next_I": following.intermediate_size,
    }  # fmt: skip
    for name in PASSES:
        calls = {who: each.calls(name)[who] for who, each in comparisons.items()}
        errors = {who: each.errors[name][who] for who, each in comparisons.items()}
        record = compare(bench, calls, errors, {NEXT: (OURS, NEXT)})
        yield {"shape": shape.name, **sizes, "pass": name, **record}

# SPDX-License-Identifier: Apache-2.0
"""A decoding step of the whole expert block in a CUDA graph, from topk_ids to the output.

Each replay finds other ids and an L2 cache that was overwritten. Beside ours stand transformers'
grouped_mm, as it is and compiled, and its batched_mm, which copies the weights of every slot. The
floor is the bytes of the touched weights over the read bandwidth of the run.

T num_tokens, K top_k.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import suite
from benchmarks.cuda import experts
from benchmarks.cuda.experts import COMPILED, Block, first_line
from benchmarks.cuda.timing import (
    OURS,
    Bench,
    Captured,
    Case,
    Record,
    compare,
    relative_error,
    rounded,
    worst,
)
from benchmarks.suite import Shape
from testing import reference

logger = logging.getLogger("moe_ops.benchmarks")

# What is compared, beside OURS and COMPILED, which is grouped_mm.
GROUPED_MM, BATCHED_MM = "grouped_mm", "batched_mm"
# Draws of ids, and how many of them are checked.
DRAWS, CHECKED = 16, 3


def cases(bench: Bench, shapes: Iterable[Shape]) -> Iterator[Case]:
    del shapes
    shape = suite.TINY_DECODE if bench.tiny else suite.DECODE
    for num_tokens in suite.TINY_DECODE_TOKENS if bench.tiny else suite.DECODE_TOKENS:
        of_tokens = dataclasses.replace(shape, num_tokens=num_tokens)
        yield f"{shape.name} T={num_tokens}", functools.partial(run_decode, bench, of_tokens)


class Replay:
    """A call of the block, in a CUDA graph on a GPU, whose ids are others each time."""

    def __init__(
        self, bench: Bench, forward: Callable[[Tensor], Tensor], draws: list[Tensor]
    ) -> None:
        self.draws, self.turn = draws, 0
        self.topk_ids = draws[0].clone()
        self.output = draws[0]

        def call() -> None:
            self.output = forward(self.topk_ids)

        # Captured makes the call once before, which compiles.
        self._captured = Captured(bench, [call])

    def prepare(self) -> None:
        """Brings the next ids, before `Bench.timed` overwrites the cache and starts the clock."""
        self.topk_ids.copy_(self.draws[self.turn % len(self.draws)])
        self.turn += 1

    def __call__(self) -> None:
        self._captured()

    def error(self, expected: list[Tensor]) -> float:
        """The worst relative error over the first draws."""
        errors = []
        for ids, want in zip(self.draws, expected, strict=False):
            self.topk_ids.copy_(ids)
            self()
            errors.append(relative_error(self.output, want))
        return worst(errors)


def forwards_of(block: Block, backend: str | None) -> dict[str, Callable[[Tensor], Tensor]]:
    """topk_ids -> the output, by name; without a backend nothing that is compiled."""
    module: Any = experts.grouped_mm_module(block)
    found = {
        OURS: experts.ours(block).forward,
        GROUPED_MM: experts.grouped_mm(block, module).forward,
    }
    if backend is not None:
        compiled = experts.compiled(module, dynamic=False, backend=backend)
        found[COMPILED] = experts.grouped_mm(block, compiled).forward
    if experts.HAS_TRANSFORMERS:
        batched: Any = experts.grouped_mm_module(block)
        batched.config._experts_implementation = BATCHED_MM
        found[BATCHED_MM] = experts.grouped_mm(block, batched).forward
    return found


def touched_bytes(block: Block, draws: Iterable[Tensor]) -> float:
    """Bytes of the weights of the experts that have a token, in the mean of the draws."""
    shape = block.shape
    of_expert = shape.num_weights // shape.num_experts * block.bench.dtype.itemsize
    touched = [ids.unique().numel() for ids in draws]
    return of_expert * sum(touched) / len(touched)


@torch.no_grad()
def measured(block: Block, backend: str | None) -> Record:
    """The record of a block's shape."""
    bench, shape = block.bench, block.shape
    sizes = (shape.num_tokens, shape.num_experts, shape.top_k, bench.device)
    draws = [reference.route("uniform", *sizes, seed) for seed in range(DRAWS)]
    expected = [
        reference.fused_experts(
            block.hidden_states, block.gate_up_proj, block.down_proj, ids, block.topk_weights
        )
        for ids in draws[:CHECKED]
    ]
    replays: dict[str, Replay] = {}
    errors: dict[str, float] = {}
    failed: dict[str, str] = {}
    for who, forward in forwards_of(block, backend).items():
        made = _capture(bench, forward, draws, expected)
        if isinstance(made, Exception):
            # The others are worth their numbers; this one is told, and why.
            failed[who] = first_line(made)
        else:
            replays[who], errors[who] = made
    ratios = {who: (who, OURS) for who in replays if who != OURS}
    record = compare(bench, replays, errors, ratios)
    num_bytes = touched_bytes(block, draws)
    floor = num_bytes / bench.ceilings["read_tbs"] / 1e9
    record |= {"touched_bytes": round(num_bytes), "floor_milliseconds": rounded(floor)}
    if OURS in record["milliseconds"]:
        record["of_floor"] = rounded(record["milliseconds"][OURS][1] / floor)
    return record | ({"failed": failed} if failed else {})


def _capture(
    bench: Bench,
    forward: Callable[[Tensor], Tensor],
    draws: list[Tensor],
    expected: list[Tensor],
) -> tuple[Replay, float] | Exception:
    """A replay and its error; or why there is none."""
    try:
        replay = Replay(bench, forward, draws)
        return replay, replay.error(expected)
    except Exception as error:
        logger.exception("the block was not captured")
        return error


def run_decode(bench: Bench, shape: Shape, backend: str | None = None) -> Iterator[Record]:
    # Without it Dynamo goes over to dynamic sizes after the first shape.
    torch._dynamo.reset()
    if bench.device.type == "cuda":
        backend = "inductor"
    record = measured(Block(bench, shape), backend)
    yield {"shape": shape.name, "T": shape.num_tokens, **record}

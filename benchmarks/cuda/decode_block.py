# SPDX-License-Identifier: Apache-2.0
"""A decoding step of whole expert blocks in a CUDA graph, from topk_ids to the output.

A graph holds the blocks of LAYERS layers, one after the other, as a model's does: each has weights
and ids of its own, and a block's time is the graph's over LAYERS. So what starts a graph counts once.
Each replay finds other ids and an L2 cache that was overwritten. Beside ours stand transformers'
grouped_mm, as it is and compiled, and its batched_mm, which copies the weights of every slot. The
floor is the bytes of a block's touched weights over the read bandwidth of the run.

T num_tokens, K top_k.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
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
# Blocks in a graph; draws of ids, and how many of them are checked.
LAYERS, DRAWS, CHECKED = 4, 16, 3


def cases(bench: Bench, shapes: Iterable[Shape]) -> Iterator[Case]:
    del shapes
    shape = suite.TINY_DECODE if bench.tiny else suite.DECODE
    for num_tokens in suite.TINY_DECODE_TOKENS if bench.tiny else suite.DECODE_BLOCK_TOKENS:
        of_tokens = dataclasses.replace(shape, num_tokens=num_tokens)
        yield f"{shape.name} T={num_tokens}", functools.partial(run_decode, bench, of_tokens)


class Replay:
    """A call of each layer, in one CUDA graph on a GPU, whose ids are others each time.

    Args:
        bench: where.
        layers: topk_ids -> the output.
        draws: the ids. Layer i has those i places after the first layer's.
    """

    def __init__(
        self, bench: Bench, layers: Sequence[Callable[[Tensor], Tensor]], draws: list[Tensor]
    ) -> None:
        self.draws, self.turn, self.calls = draws, 0, len(layers)
        self.topk_ids = [draws[0].clone() for _ in layers]
        self.outputs = list(self.topk_ids)

        def call(layer: int, forward: Callable[[Tensor], Tensor]) -> None:
            self.outputs[layer] = forward(self.topk_ids[layer])

        # Captured makes the calls once before, which compiles.
        self._captured = Captured(
            bench, [functools.partial(call, i, forward) for i, forward in enumerate(layers)]
        )

    def _take(self, turn: int) -> None:
        for i, ids in enumerate(self.topk_ids):
            ids.copy_(self.draws[(turn + i) % len(self.draws)])

    def prepare(self) -> None:
        """Brings the next ids, before `Bench.timed` overwrites the cache and starts the clock."""
        self._take(self.turn)
        self.turn += 1

    def __call__(self) -> None:
        self._captured()

    def error(self, references: Sequence[Callable[[Tensor], Tensor]]) -> float:
        """The worst relative error over the first draws, of layers that should give these."""
        errors = []
        for turn in range(min(CHECKED, len(self.draws))):
            self._take(turn)
            self()
            errors += [
                relative_error(output, reference(ids))
                for output, reference, ids in zip(
                    self.outputs, references, self.topk_ids, strict=True
                )
            ]
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


def expected_of(block: Block, weights: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """topk_ids -> what a block with these weights is to give."""
    up, down = weights

    def forward(topk_ids: Tensor) -> Tensor:
        return reference.fused_experts(block.hidden_states, up, down, topk_ids, block.topk_weights)

    return forward


@torch.no_grad()
def measured(blocks: Sequence[Block], backend: str | None) -> Record:
    """The record of a shape, in whose blocks."""
    bench, shape = blocks[0].bench, blocks[0].shape
    sizes = (shape.num_tokens, shape.num_experts, shape.top_k, bench.device)
    draws = [reference.route("uniform", *sizes, seed) for seed in range(DRAWS)]
    expected = [expected_of(block, (block.gate_up_proj, block.down_proj)) for block in blocks]
    layers = [forwards_of(block, backend) for block in blocks]
    replays: dict[str, Replay] = {}
    errors: dict[str, float] = {}
    failed: dict[str, str] = {}
    for who in layers[0]:
        made = _capture(bench, [layer[who] for layer in layers], draws, expected)
        if isinstance(made, Exception):
            # The others are worth their numbers; this one is told, and why.
            failed[who] = first_line(made)
        else:
            replays[who], errors[who] = made
    ratios = {who: (who, OURS) for who in replays if who != OURS}
    record = compare(bench, replays, errors, ratios)
    num_bytes = touched_bytes(blocks[0], draws)
    floor = num_bytes / bench.ceilings["read_tbs"] / 1e9
    record |= {"layers": len(blocks), "touched_bytes": round(num_bytes)}
    record |= {"floor_milliseconds": rounded(floor)}
    if OURS in record["milliseconds"]:
        record["of_floor"] = rounded(record["milliseconds"][OURS][1] / floor)
    return record | ({"failed": failed} if failed else {})


def _capture(
    bench: Bench,
    layers: Sequence[Callable[[Tensor], Tensor]],
    draws: list[Tensor],
    expected: Sequence[Callable[[Tensor], Tensor]],
) -> tuple[Replay, float] | Exception:
    """A replay and its error; or why there is none."""
    try:
        replay = Replay(bench, layers, draws)
        return replay, replay.error(expected)
    except Exception as error:
        logger.exception("the blocks were not captured")
        return error


def run_decode(bench: Bench, shape: Shape, backend: str | None = None) -> Iterator[Record]:
    # Without it Dynamo goes over to dynamic sizes after the first shape.
    torch._dynamo.reset()
    if bench.device.type == "cuda":
        backend = "inductor"
    record = measured([Block(bench, shape) for _ in range(LAYERS)], backend)
    yield {"shape": shape.name, "T": shape.num_tokens, **record}

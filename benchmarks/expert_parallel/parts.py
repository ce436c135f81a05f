# SPDX-License-Identifier: Apache-2.0
"""What the benchmark of expert parallelism measures: the exchange of rows alone, and the block.

T num_tokens of a rank, H hidden_size, K top_k, E experts on W ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import moe_ops
from benchmarks.cuda.experts import BOTH, FORWARD, PASSES, Block, flops
from benchmarks.cuda.timing import Call, Case, Record, compare, relative_error, rounded, worst
from benchmarks.expert_parallel.exchanges import Exchange, Received, compute, exchanges
from benchmarks.expert_parallel.ranks import RanksBench, all_ranks_sum
from benchmarks.expert_parallel.records import (
    BLOCK,
    COMBINE,
    DISPATCH,
    EXCHANGE,
    EXPERTS,
    FEW_TOKENS,
    LINK,
    ONE_GPU,
    RECOMPUTED,
)
from benchmarks.suite import Shape
from testing import reference


def cases(bench: RanksBench, shapes: Iterable[Shape]) -> Iterator[Case]:
    for shape in shapes:
        few = dataclasses.replace(shape, num_tokens=FEW_TOKENS)
        for part in (few, shape):
            yield f"{EXCHANGE} {shape.name}", functools.partial(run_exchange, bench, part)
        yield f"{BLOCK} {shape.name}", functools.partial(run_block, bench, shape)


def _record(what: str, bench: RanksBench, shape: Shape) -> Record:
    return {"what": what, "shape": shape.name, "W": bench.world_size, "T": shape.num_tokens}


def _ratios(found: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Of every other way over the first, which is ours."""
    ours, *others = found
    return {other: (other, ours) for other in others}


# The exchange


def run_exchange(
    bench: RanksBench, shape: Shape, ways: Mapping[str, Exchange] | None = None
) -> Iterator[Record]:
    """Dispatch, combine and both, against a copy of the dispatched bytes to a peer.

    ways: the exchanges, ours first; default: those that are there.
    """
    ways = ways or exchanges(bench, shape)
    hidden = bench.randn(shape.num_tokens, shape.hidden_size)
    weights = torch.rand(shape.num_tokens, shape.top_k, device=bench.device).to(bench.dtype)
    ids = reference.route(
        "uniform", shape.num_tokens, shape.num_experts, shape.top_k, bench.device, bench.rank
    )
    visits_TW = ranks_visited(ids, shape.num_experts, bench.world_size)
    expected = hidden.float() * visits_TW.sum(1, keepdim=True)
    leaving = int(visits_TW.sum() - visits_TW[:, bench.rank].sum())
    (leaving,) = map(int, bench.largest([leaving]))
    columns = min(shape.top_k, shape.num_experts // bench.world_size)
    row = shape.hidden_size * bench.dtype.itemsize
    num_bytes = {
        DISPATCH: leaving * (row + columns * (4 + weights.itemsize)),
        COMBINE: leaving * row,
    }
    calls, errors, ratios = {}, {}, {}
    calls[LINK], errors[LINK] = _copy_to_a_peer(bench, max(num_bytes[DISPATCH], 1))
    for name, exchange in ways.items():
        of_way = _exchange_calls(exchange, (hidden, ids, weights))
        error = relative_error(of_way[""](), expected)
        for part, call in of_way.items():
            calls[f"{name} {part}".strip()] = call
            errors[f"{name} {part}".strip()] = error
        ratios[f"link / {name}"] = (LINK, f"{name} {DISPATCH}")
    record = compare(bench, calls, _of_all_ranks(bench, errors), {**_ratios(ways), **ratios})
    times = {name: middle for name, (_, middle, _) in record["milliseconds"].items()}
    record["bytes"] = num_bytes
    record["fill"] = rounded(float(visits_TW.sum(1, dtype=torch.float32).mean()))
    record["gbs"] = {
        name: rounded(num_bytes[COMBINE if COMBINE in name else DISPATCH] / time / 1e6)
        for name, time in times.items()
        if name == LINK or name.endswith((DISPATCH, COMBINE))
    }
    yield {**_record(EXCHANGE, bench, shape), **record}


def ranks_visited(topk_ids: Tensor, num_experts: int, world_size: int) -> Tensor:
    """(T, W): 1 where a token has an expert on the rank."""
    ranks = topk_ids.long() // (num_experts // world_size)
    return ranks.new_zeros(len(ranks), world_size).scatter_(1, ranks, 1)


def _exchange_calls(exchange: Exchange, tokens: tuple[Tensor, ...]) -> dict[str, Call]:
    received = exchange.dispatch(*tokens)

    def both() -> Tensor:
        found = exchange.dispatch(*tokens)
        return exchange.combine(found.rows, found)

    return {
        "": both,
        DISPATCH: functools.partial(exchange.dispatch, *tokens),
        COMBINE: functools.partial(exchange.combine, received.rows, received),
    }


def _copy_to_a_peer(bench: RanksBench, num_bytes: int) -> tuple[Call, float]:
    """Every rank copies to the next one's GPU; on the CPU, within its own memory."""
    source = torch.randint(256, (num_bytes,), dtype=torch.uint8, device=bench.device)
    peer = bench.device
    if peer.type == "cuda":
        peer = torch.device("cuda", (bench.rank + 1) % bench.world_size)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=peer)
    copy = functools.partial(target.copy_, source, non_blocking=True)
    copy()
    return copy, 0.0 if torch.equal(target.to(bench.device), source) else math.inf


def _of_all_ranks(bench: RanksBench, errors: dict[str, float]) -> dict[str, float]:
    return dict(zip(errors, bench.largest(list(errors.values())), strict=True))


# The block


class Way(NamedTuple):
    """A way to compute the block: its forward, and what it is differentiated in."""

    forward: Callable[..., Tensor]
    leaves: tuple[Tensor, ...]

    def call(self, name: str, tokens: Sequence[Tensor], grad_output: Tensor) -> Call:
        def forward() -> Tensor:
            with torch.no_grad():
                return self.forward(*tokens)

        def both() -> tuple[Tensor, ...]:
            output = self.forward(*tokens)
            return output, *torch.autograd.grad(output, self.leaves, grad_output)

        return forward if name == FORWARD else both


class Problem:
    """A block on the tokens of all ranks, drawn alike on each of them, and this rank's part of it.

    Attributes:
        tokens: hidden_states, topk_ids and topk_weights of this rank; grad_output belongs to them.
        everything, projections: gate_up_proj and down_proj of all experts and of this rank's.
        expected: what one process gets for all tokens, this rank's part: output, and gradients of
            hidden_states, gate_up_proj, down_proj and topk_weights.
    """

    def __init__(self, bench: RanksBench, shape: Shape) -> None:
        torch.manual_seed(0)
        self.bench = bench
        whole = dataclasses.replace(shape, num_tokens=shape.num_tokens * bench.world_size)
        block = Block(bench, whole)
        ids = block.route("uniform")
        num_local = shape.num_experts // bench.world_size
        own = slice(bench.rank * shape.num_tokens, (bench.rank + 1) * shape.num_tokens)
        self.experts = slice(bench.rank * num_local, (bench.rank + 1) * num_local)
        parts = (own, own, self.experts, self.experts, own)
        self.expected = [
            t[part].clone() for t, part in zip(block.expected(ids), parts, strict=True)
        ]
        hidden, weights = (
            t.detach()[own].clone().requires_grad_()
            for t in (block.hidden_states, block.topk_weights)
        )
        self.tokens = (hidden, ids[own].clone(), weights)
        self.grad_output = block.grad_output[own].clone()
        self.everything = (block.gate_up_proj, block.down_proj)
        self.projections = tuple(nn.Parameter(p.detach()[self.experts]) for p in self.everything)

    def way(self, forward: Callable[..., Tensor], projections: tuple[Tensor, ...]) -> Way:
        return Way(forward, (self.tokens[0], *projections, self.tokens[2]))

    def errors(self, way: Way) -> dict[str, float]:
        """By pass, the worst relative error of what it gives here."""
        calls = {name: way.call(name, self.tokens, self.grad_output) for name in PASSES}
        forward = relative_error(calls[FORWARD](), self.expected[0])
        output, grad_hidden, *grads, grad_weights = calls[BOTH]()
        for i, grad in enumerate(grads):
            if len(grad) != len(self.expected[2]):
                # Of all experts, from this rank's tokens.
                grads[i] = all_ranks_sum(grad)[self.experts]
        found = (output, grad_hidden, *grads, grad_weights)
        return {FORWARD: forward, BOTH: worst(map(relative_error, found, self.expected))}


def run_block(
    bench: RanksBench, shape: Shape, found: Mapping[str, Exchange] | None = None
) -> Iterator[Record]:
    """The block by every way, on one GPU that has all experts, and its experts alone.

    found: the exchanges, ours first; default: those that are there.
    """
    problem = Problem(bench, shape)
    found = found or exchanges(bench, shape)
    ours = next(iter(found))
    ways = {
        name: problem.way(compute(exchange, problem.projections), problem.projections)
        for name, exchange in found.items()
    }
    ratios = {**_ratios(ways), ONE_GPU: (ONE_GPU, ours), EXPERTS: (EXPERTS, ours)}
    recomputed = f"{ours} {RECOMPUTED}"
    again = compute(found[ours], problem.projections, recompute=True)
    ways[recomputed] = problem.way(again, problem.projections)
    ratios[RECOMPUTED] = (recomputed, ours)
    ways[ONE_GPU] = problem.way(_one_gpu(problem.everything), problem.everything)
    of_way = {name: problem.errors(way) for name, way in ways.items()}
    alone, rows = _experts_alone(problem, found[ours].dispatch(*problem.tokens))
    for name in PASSES:
        calls = {
            who: way.call(name, problem.tokens, problem.grad_output)
            for who, way in ways.items()
            # Nothing is computed again where there is no backward.
            if name == BOTH or who != recomputed
        }
        calls[EXPERTS] = alone.call(name, rows, torch.randn_like(rows[0]))
        errors = {who: errors[name] for who, errors in of_way.items()}
        # A part of the block that was found right.
        errors[EXPERTS] = errors[ours]
        record = compare(bench, calls, _of_all_ranks(bench, errors), ratios)
        record["tflops"] = {
            who: rounded(flops(shape, name) / middle / 1e9)
            for who, (_, middle, _) in record["milliseconds"].items()
        }
        if EXPERTS in record["ratio"]:
            record["communication"] = rounded(1 - record["ratio"][EXPERTS][1])
        yield {**_record(BLOCK, bench, shape), "pass": name, **record}


def _one_gpu(projections: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    def forward(hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        return moe_ops.fused_experts(hidden, *projections, topk_ids, topk_weights)

    return forward


def _experts_alone(problem: Problem, received: Received) -> tuple[Way, tuple[Any, ...]]:
    """This rank's experts on the rows that it has received, and these rows."""
    rows, weights = (t.detach().requires_grad_() for t in (received.rows, received.local_weights))
    way = Way(_one_gpu(problem.projections), (rows, *problem.projections, weights))
    return way, (rows, received.local_ids, weights)

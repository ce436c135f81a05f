# SPDX-License-Identifier: Apache-2.0
"""The ways to bring tokens to the ranks of their experts and back, that the benchmark compares.

T num_tokens of a rank, H hidden_size, K top_k, E experts on W ranks, L = E / W experts on each. A way
dispatches hidden_states (T, H), topk_ids (T, K) and topk_weights (T, K) to rows of this rank's
experts, which `fused_experts` computes, and combines the outputs to (T, H). Both are differentiable.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, distributed
from torch.utils.checkpoint import checkpoint

import moe_ops
from benchmarks.cuda.experts import first_line
from benchmarks.expert_parallel.ranks import RanksBench, group_name
from benchmarks.expert_parallel.records import EXACT, FUNCTIONAL, SYMMETRIC
from benchmarks.suite import Shape
from moe_ops._core.transport import ENVIRONMENT_VARIABLE


class Received(NamedTuple):
    """What a rank's experts compute with, and what `combine` needs to know.

    rows (N, H), local_ids (N, S), local_weights (N, S): as fused_experts takes them; an id of -1 is
    no slot.
    """

    rows: Tensor
    local_ids: Tensor
    local_weights: Tensor
    kept: Any = None


class Exchange(Protocol):
    def dispatch(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Received: ...

    def combine(self, rows: Tensor, received: Received) -> Tensor: ...


class Ops:
    """ep_dispatch and ep_combine on one transport, with room for all of a rank's tokens on each."""

    def __init__(self, shape: Shape, world_size: int, transport: str) -> None:
        self.transport = transport
        self.sizes = (shape.num_experts, world_size, shape.num_tokens, group_name())

    def dispatch(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Received:
        # The op's plan reads it in each call, and backward calls follow within the same turn.
        os.environ[ENVIRONMENT_VARIABLE] = self.transport
        rows, ids, weights, slots, _ = moe_ops.ep_dispatch(
            hidden, topk_ids, topk_weights, *self.sizes
        )
        return Received(rows, ids, weights, slots)

    def combine(self, rows: Tensor, received: Received) -> Tensor:
        os.environ[ENVIRONMENT_VARIABLE] = self.transport
        return moe_ops.ep_combine(rows, received.local_ids, received.kept, *self.sizes)


class ExactSplit:
    """all_to_all_single with the sizes that the routing has, which the host waits for once.

    Each token is sent once to a rank, as by ep_dispatch. A token's ranks are V = min(K, W) slots, of
    which those that repeat a rank are dropped; moe_ops.permute and unpermute order and sum the rows.
    """

    def __init__(self, shape: Shape, world_size: int) -> None:
        self.world_size, self.num_local = world_size, shape.num_experts // world_size

    def dispatch(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Received:
        world_size = self.world_size
        rank_TK = topk_ids // self.num_local
        visits_TW = rank_TK.new_zeros(len(topk_ids), world_size).scatter_(1, rank_TK.long(), 1)
        # The ranks that a token visits, then W, which routing_indices drops.
        ranks = torch.arange(world_size, dtype=rank_TK.dtype, device=rank_TK.device)
        rank_TV = torch.where(visits_TW > 0, ranks, world_size)
        top_v = min(topk_ids.shape[1], world_size)
        rank_TV = rank_TV.sort(1).values[:, :top_v].contiguous()
        counts, gather, scatter = moe_ops.routing_indices(rank_TV, world_size)
        coming = torch.empty_like(counts)
        distributed.all_to_all_single(coming, counts)
        sent, got = torch.stack((counts, coming)).tolist()  # the one wait
        slots = gather[: sum(sent)].long()
        tokens = slots // top_v
        here_NK = rank_TK[tokens] == rank_TV.flatten()[slots, None]
        ids = torch.where(here_NK, topk_ids[tokens] % self.num_local, -1)
        local_ids = ids.new_empty(sum(got), ids.shape[1])
        distributed.all_to_all_single(local_ids, ids, got, sent)
        rows, weights = (
            _all_to_all(moe_ops.permute(x, gather, top_v, scatter), sent, got, sum(got))
            for x in (hidden, topk_weights)
        )
        return Received(rows, local_ids, weights, (gather, scatter, top_v, sent, got))

    def combine(self, rows: Tensor, received: Received) -> Tensor:
        gather, scatter, top_v, sent, got = received.kept
        back = _all_to_all(rows, got, sent, len(gather))
        return moe_ops.unpermute(back, gather, None, top_v, scatter)


def _all_to_all(rows: Tensor, sent: list[int], got: list[int], num_rows: int) -> Tensor:
    output: Tensor = _AllToAll.apply(rows, sent, got, num_rows)  # type: ignore[no-untyped-call]
    return output


class _AllToAll(torch.autograd.Function):
    """The first sum(sent) rows to the ranks; what comes, with zeros up to num_rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], got: list[int], num_rows: int) -> Tensor:
        ctx.back = got, sent, len(rows)
        output = rows.new_empty(num_rows, rows.shape[1])
        output[sum(got) :] = 0
        distributed.all_to_all_single(output[: sum(got)], rows[: sum(sent)], got, sent)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(grads[0].contiguous(), *ctx.back), None, None, None


def exchanges(bench: RanksBench, shape: Shape) -> dict[str, Exchange]:
    """By name, those that this machine has."""
    missing = absent(bench)
    found: dict[str, Exchange] = {
        transport: Ops(shape, bench.world_size, transport)
        for transport in (SYMMETRIC, FUNCTIONAL)
        if transport not in missing
    }
    return {**found, EXACT: ExactSplit(shape, bench.world_size)}


def absent(bench: RanksBench) -> dict[str, str]:
    """By name, why a transport is not measured."""
    whys = {transport: _why_absent(bench, transport) for transport in (SYMMETRIC, FUNCTIONAL)}
    return {transport: why for transport, why in whys.items() if why}


def _why_absent(bench: RanksBench, transport: str) -> str:
    """What the transport says to one token of each rank, or nothing."""
    ids = torch.zeros(1, 1, dtype=torch.int32, device=bench.device)
    ops = Ops(Shape("", 1, 16, 1, bench.world_size, 1), bench.world_size, transport)
    try:
        ops.dispatch(bench.randn(1, 16), ids, bench.randn(1, 1))
    except RuntimeError as error:
        return first_line(error)
    return ""


def compute(exchange: Exchange, projections: tuple[Tensor, ...], recompute: bool = False) -> Any:
    """The block: (hidden, topk_ids, topk_weights) -> the output.

    Args:
        exchange: how tokens reach the experts.
        projections: gate_up_proj and down_proj of this rank's experts.
        recompute: dispatch and compute again in backward, as ExpertParallel does by default.
    """

    def rows(hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> tuple[Tensor, Received]:
        received = exchange.dispatch(hidden, topk_ids, topk_weights)
        output = moe_ops.fused_experts(
            received.rows, *projections, received.local_ids, received.local_weights
        )
        return output, received

    def block(*tokens: Tensor) -> Tensor:
        if recompute and torch.is_grad_enabled():
            return exchange.combine(*checkpoint(rows, *tokens, use_reentrant=False))
        return exchange.combine(*rows(*tokens))

    return block

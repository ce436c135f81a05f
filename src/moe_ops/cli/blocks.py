# SPDX-License-Identifier: Apache-2.0
"""A block of experts from the op, and from what torch offers, on the same tensors.

T num_tokens, H hidden_size, I intermediate_size, E num_experts, K top_k, U = 2 * I where gated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import moe_ops
from moe_ops.tuning import Experts


@dataclass(frozen=True)
class Block:
    """The tensors of a block. The activation is SiLU.

    Attributes:
        hidden_states (T, H), topk_ids (T, K), topk_weights (T, K), grad_output (T, H).
        stored_up (E, U, H), stored_down (E, H, I): or (E, H, U) and (E, I, H) where transposed.
        up_bias (E, U), down_bias (E, H): or None.
        gated: whether the up projection holds a gate too.
        transposed: how the weights are stored.
    """

    hidden_states: Tensor
    stored_up: Tensor
    stored_down: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    grad_output: Tensor
    gated: bool
    transposed: bool

    @property
    def up(self) -> Tensor:
        """The up projection, (E, U, H)."""
        return self.stored_up.transpose(1, 2) if self.transposed else self.stored_up

    @property
    def down(self) -> Tensor:
        """The down projection, (E, H, I)."""
        return self.stored_down.transpose(1, 2) if self.transposed else self.stored_down

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The tensors that get gradients."""
        found = (
            *(self.hidden_states, self.stored_up, self.stored_down, self.topk_weights),
            *(self.up_bias, self.down_bias),
        )
        return tuple(leaf for leaf in found if leaf is not None)


def make_block(experts: Experts, num_tokens: int, device: torch.device) -> Block:
    """Draw a block with random numbers and a uniform routing to distinct experts."""

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, dtype=experts.dtype, device=device) * scale
        return drawn.requires_grad_()

    def weight(out_features: int, in_features: int) -> Tensor:
        sizes = (in_features, out_features) if experts.transposed else (out_features, in_features)
        return leaf(experts.num_experts, *sizes, scale=in_features**-0.5)

    def bias(out_features: int) -> Tensor | None:
        return leaf(experts.num_experts, out_features) if experts.has_bias else None

    scores = torch.rand(num_tokens, experts.num_experts, device=device)
    topk_weights, topk_ids = scores.topk(experts.top_k, dim=1)
    topk_weights = (topk_weights / topk_weights.sum(1, keepdim=True)).to(experts.dtype)
    return Block(
        hidden_states=leaf(num_tokens, experts.up[1]),
        stored_up=weight(*experts.up),
        stored_down=weight(*experts.down),
        topk_ids=topk_ids.to(torch.int32),
        topk_weights=topk_weights.requires_grad_(),
        up_bias=bias(experts.up[0]),
        down_bias=bias(experts.down[0]),
        grad_output=leaf(num_tokens, experts.down[0]).detach(),
        gated=experts.up[0] == 2 * experts.down[1],
        transposed=experts.transposed,
    )


def in_float32(block: Block) -> Block:
    """Return the block with its numbers in fp32."""
    copies: dict[str, Any] = {
        field.name: value.detach().float().requires_grad_(value.requires_grad)
        for field in fields(block)
        if isinstance(value := getattr(block, field.name), Tensor) and value.is_floating_point()
    }
    return replace(block, **copies)


def with_moe_ops(block: Block) -> Tensor:
    """Compute the block as one op."""
    return moe_ops.fused_experts(
        block.hidden_states,
        block.up,
        block.down,
        block.topk_ids,
        block.topk_weights,
        block.up_bias,
        block.down_bias,
        gated=block.gated,
    )


def with_grouped_mm(block: Block) -> Tensor:
    """Compute the block with torch's grouped_mm, as transformers' implementation of that name does."""
    ids = block.topk_ids.view(-1)
    num_experts, top_k = block.up.shape[0], block.topk_ids.shape[1]
    gather = ids.argsort(stable=True)
    expert = ids[gather]
    counts = torch.histc(expert.float(), bins=num_experts, min=0, max=num_experts - 1)
    ends = counts.cumsum(0).to(torch.int32)
    rows = F.grouped_mm(block.hidden_states[gather // top_k], block.up.transpose(1, 2), offs=ends)
    if block.up_bias is not None:
        rows = rows + block.up_bias[expert]
    rows = F.grouped_mm(_activated(rows, block.gated), block.down.transpose(1, 2), offs=ends)
    if block.down_bias is not None:
        rows = rows + block.down_bias[expert]
    rows = rows * block.topk_weights.view(-1)[gather, None]
    scatter = torch.empty_like(gather)
    scatter[gather] = torch.arange(len(gather), device=gather.device)
    return rows[scatter].view(-1, top_k, rows.shape[1]).sum(1)


def with_loop(block: Block) -> Tensor:
    """Compute the block expert by expert, as the modules of most models do."""
    output = torch.zeros_like(block.hidden_states)
    for expert in range(block.up.shape[0]):
        tokens, slots = torch.where(block.topk_ids == expert)
        up_bias, down_bias = (
            None if bias is None else bias[expert] for bias in (block.up_bias, block.down_bias)
        )
        rows = F.linear(block.hidden_states[tokens], block.up[expert], up_bias)
        rows = F.linear(_activated(rows, block.gated), block.down[expert], down_bias)
        output = output.index_add(0, tokens, rows * block.topk_weights[tokens, slots, None])
    return output


def _activated(rows: Tensor, gated: bool) -> Tensor:
    if not gated:
        return F.silu(rows)
    gate, up = rows.chunk(2, dim=-1)
    return F.silu(gate) * up


# What a block is computed with, by the name in the table; the first is ours.
OURS = "moe_ops"
CONTENDERS: dict[str, Callable[[Block], Tensor]] = {
    OURS: with_moe_ops,
    "grouped_mm": with_grouped_mm,
    "compiled": with_grouped_mm,
    "loop": with_loop,
}

# SPDX-License-Identifier: Apache-2.0
"""Register topk_routing: it returns each token's top_k experts and their weights."""

from __future__ import annotations

from typing import Any

import torch

from moe_ops._core.library import Op, documented
from moe_ops.ops.topk_routing import pytorch

_op = Op("topk_routing")
_op.implement("pytorch", pytorch.topk_routing)
_op.implement("triton", "moe_ops.ops.topk_routing.triton:topk_routing")

_backward_op = Op("topk_routing_backward")
_backward_op.implement("pytorch", pytorch.topk_routing_backward)
_backward_op.implement("triton", "moe_ops.ops.topk_routing.triton:topk_routing_backward")


def _save(ctx: Any, args: tuple[Any, ...], outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, _, _, *scoring, _, _, _, scaling_factor = args
    ctx.save_for_backward(logits, outputs[1])
    ctx.scoring = (*scoring, scaling_factor)


def _backward(ctx: Any, grad_topk_weights: torch.Tensor, _: None) -> tuple[torch.Tensor | None]:
    if not ctx.needs[0]:
        return (None,)
    logits, topk_ids = ctx.saved_tensors
    return (_backward_op.in_backward(grad_topk_weights, logits, topk_ids, *ctx.scoring),)


_op.differentiate(_save, _backward)


@documented
def topk_routing(
    logits: torch.Tensor,
    top_k: int,
    selection_bias: torch.Tensor | None = None,
    score_function: str = "softmax",
    score_before_topk: bool = True,
    renormalize: bool = False,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "top2_sum",
    scaling_factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _op.overload(
        logits,
        top_k,
        selection_bias,
        score_function,
        score_before_topk,
        renormalize,
        num_groups,
        top_groups,
        group_score,
        scaling_factor,
    )

# SPDX-License-Identifier: Apache-2.0
"""Register unpermute: it sums the rows of each token's slots, times their weights."""

from __future__ import annotations

from typing import Any

import torch

from moe_ops._core.library import Op, documented
from moe_ops.ops.unpermute import pytorch

_op = Op("unpermute")
_op.implement("pytorch", pytorch.unpermute)
_op.implement("triton", "moe_ops.ops.unpermute.triton:unpermute")

_backward_op = Op("unpermute_backward")
_backward_op.implement("pytorch", pytorch.unpermute_backward)
_backward_op.implement("triton", "moe_ops.ops.unpermute.triton:unpermute_backward")


def _save(ctx: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
    input, gather_indices, topk_weights, top_k, scatter_indices = args
    # Without weights the backward only copies, and does not need the rows.
    rows = None if topk_weights is None else input
    ctx.save_for_backward(rows, gather_indices, topk_weights, scatter_indices)
    ctx.top_k = top_k


def _backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    input, gather_indices, topk_weights, scatter_indices = ctx.saved_tensors
    if topk_weights is None:
        return (torch.ops.moe.permute(grad_output, gather_indices, ctx.top_k, scatter_indices),)
    needs = [ctx.needs[0], ctx.needs[2]]
    grad_input, grad_topk_weights = _backward_op.in_backward(
        grad_output, input, gather_indices, topk_weights, ctx.top_k, scatter_indices, needs
    )
    return grad_input, None, grad_topk_weights


_op.differentiate(_save, _backward)


@documented
def unpermute(
    input: torch.Tensor,
    gather_indices: torch.Tensor,
    topk_weights: torch.Tensor | None = None,
    top_k: int = 1,
    scatter_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    return _op.overload(input, gather_indices, topk_weights, top_k, scatter_indices)

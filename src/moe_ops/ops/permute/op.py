# SPDX-License-Identifier: Apache-2.0
"""Register permute: it computes out[i] = input[gather_indices[i] // top_k]."""

from __future__ import annotations

from typing import Any

import torch

from moe_ops._core.library import Op, documented
from moe_ops.ops.permute import pytorch

_op = Op("permute")
_op.implement("pytorch", pytorch.permute)
_op.implement("triton", "moe_ops.ops.permute.triton:permute")


def _save(ctx: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
    _, gather_indices, top_k, scatter_indices = args
    ctx.save_for_backward(gather_indices, scatter_indices)
    ctx.top_k = top_k


def _backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor]:
    gather_indices, scatter_indices = ctx.saved_tensors
    grad_input = torch.ops.moe.unpermute(
        grad_output, gather_indices, None, ctx.top_k, scatter_indices
    )
    return (grad_input,)


_op.differentiate(_save, _backward)


@documented
def permute(
    input: torch.Tensor,
    gather_indices: torch.Tensor,
    top_k: int,
    scatter_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    return _op.overload(input, gather_indices, top_k, scatter_indices)

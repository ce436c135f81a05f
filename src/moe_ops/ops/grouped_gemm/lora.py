# SPDX-License-Identifier: Apache-2.0
"""Register grouped_gemm_lora and its gradient: a base product and an adapter's in one call.

Adapters are thin, so what a call costs the host is what they cost beside their base. As one op the two
products and their sum are one call, and their gradients another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops._core.library import Op, is_transposed
from moe_ops.ops.grouped_gemm import pytorch

_op = Op("grouped_gemm_lora")
_forward_op = Op("grouped_gemm_lora_forward")
_backward_op = Op("grouped_gemm_lora_backward")

_TRITON = "moe_ops.ops.grouped_gemm.triton"
for _made, _for_backward in ((_op, False), (_forward_op, True)):
    _made.implement("pytorch", pytorch.grouped_gemm_lora, for_backward=_for_backward)
    _made.implement("triton", f"{_TRITON}:grouped_gemm_lora", for_backward=_for_backward)
_backward_op.implement("pytorch", pytorch.grouped_gemm_lora_backward)
_backward_op.implement("triton", f"{_TRITON}:grouped_gemm_lora_backward")


def _save(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    input, weight, lora_a, lora_b, scaling, token_counts, gather_indices, _, *flags, config = args
    _, need_weight, need_a, need_b, _, _, _, need_bias, *_ = ctx.needs
    _, low_rank = outputs
    ctx.save_for_backward(
        input if need_weight or need_bias or need_a else None,
        low_rank if need_b else None,
        weight,
        lora_a,
        lora_b,
        token_counts,
        gather_indices,
    )
    ctx.scaling, ctx.flags, ctx.config = scaling, flags, config
    ctx.transposed = is_transposed(weight)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, low_rank, weight, lora_a, lora_b, token_counts, gather_indices = ctx.saved_tensors
    need_input, need_weight, need_a, need_b, _, _, _, need_bias, *_ = ctx.needs
    grad_input = grad_weight = grad_a = grad_b = grad_bias = None
    if need_input or need_a or need_b:
        grad_input, grad_a, grad_b = _backward_op.overload(
            grad_output, input if need_a else None, low_rank, weight, lora_a, lora_b, ctx.scaling,
            token_counts, gather_indices, *ctx.flags, [need_input, need_a, need_b], ctx.config,
        )  # fmt: skip
    if need_weight or need_bias:
        grad_weight, grad_bias = torch.ops.moe.grouped_gemm_dw.default(
            grad_output, input, token_counts, gather_indices, None, *ctx.flags,
            [need_weight, need_bias], ctx.transposed, ctx.config,
        )  # fmt: skip
    return grad_input, grad_weight, grad_a, grad_b, None, None, None, grad_bias


_op.differentiate(_save, _backward, forward=_forward_op)


def multiply_adapted(
    input: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, *others: Any
) -> Tensor:
    """Call the op; `others` are its arguments from token_counts on."""
    output: Tensor = _op.overload(input, weight, lora_a, lora_b, scaling, *others)
    return output

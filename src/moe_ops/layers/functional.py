# SPDX-License-Identifier: Apache-2.0
"""A layer of experts composed of single ops, for what moe::fused_experts does not take.

FP8 weights, adapters, activations that no kernel has and norms after the experts all go through
composed_experts; each brings its own projections or activation.

T num_tokens, K top_k, R = T * K routed rows in expert order, E num_experts, H hidden_size,
I intermediate_size, U = 2 * I where gated, else I.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor

from moe_ops._core.checks import dtype_name
from moe_ops._pytorch.activation import ACTIVATIONS, Activation
from moe_ops.fp8 import BLOCK
from moe_ops.ops.grouped_gemm import grouped_gemm
from moe_ops.ops.permute import permute
from moe_ops.ops.routing_indices import routing_indices
from moe_ops.ops.unpermute import unpermute
from moe_ops.quantization import QuantizedWeight

_HERE = "moe_ops.layers.functional"


class Projection(Protocol):
    """One projection of every expert: a product like moe_ops.grouped_gemm with its weight given.

    Rows past the sum of token_counts belong to no expert. They are not read and come out as zero.
    """

    def __call__(
        self,
        input: Tensor,
        *,
        token_counts: Tensor,
        gather_indices: Tensor | None = None,
        topk_weights: Tensor | None = None,
        top_k: int = 1,
        permute_x: bool = False,
        permute_y: bool = False,
    ) -> Tensor:
        """Map rows (M, in_features) to rows (R, out_features), as moe_ops.grouped_gemm does."""


def projection(
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    weight_scale: Tensor | None = None,
    kernel_config: str | None = None,
) -> Projection:
    """Return the product with a weight: grouped_gemm, or where it has scales that of a quantised one.

    Args:
        weight ((E, out_features, in_features), floating or float8_e4m3fn): one matrix per expert, or
            a QuantizedWeight.
        bias ((E, out_features), dtype of weight): added to each row; not with weight_scale. Beside
            a quantised weight it has the dtype of the rows.
        weight_scale ((E, ceil(out_features / 128), ceil(in_features / 128)), float32): the scales of
            a weight in FP8.
        kernel_config: what moe_ops.kernel_config() makes; None chooses by shape.

    Raises:
        ValueError: bias and weight_scale together; a weight or a scale of FP8 that requires grad while
            gradients are recorded.
        TypeError: weight is not FP8 beside weight_scale, or this is not fp32.
    """
    if weight_scale is None:
        return partial(grouped_gemm, weight=weight, bias=bias, kernel_config=kernel_config)
    if bias is not None:
        raise ValueError(
            f"{_HERE}.projection: expected bias=None with weight_scale, got a tensor; "
            "moe_ops.grouped_gemm takes one beside moe_ops.QuantizedWeight.from_fp8_block"
        )
    for name, tensor, dtype in (
        ("weight", weight, torch.float8_e4m3fn),
        ("weight_scale", weight_scale, torch.float32),
    ):
        if tensor.dtype != dtype:
            raise TypeError(
                f"{_HERE}.projection: expected {name}.dtype == {dtype_name(dtype)} beside weight_scale, "
                f"got {dtype_name(tensor.dtype)}; quantise the weight with moe_ops.quantize_fp8"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{_HERE}.projection: expected {name}.requires_grad == False, since a weight in FP8 has "
                "no gradient, got True; call .requires_grad_(False)"
            )
    return partial(_multiply_fp8, cast(Tensor, weight), weight_scale, kernel_config)


def _multiply_fp8(
    weight: Tensor,
    weight_scale: Tensor,
    kernel_config: str | None,
    input: Tensor,
    *,
    token_counts: Tensor,
    gather_indices: Tensor | None = None,
    topk_weights: Tensor | None = None,
    top_k: int = 1,
    permute_x: bool = False,
    permute_y: bool = False,
) -> Tensor:
    """Multiply by a weight in FP8 with the scales of its blocks. The op takes both as bytes."""
    codes, scale = (t.contiguous().view(torch.uint8) for t in (weight, weight_scale))
    output: Tensor = torch.ops.moe.grouped_gemm_quantized.default(
        input, codes, scale, None, None, "fp8_block", BLOCK, "float32", token_counts, gather_indices,
        topk_weights, None, top_k, permute_x, permute_y, kernel_config,
    )  # fmt: skip
    return output


def composed_experts(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    up: Projection,
    activation: Callable[[Tensor], Tensor],
    down: Projection,
    *,
    norm: Callable[[Tensor], Tensor] | None = None,
    weights_before: bool = False,
) -> Tensor:
    """Compute a whole layer of experts from its two projections and what stands between them.

        y[t, k]   = norm(down(activation(up(hidden_states[t]))))   by expert topk_ids[t, k]
        output[t] = sum_k topk_weights[t, k] * y[t, k]

    With weights_before the weights multiply hidden_states[t] instead, and the sum is plain.

    Args:
        hidden_states ((T, H), floating): rows in token order.
        topk_ids ((T, K), int32 or int64): expert of each slot; ids outside [0, num_experts) are
            dropped.
        topk_weights ((T, K), floating): router weight of each slot. That of a dropped slot is not
            read and has a zero gradient; it may be NaN.
        num_experts: E.
        up: from rows of H to rows of U.
        activation: from rows (R, U) to rows (R, I).
        down: from rows of I to rows of H.
        norm: applied to the experts' outputs (R, H), before their weights.
        weights_before: multiply the weights with the experts' input (Llama 4).

    Returns:
        output ((T, H), the dtype of the down projection's output): weighted and summed in fp32.

    Raises:
        ValueError: topk_weights of another shape than topk_ids.
        ValueError, TypeError: from the ops.

    Differentiable in hidden_states, topk_weights and what the callables hold.
    """
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"{_HERE}.composed_experts: expected topk_weights.shape == topk_ids.shape "
            f"{tuple(topk_ids.shape)}, got {tuple(topk_weights.shape)}"
        )
    top_k = topk_ids.shape[-1]
    routing = counts_E, gather_R, scatter_R = routing_indices(topk_ids, num_experts)
    is_dropped_TK = (topk_ids < 0) | (topk_ids >= num_experts)
    weights_TK = topk_weights.masked_fill(is_dropped_TK, 0.0)
    z_RU = _up_projection(up, hidden_states, routing, top_k, weights_TK if weights_before else None)
    y_RH = down(activation(z_RU), token_counts=counts_E)
    if norm is not None:
        # A norm may turn the zero rows of dropped slots into anything: a bias, or NaN without eps. In
        # their place it gets rows of 1, 2, 1, 2..., where its derivative is finite.
        is_dropped_R = torch.arange(topk_ids.numel(), device=topk_ids.device) >= counts_E.sum()
        filler_H = (1 + torch.arange(y_RH.shape[1], device=y_RH.device) % 2).to(y_RH.dtype)
        y_RH = norm(torch.where(is_dropped_R[:, None], filler_H, y_RH))
        y_RH = y_RH.masked_fill(is_dropped_R[:, None], 0.0)
    return unpermute(y_RH, gather_R, None if weights_before else weights_TK, top_k, scatter_R)


def flattened(
    hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (..., H) and twice (..., K) with one row for each token: (T, H), (T, K), (T, K)."""
    top_k = topk_ids.shape[-1]
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
    return tokens, topk_ids.reshape(-1, top_k), topk_weights.reshape(-1, top_k)


def in_shape_of(hidden_states: Tensor, output: Tensor) -> Tensor:
    """Return an output (T, H) in the shape (..., H) of the hidden states.

    Where that is its shape already, it is no view of itself: an output that is a view cannot be changed
    in place under FSDP2.
    """
    same = output.shape == hidden_states.shape
    return output if same else output.reshape(hidden_states.shape)


def _up_projection(
    up: Projection,
    hidden_states: Tensor,
    routing: tuple[Tensor, Tensor, Tensor],
    top_k: int,
    weights_TK: Tensor | None,
) -> Tensor:
    """Return z (R, U). Weights that are given multiply its input."""
    counts_E, gather_R, scatter_R = routing
    if weights_TK is None:
        return up(
            hidden_states,
            token_counts=counts_E,
            gather_indices=gather_R,
            top_k=top_k,
            permute_x=True,
        )
    rows_RH = permute(hidden_states, gather_R, top_k, scatter_R)
    weights_R1 = permute(weights_TK.reshape(-1, 1), gather_R, 1, scatter_R)
    return up((rows_RH * weights_R1).to(rows_RH.dtype), token_counts=counts_E)


def named_activation(
    function: str, name: str, *, gated: bool, interleaved: bool, limit: float | None
) -> Callable[[Tensor], Tensor]:
    """Return one of moe::fused_experts' activations, from rows (R, U) to rows (R, I).

    Args:
        function: what the errors say was called.
        name: "silu", "gelu", "gelu_tanh", "relu", "relu_squared" or "swiglu_oai".
        gated: whether the activation of one half of the row multiplies the other half.
        interleaved: whether gate and up take turns in the row.
        limit: clamps gate and up before the activation.

    Raises:
        ValueError: an unknown name; swiglu_oai without gated; a limit that is not positive.
    """
    if name not in ACTIVATIONS:
        raise ValueError(
            f"{function}: expected activation to be one of {', '.join(ACTIVATIONS)}, got {name!r}"
        )
    if name == "swiglu_oai" and not gated:
        raise ValueError(
            f"{function}: expected gated=True with swiglu_oai, got False; it multiplies by up"
        )
    if limit is not None and not limit > 0:
        raise ValueError(
            f"{function}: expected activation_limit > 0, got {limit}; pass None for no limit"
        )
    return Activation(name, gated, interleaved, limit).apply

# SPDX-License-Identifier: Apache-2.0
"""LoRA on experts without merged weights: two thin grouped GEMMs beside each frozen one.

T num_tokens, H hidden_size, I intermediate_size, E num_experts, K top_k, R = T * K routed rows,
r rank, U = 2 * I where gated, else I.

For a row x of expert e,

    y = base(x) + scaling * (x @ lora_A[e].T) @ lora_B[e].T

The base weight stays as it is, so a frozen one gets no gradient GEMM and no gradient tensor, and
nothing of the size of the weight is kept between the passes. It may be a moe_ops.QuantizedWeight of any
format, or FP8 with a scale for each block of 128 x 128 weights (moe_ops.quantize_fp8).

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_ops.layers.functional import composed_experts, named_activation, projection
from moe_ops.ops.fused_experts_lora import adapted_experts, adapted_quantized_experts
from moe_ops.ops.grouped_gemm import grouped_gemm
from moe_ops.quantization import QuantizedWeight

_HERE = "moe_ops.layers.lora"


class LoraWeights(NamedTuple):
    """One adapter of one projection of every expert.

    lora_A (num_experts, rank, in_features), lora_B (num_experts, out_features, rank), in any strides
    and any floating dtype. An expert's delta weight is scaling * lora_B[e] @ lora_A[e].
    """

    lora_A: Tensor  # noqa: N815
    lora_B: Tensor  # noqa: N815
    scaling: float


def lora_grouped_gemm(
    input: Tensor,
    weight: Tensor | QuantizedWeight,
    token_counts: Tensor,
    adapters: Sequence[LoraWeights],
    gather_indices: Tensor | None = None,
    topk_weights: Tensor | None = None,
    bias: Tensor | None = None,
    top_k: int = 1,
    permute_x: bool = False,
    permute_y: bool = False,
    dropout_p: float = 0.0,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """Multiply each expert's rows by its weight, and add what the adapters say.

        y[i] = topk_weights[i] * (x[i] @ weight[e].T + bias[e]
                                  + sum over adapters of scaling * (x[i] @ lora_A[e].T) @ lora_B[e].T)

    Rows are gathered, weighted and stored as moe_ops.grouped_gemm does it: the first thin GEMM gathers
    as the base does (permute_x), the second one weights and scatters (permute_y), so that the sum is
    of the same rows.

    Args:
        input ((M, in_features), floating): rows in token order with permute_x, else in expert order.
        weight ((num_experts, out_features, in_features), dtype of input or float8_e4m3fn): the base
            weight, or a QuantizedWeight. A tensor in FP8 comes with its weight_scale.
        token_counts ((num_experts,), index): rows of each expert.
        adapters: LoraWeights that are added up; they are multiplied in the dtype of weight, or of
            input where the weight is quantised. With none of them this is moe_ops.grouped_gemm, or
            moe::grouped_gemm_quantized.
        gather_indices ((R,), index): slot of each row in expert order.
        topk_weights ((R / top_k, top_k), floating): router weight of each slot.
        bias ((num_experts, out_features), dtype of weight): bias of the base. Beside a quantised
            weight it has the dtype of input.
        top_k: slots of a token.
        permute_x: gather the rows of input through gather_indices.
        permute_y: store the rows of output through gather_indices.
        dropout_p: probability with which an element of the adapters' input is zero, the others being
            divided by 1 - dropout_p. With permute_x all slots of a token see the same zeros.
        weight_scale ((num_experts, ceil(out_features / 128), ceil(in_features / 128)), float32): the
            scales of a weight in FP8.

    Returns:
        output ((R, out_features), dtype of input): R = M * top_k with permute_x, else M.

    Raises:
        ValueError: an adapter's shape does not fit weight; dropout_p is not in [0, 1); bias and
            weight_scale together; what moe_ops.grouped_gemm refuses.
        TypeError: a dtype that these refuse, such as that of a weight quantised otherwise.

    Differentiable in input, weight, topk_weights, bias and the adapters, but for a quantised weight. A
    gradient that nobody asks for costs no GEMM. Deterministic but for the dropout.
    """
    check_dropout("lora_grouped_gemm", "dropout_p", dropout_p)
    for adapter in adapters:
        _check(adapter, weight)
    base = projection(weight, bias, weight_scale)
    routing: dict[str, Any] = {
        "token_counts": token_counts,
        "gather_indices": gather_indices,
        "top_k": top_k,
    }
    output = base(
        input, **routing, topk_weights=topk_weights, permute_x=permute_x, permute_y=permute_y
    )
    is_plain = weight_scale is None and isinstance(weight, Tensor)
    dtype = weight.dtype if is_plain else input.dtype
    for adapter in adapters:
        x = F.dropout(input, dropout_p) if dropout_p else input
        low_rank = grouped_gemm(x, adapter.lora_A.to(dtype), **routing, permute_x=permute_x)
        # The scale goes to the narrow tensor, whose gradient is as narrow. PEFT's lora_B has the experts
        # fastest: copied, it is read by descriptors.
        delta = grouped_gemm(
            low_rank * adapter.scaling,
            adapter.lora_B.to(dtype).contiguous(),
            **routing,
            topk_weights=topk_weights,
            permute_y=permute_y,
        )
        output = output + delta
    return output


def lora_experts(
    hidden_states: Tensor,
    gate_up_proj: Tensor | QuantizedWeight,
    down_proj: Tensor | QuantizedWeight,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_lora: Sequence[LoraWeights] = (),
    down_lora: Sequence[LoraWeights] = (),
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str | Callable[[Tensor], Tensor] = "silu",
    gated: bool = True,
    interleaved: bool = False,
    activation_limit: float | None = None,
    dropout_p: float = 0.0,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:
    """Compute a whole layer of experts with adapters on one or both of its projections.

        z         = lora(x[t], gate_up_proj[e]) + gate_up_bias[e]    for each slot (t, k), e = topk_ids[t, k]
        output[t] = sum_k topk_weights[t, k] * (lora(act(z), down_proj[e]) + down_bias[e])

    Args:
        hidden_states ((T, H), floating): rows in token order.
        gate_up_proj ((E, U, H), dtype of hidden_states, or float8_e4m3fn): the frozen up projection,
            or a QuantizedWeight.
        down_proj ((E, H, I), dtype of hidden_states, or float8_e4m3fn): the frozen down projection,
            or a QuantizedWeight.
        topk_ids ((T, K), int32 or int64): expert of each slot; ids outside [0, E) are dropped.
        topk_weights ((T, K), floating): router weight of each slot.
        gate_up_lora: adapters of gate_up_proj, lora_A (E, r, H) and lora_B (E, U, r).
        down_lora: adapters of down_proj, lora_A (E, r, I) and lora_B (E, H, r).
        gate_up_bias ((E, U), dtype of hidden_states): bias of the up projection.
        down_bias ((E, H), dtype of hidden_states): bias of the down projection.
        activation: one of those that moe_ops.fused_experts knows, or a function from z (R, U) to
            the input (R, I) of the down projection. A function is called as it is: gated,
            interleaved and activation_limit are for the names.
        gated: whether the activation of one half of z multiplies the other.
        interleaved: whether gate and up take turns in z.
        activation_limit: clamps gate and up before the activation.
        dropout_p: as lora_grouped_gemm has it, for both projections.
        gate_up_scale ((E, ceil(U / 128), ceil(H / 128)), float32): the scales of gate_up_proj in FP8.
        down_scale ((E, ceil(H / 128), ceil(I / 128)), float32): the scales of down_proj in FP8.

    Returns:
        output ((T, H), dtype of hidden_states).

    Raises:
        ValueError: an unknown activation; what lora_grouped_gemm and the ops refuse.
        TypeError: a dtype that the ops refuse.

    Differentiable in hidden_states, topk_weights, the adapters, and the projections and biases if
    they require it (a quantised projection cannot). Deterministic but for the dropout.

    Frozen projections, both plain or both quantised, with an adapter on one or each, a named activation
    and no dropout are one op, moe::fused_experts_lora or moe::fused_experts_lora_quantized. Other layers
    are composed of products, each adapter of two: several adapters on a projection or none on both,
    a base that is trained, FP8 with its scales apart.
    """
    check_dropout("lora_experts", "dropout_p", dropout_p)
    frozen = (gate_up_proj, down_proj, gate_up_bias, down_bias)
    num_quantized = sum(isinstance(weight, QuantizedWeight) for weight in frozen)
    is_one_op = (
        isinstance(activation, str)
        and gate_up_scale is None
        and down_scale is None
        and not dropout_p
        and max(len(gate_up_lora), len(down_lora)) == 1
        and num_quantized in (0, 2)
        and not (torch.is_grad_enabled() and any(map(_requires_grad, frozen)))
    )
    if is_one_op:
        factors = (
            *_factors(gate_up_lora, gate_up_proj, hidden_states),
            *_factors(down_lora, down_proj, hidden_states),
        )
        call: Callable[..., Tensor] = (
            adapted_quantized_experts if num_quantized else adapted_experts
        )
        return call(
            hidden_states, gate_up_proj, down_proj, topk_ids, topk_weights, *factors, gate_up_bias,
            down_bias, activation, gated, interleaved, activation_limit,
        )  # fmt: skip
    if not callable(activation):
        activation = named_activation(
            f"{_HERE}.lora_experts",
            activation,
            gated=gated,
            interleaved=interleaved,
            limit=activation_limit,
        )
    up = partial(lora_grouped_gemm, weight=gate_up_proj, adapters=gate_up_lora, bias=gate_up_bias)
    down = partial(lora_grouped_gemm, weight=down_proj, adapters=down_lora, bias=down_bias)
    return composed_experts(
        hidden_states,
        topk_ids,
        topk_weights,
        gate_up_proj.shape[0],
        up=partial(up, weight_scale=gate_up_scale, dropout_p=dropout_p),
        activation=activation,
        down=partial(down, weight_scale=down_scale, dropout_p=dropout_p),
    )


def _requires_grad(weight: Tensor | QuantizedWeight | None) -> bool:
    return weight is not None and weight.requires_grad


def _factors(
    adapters: Sequence[LoraWeights], weight: Tensor | QuantizedWeight, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Return lora_A and the scaled lora_B as the ops take them: no adapter has rank 0.

    The factors get the dtype of a plain weight, or beside a quantised one that of `like`, the input.
    """
    if not adapters:
        num_experts, out_features, in_features = weight.shape
        lora_a = like.new_empty(num_experts, 0, in_features)
        return lora_a, like.new_empty(num_experts, out_features, 0)
    (adapter,) = adapters
    _check(adapter, weight)
    dtype = weight.dtype if isinstance(weight, Tensor) else like.dtype
    # The factor goes to a weight, so that another one is no other graph. PEFT's lora_B has the experts
    # fastest: copied, its rows are read in one piece.
    lora_b = (adapter.lora_B * adapter.scaling).to(dtype).contiguous()
    return adapter.lora_A.to(dtype), lora_b


def check_dropout(function: str, name: str, probability: float) -> None:
    """Raise a ValueError where a dropout probability is outside [0, 1)."""
    if not 0.0 <= probability < 1.0:
        raise ValueError(
            f"{_HERE}.{function}: expected 0 <= {name} < 1, got {probability}; 0 is no dropout"
        )


def _check(adapter: LoraWeights, weight: Tensor | QuantizedWeight) -> None:
    if not isinstance(adapter, LoraWeights):
        raise TypeError(
            f"{_HERE}.lora_grouped_gemm: expected adapters to be a sequence of LoraWeights, got "
            f"{type(adapter).__name__} in it; pass [adapter] for one"
        )
    for name in ("lora_A", "lora_B"):
        if not (factor := getattr(adapter, name)).is_floating_point():
            raise TypeError(
                f"{_HERE}.lora_grouped_gemm: expected a floating {name}.dtype, got {factor.dtype}"
            )
    num_experts, out_features, in_features = weight.shape
    a, b = tuple(adapter.lora_A.shape), tuple(adapter.lora_B.shape)
    if len(a) != 3 or a[1] < 1 or (a[0], a[2]) != (num_experts, in_features):
        raise ValueError(
            f"{_HERE}.lora_grouped_gemm: expected lora_A.shape == "
            f"(num_experts, rank, in_features) ({num_experts}, rank, {in_features}), got {a}"
        )
    if b != (num_experts, out_features, a[1]):
        raise ValueError(
            f"{_HERE}.lora_grouped_gemm: expected lora_B.shape == "
            f"(num_experts, out_features, rank) ({num_experts}, {out_features}, {a[1]}), got {b}"
        )

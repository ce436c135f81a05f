# SPDX-License-Identifier: Apache-2.0
"""The routed ops in fp64 on whole tensors, for sizes at which the oracle's loops take too long.

On any device, differentiable by torch's autograd; test_reference.py holds it against the oracle.

T tokens, K top_k, R = T * K rows, E experts, D in_features, N out_features, H hidden size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROUTINGS = ("uniform", "zipf", "hot_and_empty", "dropped", "all_dropped")


def route(
    routing: str, num_tokens: int, num_experts: int, top_k: int, device: torch.device, seed: int = 0
) -> Tensor:
    """topk_ids (T, K), int32, distinct within a token but for those that are dropped.

    uniform: all experts equally likely. zipf: expert e with probability ~ 1 / (e + 1).
    hot_and_empty: the first expert gets a slot of every token, the last one none. dropped: a fifth
    of the slots holds -1, E or an id far past E. all_dropped: all of them do.
    """
    generator = torch.Generator(device).manual_seed(seed)
    likelihood = torch.ones(num_tokens, num_experts, device=device)
    if routing == "zipf":
        likelihood /= torch.arange(1, num_experts + 1, device=device)
    # The top_k largest of log(u) / p are a draw without replacement.
    noise = torch.rand(num_tokens, num_experts, generator=generator, device=device)
    keys = noise.clamp_min(1e-30).log() / likelihood
    if routing == "hot_and_empty":
        keys[:, 0] = 0
        if num_experts > top_k:
            keys[:, -1] = float("-inf")
    ids = keys.topk(top_k, 1).indices
    if routing in {"dropped", "all_dropped"}:
        sentinels = torch.tensor([-1, num_experts, num_experts + 1000], device=device)
        choice = torch.randint(0, 3, ids.shape, generator=generator, device=device)
        drop = torch.rand(ids.shape, generator=generator, device=device) < 0.2
        ids = torch.where(drop | (routing == "all_dropped"), sentinels[choice], ids)
    elif routing not in ROUTINGS:
        raise ValueError(f"unknown routing {routing!r}")
    return ids.int()


def routing_indices(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """topk_ids (T, K) -> token_counts (E,), gather_indices (R,), scatter_indices (R,)."""
    ids = topk_ids.reshape(-1).long()
    keys = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    gather = torch.argsort(keys, stable=True)
    counts = torch.bincount(keys, minlength=num_experts + 1)[:num_experts]
    scatter = torch.empty_like(gather)
    scatter[gather] = torch.arange(gather.numel(), device=gather.device)
    return counts.int(), gather.int(), scatter.int()


def permute(
    input: Tensor, gather_indices: Tensor, top_k: int, scatter_indices: Tensor | None = None
) -> Tensor:
    return input.double()[gather_indices.long() // top_k]


def unpermute(
    input: Tensor,
    gather_indices: Tensor,
    topk_weights: Tensor | None = None,
    top_k: int = 1,
    scatter_indices: Tensor | None = None,
) -> Tensor:
    slots = torch.zeros_like(input, dtype=torch.float64)
    slots = slots.index_copy(0, gather_indices.long(), input.double())
    slots = slots.view(-1, top_k, input.shape[1])
    if topk_weights is not None:
        slots = slots * topk_weights.double()[:, :, None]
    return slots.sum(1)


def grouped_gemm(
    input: Tensor,
    weight: Tensor,
    token_counts: Tensor,
    gather_indices: Tensor | None = None,
    topk_weights: Tensor | None = None,
    bias: Tensor | None = None,
    top_k: int = 1,
    permute_x: bool = False,
    permute_y: bool = False,
    kernel_config: str | None = None,
) -> Tensor:
    num_rows = input.shape[0] * top_k if permute_x else input.shape[0]
    counts = token_counts.tolist()
    # Only these rows: what the tail holds, NaN perhaps, is no part of anything.
    slots = torch.arange(num_rows, device=input.device)
    slots = (slots if gather_indices is None else gather_indices.long())[: sum(counts)]
    x = input.double()
    x = x[slots // top_k] if permute_x else x[: len(slots)]
    products = [
        rows @ weight[e].double().T + (0 if bias is None else bias[e].double())
        for e, rows in enumerate(x.split(counts))
    ]
    y = torch.cat(products)
    if topk_weights is not None:
        y = y * topk_weights.double().reshape(-1)[slots, None]
    target = slots if permute_y else torch.arange(len(slots), device=input.device)
    return y.new_zeros(num_rows, y.shape[1]).index_copy(0, target, y)


def grouped_gemm_fp8(
    input: Tensor, weight: Tensor, weight_scale: Tensor, token_counts: Tensor, **others: Any
) -> Tensor:
    _, out_features, in_features = weight.shape
    scale = weight_scale.double().repeat_interleave(128, 1).repeat_interleave(128, 2)
    dequantised = weight.double() * scale[:, :out_features, :in_features]
    return grouped_gemm(input, dequantised, token_counts, **others)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as it is in `dtype`, where the op rounds: on which side of a kink it lies."""
    return x + (x.to(dtype).double() - x).detach()


def _act(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(x)
    if activation == "swiglu_oai":
        return x * torch.sigmoid(1.702 * x)
    if activation == "relu":
        return F.relu(x)
    if activation == "relu_squared":
        return F.relu(x) ** 2
    return F.gelu(x, approximate={"gelu": "none", "gelu_tanh": "tanh"}[activation])


def fused_experts(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    activation_limit: float | None = None,
    weights_before: bool = False,
    recompute: str = "none",
    kernel_config: str | None = None,
    rounds_to: torch.dtype = torch.float64,
) -> Tensor:
    """With the pre-activation, and rows that are weighted before, rounded to `rounds_to`."""
    z, slots, counts, scale = _pre_activation(
        hidden_states, gate_up_proj, topk_ids, topk_weights, gate_up_bias, weights_before, rounds_to
    )
    gate, up = _parts(_rounded(z, rounds_to), gated, interleaved)
    if activation_limit is not None:
        gate = gate.clamp(max=activation_limit)
        up = up.clamp(-activation_limit, activation_limit)
    h = _act(gate, activation)
    if gated:
        h = h * (up + 1 if activation == "swiglu_oai" else up)
    y = grouped_gemm(h, down_proj, counts, bias=down_bias)
    if not weights_before:
        y = y * scale
    output = torch.zeros_like(hidden_states, dtype=torch.float64)
    return output.index_add(0, slots // topk_ids.shape[1], y)


def tokens_at_kinks(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    activation_limit: float | None = None,
    weights_before: bool = False,
    *,
    rounds_to: torch.dtype,
    distance: float,
    **others: object,
) -> Tensor:
    """Tokens of which a pre-activation, off by `distance` before it is rounded, changes sides.

    There the gradient jumps: it depends on the order in which a product was summed up. `others` are
    arguments of fused_experts that have no say in it.
    """
    z, slots, _, _ = _pre_activation(
        hidden_states, gate_up_proj, topk_ids, topk_weights, gate_up_bias, weights_before, rounds_to
    )

    def sides(z: Tensor) -> Tensor:
        gate, up = _parts(z.to(rounds_to).double(), gated, interleaved)
        found = [gate > 0] if activation == "relu" else []
        if activation_limit is not None:
            found += [gate > activation_limit, up > activation_limit, up < -activation_limit]
        return torch.cat([z.new_zeros(len(z), 1, dtype=torch.bool), *found], 1)

    changes = (sides(z - distance) != sides(z + distance)).any(1)
    tokens = hidden_states.new_zeros(len(hidden_states), dtype=torch.bool)
    tokens[slots[changes] // topk_ids.shape[1]] = True
    return tokens


def _pre_activation(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_bias: Tensor | None,
    weights_before: bool,
    rounds_to: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z of the rows that experts have, their slots, the rows of each expert, the slots' weights."""
    top_k = topk_ids.shape[1]
    counts, gather, _ = routing_indices(topk_ids, gate_up_proj.shape[0])
    slots = gather[: int(counts.sum())].long()
    x = hidden_states.double()[slots // top_k]
    scale = topk_weights.double().reshape(-1)[slots, None]
    if weights_before:
        x = _rounded(x * scale, rounds_to)
    return grouped_gemm(x, gate_up_proj, counts, bias=gate_up_bias), slots, counts, scale


def _parts(z: Tensor, gated: bool, interleaved: bool) -> tuple[Tensor, Tensor]:
    """gate and up; z twice where it is not gated."""
    if not gated:
        return z, z
    gate, up = (z[:, 0::2], z[:, 1::2]) if interleaved else z.chunk(2, 1)
    return gate, up

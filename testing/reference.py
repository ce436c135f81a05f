# SPDX-License-Identifier: Apache-2.0
"""Computes every op in fp64 on whole tensors, for sizes at which the oracle's loops take too long.

The functions run on any device and are differentiable by torch's autograd. They share no code with
moe_ops, nor with the oracle, which tests/gpu/test_reference.py holds them against.

T tokens, K top_k, R = T * K rows, E experts, D in_features, N out_features, H hidden size,
I intermediate size, U = 2 * I where gated, else I.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

ROUTINGS = ("uniform", "zipf", "hot_and_empty", "dropped", "all_dropped")


def route(
    routing: str, num_tokens: int, num_experts: int, top_k: int, device: torch.device, seed: int = 0
) -> Tensor:
    """Return topk_ids (T, K), int32, distinct within a token but for those that are dropped.

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
    """Return token_counts (E,), gather_indices (R,), scatter_indices (R,) of topk_ids (T, K)."""
    ids = topk_ids.reshape(-1).long()
    keys = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    gather = torch.argsort(keys, stable=True)
    counts = torch.bincount(keys, minlength=num_experts + 1)[:num_experts]
    scatter = torch.empty_like(gather)
    scatter[gather] = torch.arange(gather.numel(), device=gather.device)
    return counts.int(), gather.int(), scatter.int()


def selection_keys(
    logits: Tensor, selection_bias: Tensor | None, score_function: str, score_before_topk: bool
) -> Tensor:
    """Return the keys (T, E) that topk_routing ranks experts by."""
    keys = logits.double()
    if score_before_topk:
        keys = _scores(keys, score_function)
    return keys if selection_bias is None else keys + selection_bias.double()


def routing_weights(
    logits: Tensor,
    topk_ids: Tensor,
    score_function: str,
    score_before_topk: bool,
    renormalize: bool,
    scaling_factor: float,
) -> Tensor:
    """Return the topk_weights (T, K) of topk_routing for given topk_ids (T, K)."""
    logits, ids = logits.double(), topk_ids.long()
    if score_before_topk:
        weights = _scores(logits, score_function).gather(1, ids)
    else:
        weights = _scores(logits.gather(1, ids), score_function)
    if renormalize:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return scaling_factor * weights


def _scores(logits: Tensor, score_function: str) -> Tensor:
    return logits.softmax(1) if score_function == "softmax" else logits.sigmoid()


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


def merged(weight: Tensor, adapters: Iterable[tuple[Tensor, Tensor, float]]) -> Tensor:
    """Return the weight (E, N, D) with LoRA's adapters (lora_A, lora_B, scaling) added to it."""
    total = weight.double()
    for lora_a, lora_b, scaling in adapters:
        total = total + scaling * lora_b.double() @ lora_a.double()
    return total


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x as it is in `dtype`, where the op rounds: this says on which side of a kink it lies."""
    if dtype == torch.float64:
        return x
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
    """Return the output (T, H), with what the op keeps in its dtype rounded to `rounds_to`.

    That is the pre-activation, and with weights_before the weighted rows.
    """
    z, slots, counts, scale = _pre_activation(
        hidden_states, gate_up_proj, topk_ids, topk_weights, gate_up_bias, weights_before, rounds_to
    )
    gate, up = _parts(_rounded(z, rounds_to), gated, interleaved)
    if activation_limit is not None:
        # At the limit itself clamp's gradient is 1 up to torch 2.13 and 0 from 2.14 on; ours is 1.
        limit = torch.tensor(activation_limit, dtype=gate.dtype, device=gate.device)
        gate = torch.where(gate > limit, limit, gate)
        up = torch.where(up.abs() > limit, limit * up.sign(), up)
    h = _act(gate, activation)
    if gated:
        h = h * (up + 1 if activation == "swiglu_oai" else up)
    y = grouped_gemm(h, down_proj, counts, bias=down_bias)
    if not weights_before:
        y = y * scale
    output = torch.zeros_like(hidden_states, dtype=torch.float64)
    return output.index_add(0, slots // topk_ids.shape[1], y)


def experts_step(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    grad_output: Tensor,
    parameters: Sequence[Tensor],
    grad_parameters: Sequence[Tensor],
    projections: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return fused_experts and its gradients, with the fp64 tensors of one expert at a time.

    So whole models fit. The experts are gated, with silu.

    Args:
        hidden_states (T, H), topk_ids (T, K), topk_weights (T, K): as of fused_experts.
        grad_output (T, H): the gradient of the output.
        parameters: tensors (E, ...) that the weights are made of.
        grad_parameters: as many tensors of the same shapes. Their gradients are written here.
        projections: from an expert and its slices of `parameters`, in fp64, to its gate_up_proj
            (2I, H) and down_proj (H, I).

    Returns:
        tuple: the output, and the gradients of hidden_states and topk_weights, in fp64.
    """
    num_experts, top_k = len(parameters[0]), topk_ids.shape[1]
    weights = topk_weights.detach().reshape(-1)
    output = torch.zeros_like(hidden_states, dtype=torch.float64)
    grad_hidden = torch.zeros_like(output)
    grad_weights = torch.zeros_like(weights, dtype=torch.float64)
    counts, gather, _ = routing_indices(topk_ids, num_experts)
    for e, slots in enumerate(gather[: int(counts.sum())].long().split(counts.tolist())):
        tokens = slots // top_k
        given = (hidden_states.detach()[tokens], weights[slots, None])
        own = (p.detach()[e] for p in parameters)
        leaves = [tensor.double().requires_grad_() for tensor in (*given, *own)]
        gate_up, down = projections(e, *leaves[2:])
        only_expert = slots.new_zeros(len(slots), 1)
        rows = fused_experts(leaves[0], gate_up[None], down[None], only_expert, leaves[1])
        grads = torch.autograd.grad(rows, leaves, grad_output[tokens].double())
        output.index_add_(0, tokens, rows.detach())
        grad_hidden.index_add_(0, tokens, grads[0])
        grad_weights[slots] = grads[1][:, 0]
        for into, grad in zip(grad_parameters, grads[2:], strict=True):
            into[e] = grad
    return output, grad_hidden, grad_weights.view_as(topk_weights)


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
    """Return which tokens (T,) have a pre-activation within `distance` of a kink.

    Their gradients jump: these depend on the order in which a product was summed up. `others` are
    arguments of fused_experts that do not matter here.
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
    """Return z of the experts' rows, their slots, the rows of each expert, the slots' weights."""
    top_k = topk_ids.shape[1]
    counts, gather, _ = routing_indices(topk_ids, gate_up_proj.shape[0])
    slots = gather[: int(counts.sum())].long()
    x = hidden_states.double()[slots // top_k]
    scale = topk_weights.double().reshape(-1)[slots, None]
    if weights_before:
        x = _rounded(x * scale, rounds_to)
    return grouped_gemm(x, gate_up_proj, counts, bias=gate_up_bias), slots, counts, scale


def _parts(z: Tensor, gated: bool, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return gate and up; z twice where it is not gated."""
    if not gated:
        return z, z
    gate, up = (z[:, 0::2], z[:, 1::2]) if interleaved else z.chunk(2, 1)
    return gate, up

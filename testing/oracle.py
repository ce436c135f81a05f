# SPDX-License-Identifier: Apache-2.0
"""The judge of numbers: every op as plain loops in fp64.

Nothing of moe_ops is imported here, and nothing is fast: a reader should be able to hold each
function against the op's contract and see that they agree. Floating tensors are brought to fp64
first, with their autograd history, so `torch.autograd.grad` through a function of this file is
the reference for the op's gradients.

Letters in shapes: T tokens, K top_k, R = T*K routed rows, E experts, M rows of a GEMM's input,
D and N the GEMM's inner and outer width, H hidden size, I intermediate size, U = 2*I where gated,
else I, G groups of experts.
A slot is t*K + k: choice k of token t. Expert order is the rows grouped by expert, in slot order
within an expert, dropped slots last.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ROUTINGS = ("uniform", "hot", "empty", "dropped", "all_dropped", "every_expert")


def to_fp64(*tensors: Tensor | None) -> Any:
    """Each tensor in fp64, None staying None; one alone comes back as itself."""
    converted = [None if tensor is None else tensor.to(torch.float64) for tensor in tensors]
    return converted[0] if len(converted) == 1 else converted


def highest(values: list[float], count: int) -> list[int]:
    """Positions of the `count` highest values, highest first; of equals the lower position."""
    return sorted(range(len(values)), key=lambda position: (-values[position], position))[:count]


def scores_of(logits: Tensor, score_function: str) -> Tensor:
    """Scores of one token's logits (1-D)."""
    if score_function == "softmax":
        exponentials = torch.exp(logits - logits.max().detach())
        return exponentials / exponentials.sum()
    if score_function == "sigmoid":
        return torch.sigmoid(logits)
    raise ValueError(f"unknown score_function {score_function!r}")


def selection_keys(
    logits: Tensor, selection_bias: Tensor | None, score_function: str, score_before_topk: bool
) -> list[float]:
    """What one token's experts are ranked by: the scores, or the logits, plus the bias.

    One number at a time, so that equal logits have equal scores to the last bit.
    """
    keys = logits.tolist()
    if score_before_topk and score_function == "softmax":
        exponentials = [math.exp(logit - max(keys)) for logit in keys]
        keys = [exponential / sum(exponentials) for exponential in exponentials]
    elif score_before_topk:
        keys = [1 / (1 + math.exp(-logit)) for logit in keys]
    if selection_bias is not None:
        keys = [key + bias for key, bias in zip(keys, selection_bias.tolist(), strict=True)]
    return keys


def group_leaders(keys: list[float], num_groups: int, group_score: str) -> list[list[float]]:
    """The keys that each group of neighbouring experts is judged by, highest first."""
    group_size = len(keys) // num_groups
    num_leaders = {"max": 1, "top2_sum": 2}[group_score]
    return [
        sorted(keys[group * group_size : (group + 1) * group_size], reverse=True)[:num_leaders]
        for group in range(num_groups)
    ]


def select_experts(
    keys: list[float], top_k: int, num_groups: int, top_groups: int, group_score: str
) -> list[int]:
    """The ids of one token's experts, highest key first, from the best groups alone."""
    group_size = len(keys) // num_groups
    group_scores = [sum(leaders) for leaders in group_leaders(keys, num_groups, group_score)]
    best_groups = highest(group_scores, top_groups)
    allowed = [expert for expert in range(len(keys)) if expert // group_size in best_groups]
    return [allowed[place] for place in highest([keys[e] for e in allowed], top_k)]


def selection_gap(
    keys: list[float], top_k: int, num_groups: int, top_groups: int, group_score: str
) -> float:
    """The smallest difference that one token's selection rests on.

    An implementation in lower precision must agree on the ids where this is well above its
    rounding. Equal keys are no gap, for their order is decided by id; groups of equal scores are
    none if the same keys make the score, for another sum may round to another side.
    """
    group_size = len(keys) // num_groups
    leaders = group_leaders(keys, num_groups, group_score)
    best_groups = highest([sum(values) for values in leaders], top_groups)
    allowed = [key for expert, key in enumerate(keys) if expert // group_size in best_groups]
    gaps = [math.inf]
    if top_groups < num_groups:
        last = sorted(leaders, key=sum)[-top_groups]
        gaps += [abs(sum(values) - sum(last)) for values in leaders if values != last]
    for first, second in itertools.pairwise(sorted(allowed, reverse=True)[: top_k + 1]):
        if first != second:
            gaps.append(first - second)
    return min(gaps)


def weights_of(
    logits: Tensor,
    ids: list[int],
    score_function: str,
    score_before_topk: bool,
    renormalize: bool,
    scaling_factor: float,
) -> Tensor:
    """One token's weights (K,) for the experts `ids` that it chose."""
    if score_before_topk:
        weights = scores_of(logits, score_function)[ids]
    else:
        weights = scores_of(logits[ids], score_function)
    if renormalize:
        weights = weights / (weights.sum() + 1e-20)
    return weights * scaling_factor


def routing_weights(
    logits: Tensor,
    topk_ids: Tensor,
    score_function: str,
    score_before_topk: bool,
    renormalize: bool,
    scaling_factor: float,
) -> Tensor:
    """topk_weights (T, K) for given topk_ids (T, K)."""
    logits = to_fp64(logits)
    rows = [
        weights_of(
            logits[token], ids, score_function, score_before_topk, renormalize, scaling_factor
        )
        for token, ids in enumerate(topk_ids.tolist())
    ]
    return torch.stack(rows) if rows else logits.sum() * logits.new_zeros(topk_ids.shape)


def topk_routing(
    logits: Tensor,
    top_k: int,
    selection_bias: Tensor | None = None,
    score_function: str = "softmax",
    score_before_topk: bool = True,
    renormalize: bool = False,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "top2_sum",
    scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """logits (T, E) -> topk_weights (T, K), topk_ids (T, K)."""
    logits, selection_bias = to_fp64(logits, selection_bias)
    ids = [
        select_experts(
            selection_keys(token_logits, selection_bias, score_function, score_before_topk),
            top_k,
            num_groups,
            top_groups,
            group_score,
        )
        for token_logits in logits
    ]
    topk_ids = torch.tensor(ids, dtype=torch.int32).reshape(len(ids), top_k)
    topk_weights = routing_weights(
        logits, topk_ids, score_function, score_before_topk, renormalize, scaling_factor
    )
    return topk_weights, topk_ids


def routing_indices(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """topk_ids (T, K) -> token_counts (E,), gather_indices (R,), scatter_indices (R,).

    gather_indices[i] is the slot that row i of expert order comes from; scatter_indices[slot] is
    the row that the slot went to.
    """
    slot_experts = topk_ids.reshape(-1).tolist()
    token_counts = [0] * num_experts
    gather_indices = []
    for expert in range(num_experts):
        for slot, slot_expert in enumerate(slot_experts):
            if slot_expert == expert:
                gather_indices.append(slot)
                token_counts[expert] += 1
    for slot, slot_expert in enumerate(slot_experts):
        if not 0 <= slot_expert < num_experts:
            gather_indices.append(slot)
    scatter_indices = [0] * len(slot_experts)
    for row, slot in enumerate(gather_indices):
        scatter_indices[slot] = row
    return (
        torch.tensor(token_counts, dtype=torch.int32),
        torch.tensor(gather_indices, dtype=torch.int32),
        torch.tensor(scatter_indices, dtype=torch.int32),
    )


def dropped_slots(topk_ids: Tensor, num_experts: int) -> Tensor:
    """Which slots (T, K) name no expert."""
    return (topk_ids < 0) | (topk_ids >= num_experts)


def permute(
    input: Tensor, gather_indices: Tensor, top_k: int, scatter_indices: Tensor | None = None
) -> Tensor:
    """input (T, H) -> (R, H): row i is the row of the token that slot gather_indices[i] is of."""
    tokens = to_fp64(input)
    rows = [tokens[slot // top_k] for slot in gather_indices.tolist()]
    return torch.stack(rows) if rows else tokens.sum() * tokens.new_zeros(0, tokens.shape[1])


def unpermute(
    input: Tensor,
    gather_indices: Tensor,
    topk_weights: Tensor | None = None,
    top_k: int = 1,
    scatter_indices: Tensor | None = None,
) -> Tensor:
    """input (R, H) -> (T, H): each token's rows, times their weights, summed."""
    rows, topk_weights = to_fp64(input, topk_weights)
    num_rows, hidden_size = rows.shape
    output = [rows.new_zeros(hidden_size) for _ in range(num_rows // top_k)]
    for row, slot in enumerate(gather_indices.tolist()):
        token, choice = slot // top_k, slot % top_k
        weight = 1.0 if topk_weights is None else topk_weights[token, choice]
        output[token] = output[token] + weight * rows[row]
    return torch.stack(output) if output else rows.sum() * rows.new_zeros(0, hidden_size)


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
    """input (M, D), weight (E, N, D) -> (R, N); R = M*top_k with permute_x, else M."""
    rows, weight, topk_weights, bias = to_fp64(input, weight, topk_weights, bias)
    num_rows = rows.shape[0] * top_k if permute_x else rows.shape[0]
    slots = list(range(num_rows)) if gather_indices is None else gather_indices.tolist()

    # Rows past sum(token_counts) keep these zeros and read nothing.
    output = [rows.new_zeros(weight.shape[1]) for _ in range(num_rows)]
    row = 0
    for expert, count in enumerate(token_counts.tolist()):
        for _ in range(count):
            slot = slots[row]
            x = rows[slot // top_k] if permute_x else rows[row]
            y = weight[expert] @ x
            if bias is not None:
                y = y + bias[expert]
            if topk_weights is not None:
                y = y * topk_weights[slot // top_k, slot % top_k]
            output[slot if permute_y else row] = y
            row += 1
    if not output:
        # Of no rows, but with the history of its inputs.
        return (rows.sum() + weight.sum()) * rows.new_zeros(0, weight.shape[1])
    return torch.stack(output)


def dequantized(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """weight (E, N, D), weight_scale (E, ceil(N / 128), ceil(D / 128)) -> (E, N, D)."""
    weight, weight_scale = to_fp64(weight, weight_scale)
    output = weight.clone()
    for expert, row, column in itertools.product(*map(range, weight_scale.shape)):
        block = output[expert, 128 * row : 128 * (row + 1), 128 * column : 128 * (column + 1)]
        block *= weight_scale[expert, row, column]
    return output


def grouped_gemm_fp8(
    input: Tensor, weight: Tensor, weight_scale: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """The other arguments are those of grouped_gemm, which has a bias after topk_weights."""
    if len(args) > 3:
        args = (*args[:3], None, *args[3:])
    return grouped_gemm(input, dequantized(weight, weight_scale), *args, **kwargs)


def activated(gate: Tensor, activation: str) -> Tensor:
    """The activation of gate; swiglu_oai's is the factor of up + 1."""
    if activation == "silu":
        return gate * torch.sigmoid(gate)
    if activation == "gelu":
        return gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    if activation == "gelu_tanh":
        return gate * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    if activation == "relu":
        return torch.relu(gate)
    if activation == "relu_squared":
        return torch.relu(gate) ** 2
    if activation == "swiglu_oai":
        return gate * torch.sigmoid(1.702 * gate)
    raise ValueError(f"unknown activation {activation!r}")


def activation_of(
    z: Tensor, activation: str, gated: bool, interleaved: bool, activation_limit: float | None
) -> Tensor:
    """The input (I,) of the down projection of one row, of its pre-activation z (U,)."""
    if not gated:
        return activated(limited(z, None, activation_limit), activation)
    half = z.shape[0] // 2
    gate, up = (z[0::2], z[1::2]) if interleaved else (z[:half], z[half:])
    gate = limited(gate, None, activation_limit)
    up = limited(up, activation_limit, activation_limit)
    return activated(gate, activation) * (up + 1 if activation == "swiglu_oai" else up)


def limited(values: Tensor, below: float | None, above: float | None) -> Tensor:
    """values within [-below, above]; at the limits the gradient is that of the values."""
    if above is not None:
        values = torch.where(values > above, above, values)
    return values if below is None else torch.where(values < -below, -below, values)


def expert_layer(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    token_counts: Tensor,
    gather_indices: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    activation_limit: float | None,
    weights_before: bool,
    pre_activation: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """output (T, H) and pre_activation (R, U), for a routing in expert order.

    A given pre_activation stands in for what is computed here, whose derivative it keeps.
    """
    x, gate_up_proj, down_proj, topk_weights, gate_up_bias, down_bias, given = to_fp64(
        hidden_states, gate_up_proj, down_proj, topk_weights, gate_up_bias, down_bias,
        pre_activation,
    )  # fmt: skip
    top_k = topk_weights.shape[1]
    output = [x.new_zeros(x.shape[1]) for _ in range(x.shape[0])]
    pre_activations = [x.new_zeros(gate_up_proj.shape[1]) for _ in range(topk_weights.numel())]
    row = 0
    for expert, count in enumerate(token_counts.tolist()):
        for _ in range(count):
            slot = int(gather_indices[row])
            token, choice = slot // top_k, slot % top_k
            weight = topk_weights[token, choice]
            z = gate_up_proj[expert] @ (x[token] * weight if weights_before else x[token])
            if gate_up_bias is not None:
                z = z + gate_up_bias[expert]
            if given is not None:
                z = given[row] + (z - z.detach())
            h = activation_of(z, activation, gated, interleaved, activation_limit)
            y = down_proj[expert] @ h
            if down_bias is not None:
                y = y + down_bias[expert]
            output[token] = output[token] + (y if weights_before else y * weight)
            pre_activations[row] = z
            row += 1
    if not output:
        # Of no rows, but with the history of its inputs.
        history = x.sum() + gate_up_proj.sum() + down_proj.sum() + topk_weights.sum()
        return history * x.new_zeros(0, x.shape[1]), x.new_zeros(0, gate_up_proj.shape[1])
    return torch.stack(output), torch.stack(pre_activations)


def fused_experts_forward(
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
) -> tuple[Any, ...]:
    """output, pre_activation (None where recomputed), and the three of routing_indices."""
    counts, gather, scatter = routing_indices(topk_ids, gate_up_proj.shape[0])
    output, pre_activation = expert_layer(
        hidden_states, gate_up_proj, down_proj, topk_weights, gate_up_bias, down_bias, counts,
        gather, activation, gated, interleaved, activation_limit, weights_before,
    )  # fmt: skip
    return output, pre_activation if recompute == "none" else None, counts, gather, scatter


def fused_experts(*args: Any, **kwargs: Any) -> Tensor:
    """The same arguments; hidden_states (T, H) -> (T, H)."""
    return fused_experts_forward(*args, **kwargs)[0]


def gradients(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    differentiable: list[str],
    grad_output: Tensor,
) -> dict[str, Tensor]:
    """The gradient of each argument named in `differentiable`, in fp64.

    `function` is one of this file's; of several outputs the first is the differentiable one.
    An argument that the output does not depend on has a zero gradient.
    """
    leaves = {
        name: arguments[name].detach().to(torch.float64).clone().requires_grad_()
        for name in differentiable
        if arguments.get(name) is not None
    }
    output = function(**{**arguments, **leaves})
    output = output[0] if isinstance(output, tuple) else output
    if not output.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(
        output,
        list(leaves.values()),
        grad_output.to(torch.float64),
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(leaves, found, strict=True))


def needed_gradients(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    names: list[str],
    grad_output: Tensor,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of `names`, None where `needs` says that one is not wanted."""
    found = gradients(function, arguments, names, grad_output)
    return tuple(found.get(name) if need else None for name, need in zip(names, needs, strict=True))


def topk_routing_backward(
    grad_topk_weights: Tensor,
    logits: Tensor,
    topk_ids: Tensor,
    score_function: str,
    score_before_topk: bool,
    renormalize: bool,
    scaling_factor: float,
) -> Tensor:
    arguments = {
        "logits": logits,
        "topk_ids": topk_ids,
        "score_function": score_function,
        "score_before_topk": score_before_topk,
        "renormalize": renormalize,
        "scaling_factor": scaling_factor,
    }
    return gradients(routing_weights, arguments, ["logits"], grad_topk_weights)["logits"]


def unpermute_backward(
    grad_output: Tensor,
    input: Tensor,
    gather_indices: Tensor,
    topk_weights: Tensor,
    top_k: int,
    scatter_indices: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    arguments = {
        "input": input,
        "gather_indices": gather_indices,
        "topk_weights": topk_weights,
        "top_k": top_k,
    }
    return needed_gradients(unpermute, arguments, ["input", "topk_weights"], grad_output, needs)


def grouped_gemm_dx(
    grad_output: Tensor,
    weight: Tensor,
    token_counts: Tensor,
    gather_indices: Tensor | None,
    topk_weights: Tensor | None,
    input: Tensor | None,
    bias: Tensor | None,
    top_k: int,
    permute_x: bool,
    permute_y: bool,
    needs: list[bool],
    kernel_config: str | None = None,
) -> tuple[Tensor | None, ...]:
    # The gradient of the input does not depend on the input, which may then be None.
    num_rows = grad_output.shape[0] // top_k if permute_x else grad_output.shape[0]
    arguments = {
        "input": grad_output.new_zeros(num_rows, weight.shape[2]) if input is None else input,
        "weight": weight,
        "token_counts": token_counts,
        "gather_indices": gather_indices,
        "topk_weights": topk_weights,
        "bias": bias,
        "top_k": top_k,
        "permute_x": permute_x,
        "permute_y": permute_y,
    }
    return needed_gradients(grouped_gemm, arguments, ["input", "topk_weights"], grad_output, needs)


def grouped_gemm_fp8_dx(
    grad_output: Tensor, weight: Tensor, weight_scale: Tensor, **others: Any
) -> tuple[Tensor | None, ...]:
    return grouped_gemm_dx(grad_output, dequantized(weight, weight_scale), bias=None, **others)


def grouped_gemm_dw(
    grad_output: Tensor,
    input: Tensor,
    token_counts: Tensor,
    gather_indices: Tensor | None,
    topk_weights: Tensor | None,
    top_k: int,
    permute_x: bool,
    permute_y: bool,
    needs: list[bool],
    transposed: bool,
    kernel_config: str | None = None,
) -> tuple[Tensor | None, ...]:
    # The gradients of weight and bias do not depend on their values.
    num_experts, out_features = token_counts.shape[0], grad_output.shape[1]
    arguments = {
        "input": input,
        "weight": grad_output.new_zeros(num_experts, out_features, input.shape[1]),
        "token_counts": token_counts,
        "gather_indices": gather_indices,
        "topk_weights": topk_weights,
        "bias": grad_output.new_zeros(num_experts, out_features),
        "top_k": top_k,
        "permute_x": permute_x,
        "permute_y": permute_y,
    }
    return needed_gradients(grouped_gemm, arguments, ["weight", "bias"], grad_output, needs)


def fused_experts_backward(
    grad_output: Tensor,
    hidden_states: Tensor | None,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    pre_activation: Tensor | None,
    token_counts: Tensor,
    gather_indices: Tensor,
    scatter_indices: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    activation_limit: float | None,
    weights_before: bool,
    needs: list[bool],
    transposed: list[bool],
    kernel_config: str | None = None,
) -> tuple[Tensor | None, ...]:
    # Where one of these is None, no gradient asked for depends on it.
    biases = (
        grad_output.new_zeros(gate_up_proj.shape[:2]),
        grad_output.new_zeros(down_proj.shape[:2]),
    )
    arguments = {
        "hidden_states": torch.zeros_like(grad_output) if hidden_states is None else hidden_states,
        "gate_up_proj": gate_up_proj,
        "down_proj": down_proj,
        "topk_weights": topk_weights,
        "gate_up_bias": biases[0] if gate_up_bias is None else gate_up_bias,
        "down_bias": biases[1] if down_bias is None else down_bias,
        "pre_activation": pre_activation,
        "token_counts": token_counts,
        "gather_indices": gather_indices,
        "activation": activation,
        "gated": gated,
        "interleaved": interleaved,
        "activation_limit": activation_limit,
        "weights_before": weights_before,
    }
    names = [
        "hidden_states", "gate_up_proj", "down_proj", "topk_weights", "gate_up_bias", "down_bias",
    ]  # fmt: skip
    return needed_gradients(expert_layer, arguments, names, grad_output, needs)


def random_topk_ids(
    routing: str,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.int32,
) -> Tensor:
    """topk_ids (T, K) of one kind.

    uniform: each token's K experts are different and equally likely. hot: every slot goes to one
    expert. empty: only one half of the experts is used. dropped: some slots hold -1, E or an id
    far past E. all_dropped: every slot does. every_expert: each token goes to all E experts; this
    one has top_k == num_experts.
    """

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    if routing == "every_expert" and top_k != num_experts:
        raise ValueError("every_expert routes with top_k == num_experts")
    if routing in ("uniform", "dropped", "every_expert"):
        ids = torch.empty(num_tokens, top_k, dtype=torch.int64)
        for token in range(num_tokens):
            order = torch.randperm(num_experts, generator=generator)
            # More choices than experts repeat the order.
            for choice in range(top_k):
                ids[token, choice] = order[choice % num_experts]
    elif routing == "hot":
        ids = draw(num_experts, 1).expand(num_tokens, top_k).clone()
    elif routing == "empty":
        ids = draw((num_experts + 1) // 2, num_tokens, top_k) * 2
        ids = ids.clamp(max=num_experts - 1)
    elif routing == "all_dropped":
        ids = torch.zeros(num_tokens, top_k, dtype=torch.int64)
    else:
        raise ValueError(f"unknown routing {routing!r}, known: {', '.join(ROUTINGS)}")

    if routing in ("dropped", "all_dropped"):
        sentinels = torch.tensor([-1, num_experts, num_experts + 1000])
        sentinels = sentinels[draw(3, num_tokens, top_k)]
        dropped = draw(2, num_tokens, top_k) == 1
        if routing == "all_dropped":
            dropped = torch.ones_like(dropped)
        ids = torch.where(dropped, sentinels, ids)
    return ids.to(dtype)

# SPDX-License-Identifier: Apache-2.0
"""Computes topk_routing: each token's experts and their weights, one token at a time.

T tokens, K top_k, E experts.
"""

import itertools
import math

import torch
from torch import Tensor

from testing.oracle.differentiate import gradients, to_fp64


def highest(values: list[float], count: int) -> list[int]:
    """Return the positions of the `count` highest values, highest first, equal ones by position."""
    return sorted(range(len(values)), key=lambda position: (-values[position], position))[:count]


def scores_of(logits: Tensor, score_function: str) -> Tensor:
    """Return the scores (E,) of one token's logits (E,)."""
    if score_function == "softmax":
        exponentials = torch.exp(logits - logits.max().detach())
        return exponentials / exponentials.sum()
    if score_function == "sigmoid":
        return torch.sigmoid(logits)
    raise ValueError(f"unknown score_function {score_function!r}")


def selection_keys(
    logits: Tensor, selection_bias: Tensor | None, score_function: str, score_before_topk: bool
) -> list[float]:
    """Return what one token's experts are ranked by: the scores or the logits, plus the bias.

    They are computed one number at a time. So equal logits have equal scores to the last bit.
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
    """Return the keys that each group of neighbouring experts is judged by, highest first."""
    group_size = len(keys) // num_groups
    num_leaders = {"max": 1, "top2_sum": 2}[group_score]
    return [
        sorted(keys[group * group_size : (group + 1) * group_size], reverse=True)[:num_leaders]
        for group in range(num_groups)
    ]


def select_experts(
    keys: list[float], top_k: int, num_groups: int, top_groups: int, group_score: str
) -> list[int]:
    """Return the ids of one token's experts, highest key first, from the best groups alone."""
    group_size = len(keys) // num_groups
    group_scores = [sum(leaders) for leaders in group_leaders(keys, num_groups, group_score)]
    best_groups = highest(group_scores, top_groups)
    allowed = [expert for expert in range(len(keys)) if expert // group_size in best_groups]
    return [allowed[place] for place in highest([keys[e] for e in allowed], top_k)]


def selection_gap(
    keys: list[float], top_k: int, num_groups: int, top_groups: int, group_score: str
) -> float:
    """Return the smallest difference that one token's selection rests on.

    Where this is well above the rounding of a lower precision, an implementation in it must select
    the same ids. Equal keys are no gap, since their ids decide their order. Groups of equal scores
    are no gap if the same keys make their scores. If other keys do, the gap is zero: their sums may
    round either way.
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
    """Return one token's weights (K,) for the experts `ids` that it chose."""
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
    """Return topk_weights (T, K) for given topk_ids (T, K)."""
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
    """Return topk_weights (T, K) and topk_ids (T, K) of logits (T, E)."""
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

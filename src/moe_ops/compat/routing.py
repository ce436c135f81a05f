# SPDX-License-Identifier: Apache-2.0
"""Chooses experts, sorts slots by expert and moves rows, with the functions of Unsloth's MoE layers.

T num_tokens, H hidden_size, E num_experts, K top_k, M = T * K routed rows. A slot is
token * K + k. An error from an op names the op's arguments: `input` is X.
"""

from __future__ import annotations

from typing import Literal, overload

import torch

import moe_ops
from moe_ops.compat.indices import as_index


def permute(X: torch.Tensor, gather_indices: torch.Tensor, topk: int) -> torch.Tensor:
    """Copy each token's row to its routed rows, in expert order.

        output[i] = X[gather_indices[i] // topk]

    Args:
        X ((T, H), floating): rows in token order.
        gather_indices ((M,), any integer): slot of each row in expert order.
        topk (int): slots per token.

    Returns:
        output ((M, H), dtype of X): rows in expert order.

    Raises:
        ValueError: a shape does not fit (from the op, moe::permute).
        TypeError: a dtype does not fit.

    Differentiable in X. Its gradient is the sum over a token's slots, in fp32.
    """
    return moe_ops.permute(X, as_index(gather_indices, "permute", "gather_indices"), topk)


def unpermute(X: torch.Tensor, gather_indices: torch.Tensor) -> torch.Tensor:
    """Put rows in expert order back in slot order, without weights and without a sum.

        output[gather_indices[i]] = X[i]

    `moe_ops.unpermute` can also weight the rows and sum those of a token, in one kernel.

    Args:
        X ((M, H), floating): rows in expert order.
        gather_indices ((M,), any integer): slot of each row in expert order.

    Returns:
        output ((M, H), dtype of X): rows in slot order. `output.view(T, K, H)[t]` are token t's.

    Raises:
        ValueError: a shape does not fit (from the op, moe::unpermute).
        TypeError: a dtype does not fit.

    Differentiable in X.
    """
    return moe_ops.unpermute(X, as_index(gather_indices, "unpermute", "gather_indices"))


@overload
def get_routing_indices(
    selected_experts: torch.Tensor,
    num_experts: int,
    return_scatter_indices: Literal[False] = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def get_routing_indices(
    selected_experts: torch.Tensor, num_experts: int, return_scatter_indices: Literal[True]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


def get_routing_indices(
    selected_experts: torch.Tensor, num_experts: int, return_scatter_indices: bool = False
) -> tuple[torch.Tensor, ...]:
    """Count each expert's rows and sort the slots by expert.

        token_counts    = bincount(selected_experts.flatten(), minlength=num_experts)
        gather_indices  = argsort(selected_experts.flatten(), stable=True)
        scatter_indices = argsort(gather_indices)

    All three are int64, as torch's functions return them. `moe_ops.routing_indices` returns int32 and
    saves three casts; the ops take both.

    Args:
        selected_experts ((T, K) or any shape, any integer): expert of each slot. Ids outside
            [0, num_experts) are not counted, and come last in gather_indices. Expert parallelism
            marks the experts of other ranks with such ids.
        num_experts (int): number of experts.
        return_scatter_indices (bool): return scatter_indices too.

    Returns:
        token_counts ((E,), int64): rows of each expert.
        gather_indices ((M,), int64): slot of each row in expert order.
        scatter_indices ((M,), int64): row of each slot, the inverse of gather_indices. Returned only
            with return_scatter_indices.

    Raises:
        TypeError: selected_experts has no integer dtype.
        ValueError: num_experts is out of range (from the op, moe::routing_indices).

    No call waits for the GPU: nothing is read on the host.
    """
    ids = as_index(selected_experts, "get_routing_indices", "selected_experts")
    found = moe_ops.routing_indices(ids.reshape(-1, 1), num_experts)
    wanted = found if return_scatter_indices else found[:2]
    return tuple(indices.to(torch.int64) for indices in wanted)


def calculate_topk(
    gating_output: torch.Tensor,
    top_k: int,
    use_sigmoid: bool,
    renormalize: bool,
    pre_act: bool = True,
    post_act: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose each token's top_k experts and their weights.

        scores  = score(gating_output) with pre_act, else gating_output
        ids     = the top_k highest scores, ties to the lower id
        weights = scores[ids] with pre_act, else score(scores[ids])
        weights = weights / sum(weights) with renormalize

    `score` is the sigmoid or the softmax: over all experts with pre_act (Qwen3), over the selected
    ones with post_act (Llama 4). `moe_ops.topk_routing` also does the biased, group-limited and
    scaled selection of DeepSeek-V3 and GLM-4.

    Args:
        gating_output ((T, E), floating): router logits. They are computed with in fp32, or in fp64
            if they are fp64.
        top_k (int): experts per token.
        use_sigmoid (bool): score with the sigmoid, else with the softmax.
        renormalize (bool): divide each token's weights by their sum.
        pre_act (bool): score before the selection.
        post_act (bool): score after the selection. Exactly one of pre_act and post_act must be True.
            With both, scores would be scored again. With neither, weights would be logits.

    Returns:
        topk_weights ((T, K), fp32, or fp64 for fp64 gating_output): in order of descending score.
        topk_ids ((T, K), int64): expert of each slot.

    Raises:
        ValueError: pre_act equals post_act, or a shape or top_k does not fit (from the op,
            moe::topk_routing).
        TypeError: gating_output is not floating.

    Differentiable in gating_output.
    """
    if pre_act == post_act:
        got = "both" if pre_act else "neither"
        raise ValueError(
            f"moe_ops.compat.calculate_topk: expected exactly one of pre_act and post_act, got {got}"
        )
    topk_weights, topk_ids = moe_ops.topk_routing(
        gating_output,
        top_k,
        score_function="sigmoid" if use_sigmoid else "softmax",
        score_before_topk=pre_act,
        renormalize=renormalize,
    )
    return topk_weights, topk_ids.to(torch.int64)

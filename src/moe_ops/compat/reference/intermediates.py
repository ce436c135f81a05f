# SPDX-License-Identifier: Apache-2.0
"""What an MoE block computes on the way, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MoeIntermediates:
    """The stages of an MoE block's forward, in their order.

    B batches of S tokens each, T = B * S tokens, K top_k, E num_experts, H hidden_size,
    I intermediate_size. "Slot" is t * K + k; expert order is rows grouped by expert, in slot order
    within each. None of the tensors is detached.

    Attributes:
        router_logits ((T, E), floating): what the experts are chosen by.
        topk_weights ((T, K), floating): router weight of each slot.
        topk_ids ((T, K), int64): expert of each slot.
        token_counts ((E,), int64): rows of each expert.
        gather_indices ((T * K,), int64): slot of each row in expert order.
        first_gemm ((T * K, 2I), floating): gate and up, in expert order.
        activation ((T * K, I), floating): act(gate) * up, in expert order.
        second_gemm ((T * K, H), floating): the experts' outputs, in slot order where the block fuses
            the permutation into the GEMM (permute_y), else in expert order.
        unpermuted ((T * K, H), floating): the experts' outputs in slot order; second_gemm itself
            where that is in slot order.
        output ((B, S, H), floating): each token's weighted sum, what the block returns.
    """

    router_logits: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    token_counts: Tensor
    gather_indices: Tensor
    first_gemm: Tensor
    activation: Tensor
    second_gemm: Tensor
    unpermuted: Tensor
    output: Tensor

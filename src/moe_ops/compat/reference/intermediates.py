# SPDX-License-Identifier: Apache-2.0
"""Names the stages of an MoE block's forward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MoeIntermediates:
    """Holds the stages of an MoE block's forward, in their order.

    B batches of S tokens each, T = B * S tokens, K top_k, E num_experts, H hidden_size,
    I intermediate_size. A slot is t * K + k. In expert order rows are grouped by expert, and by slot
    within an expert. None of the tensors is detached.

    Attributes:
        router_logits ((T, E), floating): the scores by which experts are chosen.
        topk_weights ((T, K), floating): router weight of each slot.
        topk_ids ((T, K), int64): expert of each slot.
        token_counts ((E,), int64): rows of each expert.
        gather_indices ((T * K,), int64): slot of each row in expert order.
        first_gemm ((T * K, 2I), floating): gate and up, in expert order.
        activation ((T * K, I), floating): act(gate) * up, in expert order.
        second_gemm ((T * K, H), floating): the experts' outputs. They are in slot order if the GEMM
            permutes them (permute_y), else in expert order.
        unpermuted ((T * K, H), floating): the experts' outputs in slot order. With permute_y this is
            second_gemm itself.
        output ((B, S, H), floating): each token's weighted sum, which the block returns.
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

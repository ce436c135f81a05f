# SPDX-License-Identifier: Apache-2.0
"""Computes routing_indices, and draws topk_ids of every kind.

T tokens, K top_k, R = T * K routed rows, E experts.
"""

import torch
from torch import Tensor

ROUTINGS = ("uniform", "hot", "empty", "dropped", "all_dropped", "every_expert")


def routing_indices(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return token_counts (E,), gather_indices (R,), scatter_indices (R,) of topk_ids (T, K).

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
    """Return which slots (T, K) name no expert."""
    return (topk_ids < 0) | (topk_ids >= num_experts)


def random_topk_ids(
    routing: str,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.int32,
) -> Tensor:
    """Draw topk_ids (T, K) of one kind.

    uniform: each token's K experts are different and equally likely. hot: every slot goes to one
    expert. empty: only half of the experts are used. dropped: some slots hold -1, E or an id far
    past E. all_dropped: every slot does. every_expert: each token goes to all E experts, with
    top_k == num_experts.
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

# SPDX-License-Identifier: Apache-2.0
"""Checks that nobody reads the weights of dropped slots: those whose id is no expert's.

T num_tokens, K top_k, H hidden_size, E num_experts.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from testing.tolerances import RELATIVE_NORM, relative_error

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]

# Tokens all of whose slots are dropped.
EMPTY = [5, 11]


def offset_norm(rows: Tensor, eps: float = 0.0) -> Tensor:
    """Norm rows to something that is not zero for the zero row of a dropped slot; NaN without eps."""
    return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps) + 1.0


def assert_not_read(
    layer: Layer,
    hidden_states: Tensor,
    num_experts: int,
    parameters: Iterable[Tensor] = (),
    top_k: int = 3,
) -> None:
    """Check that dropped slots add nothing to the output or to any gradient, NaN weight or not.

    The reference has the dropped slots at expert 0 with a weight of zero.

    Args:
        layer: from hidden_states (T, H), topk_ids (T, K) and topk_weights (T, K) to (T, H).
        hidden_states: of at least 12 tokens.
        num_experts: ids below it are in range.
        parameters: tensors whose gradients are compared too.
        top_k: slots of a token, at most num_experts.
    """
    generator = torch.Generator().manual_seed(3)
    num_tokens = hidden_states.shape[0]
    topk_ids = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices
    topk_weights = torch.rand(num_tokens, top_k, generator=generator) + 0.1
    tangent = torch.randn(hidden_states.shape, generator=generator).to(hidden_states.dtype)
    is_dropped = torch.rand(topk_ids.shape, generator=generator) < 0.4
    is_dropped[EMPTY] = True
    num_dropped = int(is_dropped.sum())
    sentinels = torch.tensor([num_experts, -1, num_experts + 7]).repeat(num_dropped)[:num_dropped]
    unread = torch.tensor([float("nan"), float("inf"), 0.5]).repeat(num_dropped)[:num_dropped]
    parameters = list(parameters)

    def step(ids: Tensor, weights: Tensor) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (hidden_states, weights)]
        output = layer(leaves[0], ids, leaves[1])
        return [output, *torch.autograd.grad(output, [*leaves, *parameters], tangent)]

    actual = step(
        topk_ids.masked_scatter(is_dropped, sentinels),
        topk_weights.masked_scatter(is_dropped, unread),
    )
    expected = step(topk_ids.masked_fill(is_dropped, 0), topk_weights.masked_fill(is_dropped, 0.0))
    expected[2] = expected[2].masked_fill(is_dropped, 0.0)
    output, grad_hidden_states, grad_weights, *_ = actual
    assert torch.count_nonzero(output[EMPTY]) == 0
    assert torch.count_nonzero(grad_hidden_states[EMPTY]) == 0
    assert torch.count_nonzero(grad_weights[is_dropped]) == 0
    for number, (got, want) in enumerate(zip(actual, expected, strict=True)):
        assert want.norm() > 0, number
        assert relative_error(got, want) <= RELATIVE_NORM[hidden_states.dtype], number

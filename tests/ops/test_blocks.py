# SPDX-License-Identifier: Apache-2.0
"""The ops work together: in the blocks of moe_block.py, and in a layer with dropped ids."""

import functools

import pytest
import torch
from torch.nn import functional as F

import moe_ops
from testing import checks, oracle
from testing.moe_block import EVERY_BLOCK, Weights, loss_and_gradients, make_tokens, make_weights

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("name", sorted(EVERY_BLOCK))
@pytest.mark.parametrize("num_tokens", [0, 1, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_equals_the_oracle(name, num_tokens, dtype):
    hidden, weights = make_tokens(num_tokens, dtype), make_weights(dtype)
    got = loss_and_gradients(EVERY_BLOCK[name], hidden, weights)
    # Both choose the same experts: in bf16 the router's logits are rounded before the selection.
    topk_ids = moe_ops.topk_routing(F.linear(hidden, weights.router), 2)[1]
    reference = functools.partial(EVERY_BLOCK[name], ops=OracleWithIds(topk_ids))
    want = loss_and_gradients(
        reference,
        hidden.detach().double().requires_grad_(),
        Weights(*(w.detach().double().requires_grad_() for w in weights.tensors())),
    )
    for position, (actual, expected) in enumerate(zip(got, want, strict=True)):
        checks.assert_close(actual, expected, what=f"output or gradient {position}")


class OracleWithIds:
    """Stands for the oracle, with the experts already chosen."""

    def __init__(self, topk_ids: torch.Tensor) -> None:
        self.topk_ids = topk_ids

    def topk_routing(self, logits, top_k):
        weights = oracle.routing_weights(logits, self.topk_ids, "softmax", True, False, 1.0)
        return weights, self.topk_ids

    def __getattr__(self, name):
        return getattr(oracle, name)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropped_ids_are_exactly_zero_everywhere(fused, dtype):
    """Ids are dropped at E and above or at -1. Output, dX and router gradient are zero."""
    num_experts, top_k = 4, 2
    topk_ids = torch.tensor([[0, 3], [-1, 2], [4, -1], [9, 1], [1, 1], [-7, 400]])
    dropped = oracle.dropped_slots(topk_ids, num_experts)
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    hidden, topk_weights = leaf(6, 8), leaf(6, 2)
    up_proj, down_proj = leaf(num_experts, 10, 8), leaf(num_experts, 8, 10)
    counts, gather, scatter = moe_ops.routing_indices(topk_ids, num_experts)
    if fused:
        rows = moe_ops.grouped_gemm(hidden, up_proj, counts, gather, top_k=top_k, permute_x=True)
        slots = moe_ops.grouped_gemm(
            rows, down_proj, counts, gather, topk_weights, top_k=top_k, permute_y=True
        )
        output = slots.view(6, top_k, 8).sum(1)
    else:
        rows = moe_ops.permute(hidden, gather, top_k, scatter)
        rows = moe_ops.grouped_gemm(rows, up_proj, counts)
        rows = moe_ops.grouped_gemm(rows, down_proj, counts)
        output = moe_ops.unpermute(rows, gather, topk_weights, top_k, scatter)
    with checks.poisoned_memory():
        grads = torch.autograd.grad(
            output, (hidden, topk_weights, up_proj), torch.ones_like(output)
        )
    without_expert = dropped.all(1)
    assert without_expert.tolist() == [False, False, True, False, False, True]
    assert (output[without_expert] == 0).all()
    assert (grads[0][without_expert] == 0).all()
    assert (grads[1][dropped] == 0).all()
    assert (output[~without_expert] != 0).any(1).all()
    assert (grads[0][~without_expert] != 0).any(1).all()
    assert (grads[1][~dropped] != 0).all()
    assert all(grad.isfinite().all() for grad in grads)

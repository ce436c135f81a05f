# SPDX-License-Identifier: Apache-2.0
"""These tests are unpermute's own. test_every_op.py holds what every op must do."""

import pytest
import torch

from moe_ops._core.library import SCHEMAS
from testing import boundaries, checks, oracle
from testing.every_op import FLOATING
from testing.strategies import PRESENT, seeded_sample

moe = torch.ops.moe


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_sums_in_fp32_and_rounds_once(top_k, dtype, weighted):
    rows = torch.randn(200 * top_k, 40).to(dtype)
    gather = torch.randperm(200 * top_k)
    # These fp32 weights are no bf16 or fp16 numbers.
    topk_weights = torch.rand(200, top_k) + 0.1 if weighted else None
    expected = oracle.unpermute(rows, gather, topk_weights, top_k)
    output = moe.unpermute(rows, gather, topk_weights, top_k)
    assert (output != expected.to(dtype)).double().mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_round_once(dtype):
    rows = torch.randn(128, 40).to(dtype).requires_grad_()
    gather, topk_weights = torch.randperm(128), (torch.rand(64, 2) + 0.1).requires_grad_()
    tangent = torch.randn(64, 40).to(dtype)
    output = moe.unpermute(rows, gather, topk_weights, 2)
    found = torch.autograd.grad(output, (rows, topk_weights), tangent)
    call = {"input": rows, "gather_indices": gather, "topk_weights": topk_weights, "top_k": 2}
    expected = oracle.gradients(oracle.unpermute, call, ["input", "topk_weights"], tangent)
    checks.assert_rounded_once(found[0], expected["input"])
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(found[1], expected["topk_weights"].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", boundaries.CHUNK_SHAPES, ids=str)
def test_rows_at_the_ends_of_chunks(shape, dtype, weighted):
    boundaries.check_unpermute(shape, dtype, weighted=weighted, device=torch.device("cpu"))


def test_scatter_indices_change_nothing():
    for weighted in (None, PRESENT):
        sample = seeded_sample(
            SCHEMAS["unpermute"], 0, T=9, topk_weights=weighted, scatter_indices=PRESENT
        )
        arguments = sample.requiring_grad()
        leaves = [arguments[n] for n in sample.differentiable()]
        results = []
        for scatter_indices in (arguments["scatter_indices"], None):
            output = sample(**{**arguments, "scatter_indices": scatter_indices})
            grads = torch.autograd.grad(output, leaves, torch.ones_like(output))
            results.append((output, *grads))
        for one, two in zip(*results, strict=True):
            assert torch.equal(one, two)


def test_undoes_permute_up_to_the_number_of_slots():
    rows = torch.randn(6, 5, dtype=torch.float64)
    ids = torch.tensor([[0, 2], [-1, 1], [2, 1], [0, 0], [9, 9], [1, 2]])
    _, gather, scatter = moe.routing_indices(ids, 3)
    back = moe.unpermute(moe.permute(rows, gather, 2, scatter), gather, None, 2, scatter)
    assert torch.equal(back, 2 * rows)


def test_backward_without_weights_is_permute():
    rows, gather = torch.randn(12, 3, requires_grad=True), torch.randperm(12)
    tangent = torch.randn(4, 3)
    (grad,) = torch.autograd.grad(moe.unpermute(rows, gather, None, 3), rows, tangent)
    assert torch.equal(grad, moe.permute(tangent, gather, 3))

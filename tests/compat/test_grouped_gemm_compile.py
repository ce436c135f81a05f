# SPDX-License-Identifier: Apache-2.0
"""moe_ops.compat gives the same values and gradients under torch.compile(fullgraph=True)."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from moe_ops.compat import calculate_topk, get_routing_indices, grouped_gemm, permute, unpermute
from testing import checks
from testing.compat_problem import FLAGS, forward_and_backward, problem

flags = pytest.mark.parametrize(("permute_x", "permute_y", "weighted"), FLAGS)


@flags
def test_compiled_equals_eager(permute_x, permute_y, weighted):
    call = problem(permute_x).call(permute_x, permute_y, weighted)
    call["W"] = call["W"].flatten(0, 1)
    tangent = torch.randn(39, 7)
    compiled = torch.compile(grouped_gemm, fullgraph=True, backend="aot_eager")
    found = forward_and_backward(compiled, call, tangent)
    expected = forward_and_backward(grouped_gemm, call, tangent)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.norm() > 0
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("only", ["dX_only", "dW_only"])
def test_one_gradient_alone(only):
    call = problem().call(permute_x=False, permute_y=True, weighted=False)
    leaves = {name: call[name].clone().requires_grad_() for name in ("X", "W")}
    tangent = torch.randn(39, 7)
    compiled = torch.compile(grouped_gemm, fullgraph=True, backend="aot_eager")
    compiled(**{**call, **leaves, only: True}).backward(tangent)
    wanted, dropped = ("X", "W") if only == "dX_only" else ("W", "X")
    expected = forward_and_backward(grouped_gemm, call, tangent)
    assert leaves[dropped].grad is None
    assert leaves[wanted].grad is not None
    assert torch.equal(leaves[wanted].grad, expected[wanted])


def layer(hidden, router, up, down, topk=3):
    """Compute an MoE layer with every function that has a place in one. up is (E * N, K)."""
    topk_weights, topk_ids = calculate_topk(hidden @ router.T, topk, True, renormalize=True)
    counts, gather = get_routing_indices(topk_ids, len(router))
    # The counts fit in a byte, so the graph has a cast.
    counts = counts.to(torch.uint8)
    routing: dict[str, Any] = {"m_sizes": counts, "gather_indices": gather, "topk": topk}
    rows = grouped_gemm(hidden, up, permute_x=True, **routing)
    same = grouped_gemm(permute(hidden, gather, topk), up, is_first_gemm=True, **routing)
    rows = torch.nn.functional.silu(rows + same)
    weighted: dict[str, Any] = {"topk_weights": topk_weights, "fuse_mul_post": True}
    slots = grouped_gemm(rows, down, permute_y=True, **weighted, **routing)
    same = unpermute(grouped_gemm(rows, down, **weighted, **routing), gather)
    return (slots + same).view(-1, topk, slots.shape[1]).sum(1)


def layer_tensors(num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = [(num_tokens, 16), (6, 16), (6 * 10, 16), (6, 12, 10)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def output_and_gradients(function, tensors):
    output = function(*tensors)
    tangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    return [output, *torch.autograd.grad(output, tensors, tangent)]


@pytest.mark.slow
def test_inductor_equals_eager():
    """Two GEMMs have hardly anything around them, because each C++ kernel takes seconds."""

    topk_ids = torch.rand(20, 6).topk(3).indices.to(torch.uint8)

    def function(hidden, up, down, topk_weights):
        counts, gather = get_routing_indices(topk_ids, 6)
        routing: dict[str, Any] = {"m_sizes": counts, "gather_indices": gather, "topk": 3}
        rows = grouped_gemm(hidden, up, permute_x=True, **routing)
        weighted: dict[str, Any] = {"topk_weights": topk_weights, "fuse_mul_post": True}
        return grouped_gemm(rows, down, permute_y=True, **weighted, **routing)

    hidden, _, up, down = layer_tensors(20)
    tensors = [hidden, up, down, torch.rand(20, 3, requires_grad=True)]
    found = output_and_gradients(torch.compile(function, fullgraph=True), tensors)
    expected = output_and_gradients(function, tensors)
    for got, want in zip(found, expected, strict=True):
        assert got.norm() > 0
        checks.assert_close(got, want)


def test_token_counts_share_compilations():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for num_tokens in (2, 3, 5, 8, 13):
        tensors = layer_tensors(num_tokens)
        found = output_and_gradients(compiled, tensors)
        for got, want in zip(found, output_and_gradients(layer, tensors), strict=True):
            checks.assert_close(got, want)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_hardly_any_token(num_tokens):
    tensors = layer_tensors(num_tokens)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = output_and_gradients(compiled, tensors)
    for got, want in zip(found, output_and_gradients(layer, tensors), strict=True):
        checks.assert_close(got, want)

# SPDX-License-Identifier: Apache-2.0
"""moe_ops.compat computes only the gradients that are wanted, and never waits for a GPU."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from moe_ops.compat import (
    calculate_topk,
    get_routing_indices,
    grouped_gemm,
    permute,
    torch_grouped_gemm,
    unpermute,
)
from testing import checks
from testing.compat_problem import forward_and_backward, problem
from testing.recorders import Allocations, MoeOps

# The gradients that are wanted, and the ops of the backward that compute them.
LAUNCHES = [
    ({}, "X W topk_weights", ["grouped_gemm_dx", "grouped_gemm_dw"]),
    ({}, "X", ["grouped_gemm_dx"]),
    ({}, "W", ["grouped_gemm_dw"]),
    ({}, "topk_weights", ["grouped_gemm_dx"]),
    ({"dX_only": True}, "X W", ["grouped_gemm_dx"]),
    ({"dX_only": True}, "X W topk_weights", ["grouped_gemm_dx"]),
    ({"dW_only": True}, "X W", ["grouped_gemm_dw"]),
    ({"dW_only": True}, "X W topk_weights", ["grouped_gemm_dw"]),
]


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize(("only", "requiring_grad", "launched"), LAUNCHES)
def test_launches_only_what_is_wanted(only, requiring_grad, launched, dimensions):
    call = problem().call(permute_x=False, permute_y=True, weighted=True)
    if dimensions == 2:
        call["W"] = call["W"].flatten(0, 1)
    tangent = torch.randn(39, 7)
    full = forward_and_backward(grouped_gemm, call, tangent)
    leaves = {name: call[name].clone().requires_grad_() for name in requiring_grad.split()}
    with MoeOps() as ops:
        output = grouped_gemm(**{**call, **leaves}, **only)
        assert ops.names == ["grouped_gemm"]
        output.backward(tangent)
    assert ops.names[1:] == launched
    dropped = {"dX_only": ["W"], "dW_only": ["X", "topk_weights"]}
    unwanted = [name for flag in only for name in dropped[flag]]
    for name, leaf in leaves.items():
        if name in unwanted:
            assert leaf.grad is None, name
        else:
            assert leaf.grad is not None, name
            checks.assert_close(leaf.grad, full[name], what=name)


@pytest.mark.parametrize("only", ["dX_only", "dW_only"])
def test_nothing_is_allocated_for_the_other_gradient(only):
    """No tensor of the other gradient's size is made in the backward."""
    call = problem().call(permute_x=False, permute_y=False, weighted=False)
    leaves = {name: call[name].clone().requires_grad_() for name in ("X", "W")}
    other = "W" if only == "dX_only" else "X"
    assert leaves["X"].numel() != leaves["W"].numel()
    output = grouped_gemm(**{**call, **leaves, only: True})
    with Allocations() as allocations:
        output.backward(torch.randn(39, 7))
    assert leaves["X" if only == "dX_only" else "W"].numel() in allocations.sizes
    assert leaves[other].numel() not in allocations.sizes


def test_of_a_block_only_the_gradient_of_its_input_is_dropped():
    """With dW_only at the first GEMM both weights' gradients are those of the full backward."""
    first = problem(permute_x=True)
    routing: dict[str, Any] = {
        "m_sizes": first.m_sizes, "topk": first.topk, "gather_indices": first.gather_indices,
    }  # fmt: skip
    second = torch.randn(5, 11, 7)
    tangent = torch.randn(39, 11)

    def gradients(dW_only):
        leaves = [t.clone().requires_grad_() for t in (first.X, first.W, second)]
        X, up, down = leaves
        hidden = grouped_gemm(X, up, permute_x=True, dW_only=dW_only, **routing)
        output = grouped_gemm(torch.nn.functional.silu(hidden), down, permute_y=True, **routing)
        output.backward(tangent)
        return [leaf.grad for leaf in leaves]

    dropped, *found = gradients(dW_only=True)
    needed, *expected = gradients(dW_only=False)
    assert dropped is None
    assert needed is not None
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


def test_nothing_is_read_on_the_host():
    """A fake tensor has no values, so reading one raises, as it does in the reference loop.

    tests/gpu holds that the ops themselves never wait for the GPU.
    """
    call = problem(permute_x=True).call(True, permute_y=False, weighted=True)
    call["W"] = call["W"].flatten(0, 1).requires_grad_()
    call["topk_weights"] = call["topk_weights"].flatten()
    call["m_sizes"] = call["m_sizes"].to(torch.uint8)
    with FakeTensorMode() as mode:
        for name, value in call.items():
            call[name] = mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
        grouped_gemm(**call, dW_only=True).sum().backward()
        _, gather = get_routing_indices(torch.zeros(13, 3, dtype=torch.int16), 5)
        unpermute(permute(call["X"], gather, 3), gather)
        calculate_topk(torch.randn(13, 5), 3, use_sigmoid=True, renormalize=True)
        with pytest.raises(DataDependentOutputException):
            torch_grouped_gemm(torch.randn(39, 45), torch.randn(5, 7, 45), call["m_sizes"])

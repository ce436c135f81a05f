# SPDX-License-Identifier: Apache-2.0
"""moe_ops.compat.grouped_gemm equals the reference in fp64.

T tokens, E experts, K top_k, M = T * K rows, D in_features, N out_features.
"""

import pytest
import torch
from torch import Tensor

from moe_ops.compat import grouped_gemm, torch_grouped_gemm
from testing import checks
from testing.compat_problem import (
    EMPTY_EXPERT,
    FLAGS,
    INTEGER,
    expected_output,
    forward_and_backward,
    problem,
)

flags = pytest.mark.parametrize(("permute_x", "permute_y", "weighted"), FLAGS)
floating_dtypes = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str
)
integer_dtypes = pytest.mark.parametrize("dtype", INTEGER, ids=str)


def assert_equals_reference(call, tangent=None):
    """Check that output and gradients equal the reference's and have the arguments' dtypes."""
    if tangent is None:
        num_rows = call["gather_indices"].shape[0]
        tangent = torch.randn(num_rows, call["W"].shape[-2]).to(call["X"].dtype)
    found = forward_and_backward(grouped_gemm, call, tangent)
    expected = forward_and_backward(expected_output, call, tangent, torch.float64)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        # The gradient of fp32 topk_weights comes from products of X, W and dY in their dtype.
        dtype = checks.coarser(value.dtype, call["X"].dtype)
        checks.assert_close(value, expected[name], dtype=dtype, what=name)
        wanted = call["X"].dtype if name == "output" else call[name].dtype
        assert value.dtype == wanted, name
    return found


@flags
@floating_dtypes
def test_equals_the_reference(permute_x, permute_y, weighted, dtype):
    call = problem(permute_x, dtype).call(permute_x, permute_y, weighted)
    with checks.poisoned_memory():
        found = assert_equals_reference(call)
    # With permute_x the gradient comes back in token order, summed over the slots.
    assert found["X"].shape == call["X"].shape
    assert (found["W"][EMPTY_EXPERT] == 0).all()
    assert (found["W"].flatten(1).norm(dim=1) > 0).sum() == 4


@pytest.mark.parametrize("out_features", [96, 45, 7])
@pytest.mark.parametrize("in_features", [96, 45, 7])
@floating_dtypes
def test_sizes_that_no_block_divides(in_features, out_features, dtype):
    sizes = {"in_features": in_features, "out_features": out_features}
    assert_equals_reference(problem(True, dtype, **sizes).call(True, False, True))


@flags
def test_weight_of_two_dimensions(permute_x, permute_y, weighted):
    call = problem(permute_x).call(permute_x, permute_y, weighted)
    tangent = torch.randn(39, 7)
    stacked = forward_and_backward(grouped_gemm, call, tangent)
    call["W"] = call["W"].flatten(0, 1)
    flat = forward_and_backward(grouped_gemm, call, tangent)
    assert flat["W"].shape == (5 * 7, 45)
    assert torch.equal(flat.pop("W"), stacked.pop("W").flatten(0, 1))
    for name, value in flat.items():
        assert torch.equal(value, stacked[name]), name
    # The gradient of a parameter is accumulated too.
    parameter = call["W"].clone().requires_grad_()
    grouped_gemm(**{**call, "W": parameter}).sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.shape == parameter.shape
    assert parameter.grad.is_contiguous()


def scattered(tensor: Tensor) -> Tensor:
    """Return the same values with other values between them, in both dimensions."""
    wide = torch.full([2 * size for size in tensor.shape], 1e6, dtype=tensor.dtype)
    view = wide[(slice(None, None, 2),) * tensor.dim()]
    return view.copy_(tensor)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT


def broadcast(tensor: Tensor) -> Tensor:
    """Return the first row with stride 0, so that it is every row."""
    return tensor[..., :1, :].expand_as(tensor)


@pytest.mark.parametrize("view", [scattered, transposed, broadcast])
@pytest.mark.parametrize("argument", ["X", "W", "W of two dimensions", "dY"])
@pytest.mark.parametrize(("permute_x", "permute_y"), [(False, False), (True, False), (False, True)])
def test_any_strides(permute_x, permute_y, argument, view):
    call = problem(permute_x).call(permute_x, permute_y, weighted=True)
    tangent = torch.randn(39, 7)
    if argument == "W of two dimensions":
        call["W"] = call["W"].flatten(0, 1)
    if argument == "dY":
        tangent = view(tangent)
        assert not tangent.is_contiguous()
    else:
        call[argument[0]] = view(call[argument[0]])
        assert not call[argument[0]].is_contiguous()
    assert_equals_reference(call, tangent)


@integer_dtypes
def test_counts_of_every_integer_dtype(dtype):
    given = problem()
    call = given.call(permute_x=False, permute_y=True, weighted=True)
    tangent = torch.randn(39, 7)
    expected = forward_and_backward(grouped_gemm, call, tangent)
    call["m_sizes"] = given.m_sizes.to(dtype)
    call["gather_indices"] = given.gather_indices.to(dtype)
    found = forward_and_backward(grouped_gemm, call, tangent)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_counts_over_a_signed_byte():
    """Counts are cast and not viewed, so 200 is no negative int8."""
    m_sizes = torch.tensor([200, 3], dtype=torch.uint8)
    X, W = torch.randn(203, 4), torch.randn(2, 5, 4)
    expected = torch.cat([X[:200] @ W[0].T, X[200:] @ W[1].T])
    checks.assert_close(grouped_gemm(X, W, m_sizes, topk=1), expected)


def test_gather_indices_may_be_left_out_where_nothing_is_permuted():
    given = problem()
    call = given.call(permute_x=False, permute_y=False, weighted=False)
    tangent = torch.randn(39, 7)
    expected = forward_and_backward(grouped_gemm, call, tangent)
    found = forward_and_backward(grouped_gemm, {**call, "gather_indices": None}, tangent)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_rows_of_no_expert_are_zero():
    given = problem()
    call = given.call(permute_x=False, permute_y=True, weighted=False)
    call["m_sizes"] = given.m_sizes.clone()
    call["m_sizes"][-1] -= 2
    unused = given.gather_indices[-2:]
    with checks.poisoned_memory():
        found = forward_and_backward(grouped_gemm, call, torch.randn(39, 7))
    assert (found["output"][unused] == 0).all()
    assert (found["X"][-2:] == 0).all()
    assert (found["X"][:-2] != 0).any(dim=1).all()


@pytest.mark.parametrize("permute_y", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_router_weights_are_multiplied_before_the_rounding(dtype, permute_y):
    """There is one rounding. Another one would move about every fourth element by one unit."""
    given = problem(dtype=dtype, num_tokens=60, in_features=40, out_features=40)
    call = given.call(False, permute_y, weighted=True)
    exact = expected_output(**{**call, "X": given.X.double(), "W": given.W.double()})
    differs = grouped_gemm(**call) != exact.to(dtype)
    assert differs.double().mean() < 0.02


def test_router_weights_as_one_dimension():
    given = problem()
    call = given.call(permute_x=False, permute_y=True, weighted=True)
    tangent = torch.randn(39, 7)
    expected = forward_and_backward(grouped_gemm, call, tangent)
    call["topk_weights"] = given.topk_weights.flatten()
    found = forward_and_backward(grouped_gemm, call, tangent)
    assert found["topk_weights"].shape == (39,)
    assert torch.equal(found["topk_weights"], expected["topk_weights"].flatten())
    assert torch.equal(found["output"], expected["output"])


def test_router_weights_are_not_used_without_fuse_mul_post():
    call = problem().call(permute_x=False, permute_y=True, weighted=False)
    weights = torch.rand(13, 3, requires_grad=True)
    output = grouped_gemm(**{**call, "topk_weights": weights})
    assert torch.equal(output, grouped_gemm(**call))
    assert not output.requires_grad


@pytest.mark.parametrize("topk", [1, 2])
def test_input_that_was_multiplied_before(topk):
    """As in Llama 4, the router weight multiplies the input and gets its gradient through it."""
    given = problem(permute_x=True, topk=topk)
    slots = given.gather_indices
    # Each slot has a token row with its own weight, so topk is 1 for the GEMM.
    tokens = given.X.repeat_interleave(topk, 0)
    tangent = torch.randn(13 * topk, 7)

    def function(gemm, X, W, topk_weights, **others):
        weighted = X * topk_weights.flatten()[:, None]
        flags = {"topk_weights": None, "fuse_mul_post": False, "permute_x": True}
        return gemm(
            weighted, W, given.m_sizes, topk=1, gather_indices=slots, permute_y=False, **flags
        )

    call = {"X": tokens, "W": given.W, "topk_weights": given.topk_weights}
    found = forward_and_backward(lambda **c: function(grouped_gemm, **c), call, tangent)
    expected = forward_and_backward(
        lambda **c: function(expected_output, **c), call, tangent, torch.float64
    )
    for name, value in found.items():
        checks.assert_close(value, expected[name], what=name)


def test_the_same_bits_each_time():
    call = problem(num_tokens=200).call(permute_x=False, permute_y=True, weighted=True)
    tangent = torch.randn(600, 7)
    first = forward_and_backward(grouped_gemm, call, tangent)
    for _ in range(3):
        for name, value in forward_and_backward(grouped_gemm, call, tangent).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("transpose", [True, False])
def test_reference_loop(transpose):
    given = problem()
    W = given.W if transpose else given.W.mT.contiguous()
    m_sizes = given.m_sizes.clone()
    m_sizes[-1] -= 2
    leaves = X, W = given.X.requires_grad_(), W.requires_grad_()
    output = torch_grouped_gemm(X, W, m_sizes, transpose=transpose)
    matrices = W.mT if transpose else W
    expert_of_row = torch.arange(5).repeat_interleave(m_sizes)
    expected = torch.einsum("rk,rkn->rn", X[:37], matrices[expert_of_row])
    expected = torch.cat([expected, torch.zeros(2, 7)])
    checks.assert_close(output, expected)
    tangent = torch.randn(39, 7)
    found = torch.autograd.grad(output, leaves, tangent)
    for got, want in zip(found, torch.autograd.grad(expected, leaves, tangent), strict=True):
        checks.assert_close(got, want)
    flat = W.flatten(0, 1)
    assert torch.equal(torch_grouped_gemm(X, flat, m_sizes, transpose=transpose), output)
    for wrong, reason in (
        (flat[1:], "a multiple of m_sizes.numel"),
        (flat[0], "2 or 3 dimensions"),
    ):
        with pytest.raises(ValueError, match=rf"^moe_ops\.compat\.torch_grouped_gemm: .*{reason}"):
            torch_grouped_gemm(X, wrong, m_sizes, transpose=transpose)

# SPDX-License-Identifier: Apache-2.0
"""The routing functions of moe_ops.compat equal torch's own functions and plain loops.

T tokens, E experts, K top_k, M = T * K rows, H hidden_size. tests/ops/test_topk_routing.py
holds that the op selects as transformers does for DeepSeek-V3 and GLM-4.
"""

import pytest
import torch

from moe_ops.compat import calculate_topk, get_routing_indices, permute, unpermute
from testing import checks
from testing.compat_problem import INTEGER

integer_dtypes = pytest.mark.parametrize("dtype", INTEGER, ids=str)
floating_dtypes = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)


@integer_dtypes
@pytest.mark.parametrize("shape", [(50, 3), (50,), (2, 5, 4), (1, 1), (0, 3)])
def test_routing_indices_equal_argsort_and_bincount(dtype, shape):
    ids = torch.randint(0, 7, shape)
    counts, gather, scatter = get_routing_indices(ids.to(dtype), 9, return_scatter_indices=True)
    # torch.equal does not look at dtypes.
    assert {indices.dtype for indices in (counts, gather, scatter)} == {torch.int64}
    assert torch.equal(gather, torch.argsort(ids.flatten(), stable=True))
    assert torch.equal(counts, torch.bincount(ids.flatten(), minlength=9))
    assert torch.equal(scatter, torch.argsort(gather))
    two = get_routing_indices(ids.to(dtype), num_experts=9)
    assert len(two) == 2
    assert torch.equal(two[0], counts)
    assert torch.equal(two[1], gather)


def test_routing_indices_of_ids_in_any_strides():
    ids = torch.randint(0, 7, (4, 50)).T
    counts, gather = get_routing_indices(ids, 7)
    assert torch.equal(gather, torch.argsort(ids.flatten(), stable=True))
    assert torch.equal(counts, torch.bincount(ids.flatten(), minlength=7))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64], ids=str)
def test_ids_out_of_range_come_last_and_are_not_counted(dtype):
    ids = torch.tensor([[2, -1], [0, 5], [2, 99]], dtype=dtype)
    counts, gather, scatter = get_routing_indices(ids, 3, return_scatter_indices=True)
    assert counts.tolist() == [1, 0, 2]
    assert gather.tolist() == [2, 0, 4, 1, 3, 5]
    assert scatter[gather].tolist() == list(range(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_routing_indices_reject(dtype):
    text = f"moe_ops.compat.get_routing_indices: expected selected_experts to have an integer dtype, got {dtype}"  # fmt: skip
    call = {"selected_experts": torch.ones(3, 2, dtype=dtype), "num_experts": 4}
    assert checks.assert_rejects(TypeError, (), get_routing_indices, call) == text


def rows_and_indices(num_rows: int, dtype: torch.dtype, num_slots: int):
    X = torch.randn(num_rows, 5).to(dtype).requires_grad_()
    return X, torch.randperm(num_slots)


@integer_dtypes
def test_permute(dtype):
    X, gather = rows_and_indices(11, torch.float32, 33)
    output = permute(X, gather.to(dtype), topk=3)
    assert torch.equal(output, X[gather // 3])
    tangent = torch.randn(33, 5)
    (found,) = torch.autograd.grad(output, X, tangent)
    expected = torch.zeros(11, 5, dtype=torch.float64).index_add(0, gather // 3, tangent.double())
    checks.assert_close(found, expected)


@integer_dtypes
def test_unpermute(dtype):
    X, gather = rows_and_indices(33, torch.float32, 33)
    output = unpermute(X, gather.to(dtype))
    expected = torch.empty(33, 5)
    expected[gather] = X.detach()
    assert torch.equal(output, expected)
    tangent = torch.randn(33, 5)
    (found,) = torch.autograd.grad(output, X, tangent)
    assert torch.equal(found, tangent[gather])


@floating_dtypes
def test_unpermute_undoes_permute(dtype):
    """It does so to the bit. Slot s holds the row of token s // topk."""
    X, gather = rows_and_indices(11, dtype, 33)
    restored = unpermute(permute(X, gather, 3), gather)
    assert restored.dtype == dtype
    assert torch.equal(restored, X.repeat_interleave(3, 0))


@pytest.mark.parametrize(("function", "more"), [(permute, {"topk": 3}), (unpermute, {})])
def test_moving_rows_rejects_indices_of_no_integer_dtype(function, more):
    expected = "expected gather_indices to have an integer dtype, got torch.float32"
    call = {"X": torch.randn(33, 5), "gather_indices": torch.zeros(33), **more}
    found = checks.assert_rejects(TypeError, (), function, call)
    assert found == f"moe_ops.compat.{function.__name__}: {expected}"


def plain_topk(gating_output, top_k, use_sigmoid, renormalize, pre_act):
    """Compute it as a model does, with torch's own ops."""

    def score(logits):
        return logits.sigmoid() if use_sigmoid else logits.softmax(dim=-1)

    scores = score(gating_output) if pre_act else gating_output
    weights, ids = scores.topk(top_k, dim=-1)
    weights = weights if pre_act else score(weights)
    return weights / weights.sum(dim=-1, keepdim=True) if renormalize else weights, ids


@floating_dtypes
@pytest.mark.parametrize("pre_act", [True, False])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("use_sigmoid", [True, False])
def test_calculate_topk(use_sigmoid, renormalize, pre_act, dtype):
    # The logits are distinct in every dtype, because torch.topk promises nothing about ties.
    logits = torch.stack([torch.randperm(12) for _ in range(40)]).sub(6).div(4)
    logits = logits.to(dtype).requires_grad_()
    weights, ids = calculate_topk(
        logits, 3, use_sigmoid, renormalize, pre_act=pre_act, post_act=not pre_act
    )
    exact = logits.detach().double().requires_grad_()
    expected, expected_ids = plain_topk(exact, 3, use_sigmoid, renormalize, pre_act)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, expected_ids)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    checks.assert_close(weights, expected)
    tangent = torch.randn(40, 3, dtype=torch.float64)
    (found,) = torch.autograd.grad(weights, logits, tangent.to(weights.dtype))
    (wanted,) = torch.autograd.grad(expected, exact, tangent)

    checks.assert_close(found, wanted)


def test_calculate_topk_scores_before_the_selection_by_default():
    logits = torch.randn(6, 8)
    default = calculate_topk(logits, top_k=2, use_sigmoid=False, renormalize=False)
    checks.assert_close(default[0], logits.double().softmax(1).topk(2).values)


def test_equal_scores_go_to_the_lower_id():
    _, ids = calculate_topk(torch.zeros(4, 9), 3, use_sigmoid=False, renormalize=True)
    assert ids.tolist() == [[0, 1, 2]] * 4


@pytest.mark.parametrize(("act", "got"), [(True, "both"), (False, "neither")])
def test_calculate_topk_rejects(act, got):
    call = {
        "gating_output": torch.randn(4, 9), "top_k": 2, "use_sigmoid": True, "renormalize": False,
        "pre_act": act, "post_act": act,
    }  # fmt: skip
    found = checks.assert_rejects(ValueError, (), calculate_topk, call)
    text = f"expected exactly one of pre_act and post_act, got {got}"
    assert found == f"moe_ops.compat.calculate_topk: {text}"

# SPDX-License-Identifier: Apache-2.0
"""These tests are topk_routing's own. test_every_op.py holds what every op must do."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moe_ops
from testing import checks, masked_routing, oracle

moe = torch.ops.moe
FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
dtypes = pytest.mark.parametrize("dtype", FLOATING, ids=str)
scorings = pytest.mark.parametrize(
    ("score_function", "score_before_topk"),
    list(itertools.product(("softmax", "sigmoid"), (True, False))),
)


@scorings
@dtypes
def test_computed_in_fp32_or_fp64(score_function, score_before_topk, dtype):
    logits = torch.randn(9, 16).to(dtype)
    topk_weights, topk_ids = moe.topk_routing(
        logits, 3, None, score_function, score_before_topk, True
    )
    assert topk_weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert topk_ids.dtype == torch.int32
    expected = oracle.routing_weights(
        logits, topk_ids, score_function, score_before_topk, True, 1.0
    )
    checks.assert_close(topk_weights, expected)


@scorings
@dtypes
@pytest.mark.parametrize("num_experts", [1, 2, 7, 8, 31, 33, 160])
def test_ties_go_to_the_lower_id(score_function, score_before_topk, dtype, num_experts):
    """They do where equal logits lie in different vector lanes of a kernel, too."""
    top_k = min(num_experts, 8)
    logits = torch.full((5, num_experts), 0.3).to(dtype)
    _, ids = moe.topk_routing(logits, top_k, None, score_function, score_before_topk)
    assert ids.tolist() == [list(range(top_k))] * 5

    # Two values take turns. The ids of the higher come first, and each kind is in order.
    logits[:, 1::2] = 1.7
    _, ids = moe.topk_routing(logits, top_k, None, score_function, score_before_topk)
    order = [*range(1, num_experts, 2), *range(0, num_experts, 2)]
    assert ids.tolist() == [order[:top_k]] * 5


@pytest.mark.parametrize("group_score", ["top2_sum", "max"])
def test_tied_groups_go_to_the_lower_one(group_score):
    # In groups of three the best are equal, and so are the best pairs, in another order.
    logits = torch.tensor([[0.0, 2.0, 1.0, 1.0, 0.5, 2.0, 2.0, 1.0, -1.0]])
    _, ids = moe.topk_routing(logits, 2, None, "sigmoid", True, False, 3, 1, group_score, 1.0)
    assert ids.tolist() == [[1, 2]]


def test_scores_that_underflow_tie_in_fp32():
    logits = torch.tensor([[200.0, 0.0, 50.0, 0.0]])
    topk_weights, ids = moe.topk_routing(logits, 3)
    assert topk_weights.tolist() == [[1.0, 0.0, 0.0]]
    assert ids.tolist() == [[0, 1, 2]]


@scorings
def test_large_logits_stay_finite(score_function, score_before_topk):
    logits = torch.tensor([[1e4, -1e4, 3e4, 0.0]], requires_grad=True)
    topk_weights, _ = moe.topk_routing(logits, 2, None, score_function, score_before_topk, True)
    (grad,) = torch.autograd.grad(topk_weights.sum(), logits)
    assert topk_weights.isfinite().all()
    assert grad.isfinite().all()


def test_renormalizing_nothing_is_zero_and_finite():
    """All chosen scores are zero in fp32. 0 / (0 + 1e-20) is zero and not NaN."""
    logits = torch.full((2, 4), -200.0, requires_grad=True)
    topk_weights, _ = moe.topk_routing(logits, 2, None, "sigmoid", True, True)
    assert topk_weights.tolist() == [[0.0, 0.0]] * 2
    (grad,) = torch.autograd.grad(topk_weights.sum(), logits)
    assert grad.isfinite().all()


def test_groups_not_chosen_are_excluded_even_under_negative_choices():
    """An excluded expert has the choice -inf, not zero, because biased scores may be negative."""
    logits = torch.randn(9, 8)
    bias = torch.full((8,), -5.0)
    _, ids = moe.topk_routing(logits, 4, bias, "sigmoid", True, False, 4, 2)
    expected = oracle.topk_routing(logits, 4, bias, "sigmoid", True, False, 4, 2)[1]
    assert torch.equal(ids, expected)
    assert all(len({expert // 2 for expert in token}) == 2 for token in ids.tolist())


def test_selection_bias_has_no_gradient():
    logits = torch.randn(5, 4, requires_grad=True)
    bias = torch.zeros(4, requires_grad=True)
    moe.topk_routing(logits, 2, bias)[0].sum().backward()
    assert logits.grad is not None
    assert bias.grad is None


@pytest.mark.parametrize("needs_logits", [True, False])
def test_nothing_is_launched_where_only_the_bias_requires_grad(needs_logits):
    launched = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            launched.append(func)
            return func(*args, **(kwargs or {}))

    logits = torch.randn(5, 4, requires_grad=needs_logits)
    bias = torch.zeros(4, requires_grad=True)
    topk_weights, _ = moe.topk_routing(logits, 2, bias)
    with Count():
        topk_weights.sum().backward()
    assert bias.grad is None
    assert launched.count(moe.topk_routing_backward.default) == needs_logits


def test_bias_in_another_dtype():
    logits, bias = torch.randn(9, 8), torch.randn(8)
    for dtype in FLOATING:
        rounded = bias.to(dtype)
        _, ids = moe.topk_routing(logits.double(), 2, rounded)
        assert torch.equal(ids, oracle.topk_routing(logits, 2, rounded)[1])


def test_deepseek_v3_router_of_transformers():
    """It limits groups, adds a bias, renormalises and scales, as the model itself does."""
    modeling = pytest.importorskip(
        "transformers.models.glm4_moe.modeling_glm4_moe", reason="compares with transformers"
    )
    configuration = pytest.importorskip("transformers.models.glm4_moe.configuration_glm4_moe")
    config = configuration.Glm4MoeConfig(
        hidden_size=16, num_experts_per_tok=4, n_routed_experts=16, n_group=4, topk_group=2,
        norm_topk_prob=True, routed_scaling_factor=2.5,
    )  # fmt: skip
    router = modeling.Glm4MoeTopkRouter(config)
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight)
    torch.nn.init.normal_(router.e_score_correction_bias, std=0.1)
    hidden = torch.randn(40, 16)
    logits, expected, expected_ids = router(hidden)
    topk_weights, topk_ids = moe.topk_routing(
        logits, 4, router.e_score_correction_bias, "sigmoid", True, True, 4, 2, "top2_sum", 2.5
    )
    # transformers' topk does not sort.
    order, expected_order = topk_ids.sort(1), expected_ids.sort(1)
    assert torch.equal(order.values, expected_order.values.int())
    torch.testing.assert_close(
        topk_weights.gather(1, order.indices), expected.gather(1, expected_order.indices)
    )


@pytest.mark.parametrize("case", masked_routing.CASES)
def test_masked_experts(case):
    logits, top_k, bias, flags, expected = masked_routing.CASES[case]
    selection_bias = None if bias is None else torch.tensor(bias)
    _, topk_ids = moe_ops.topk_routing(torch.tensor([logits]), top_k, selection_bias, *flags)
    assert topk_ids.tolist() == [expected]

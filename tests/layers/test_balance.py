# SPDX-License-Identifier: Apache-2.0
"""update_selection_bias_, Router.token_counts and load_balance_metrics equal plain loops."""

import copy
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_ops import routing_indices
from moe_ops.layers import (
    Experts,
    MoE,
    Router,
    load_balance_metrics,
    update_selection_bias_,
)

DEEPSEEK: dict[str, Any] = {
    "score_function": "sigmoid",
    "renormalize": True,
    "num_groups": 4,
    "top_groups": 2,
    "selection_bias": True,
    "logits_dtype": torch.float32,
}


def updated_by_loops(selection_bias, token_counts, rate):
    """Return the new bias by its definition, in fp64, with an exact mean."""
    mean = Fraction(sum(token_counts), len(token_counts))
    moved = []
    for bias, count in zip(selection_bias, token_counts, strict=True):
        sign = (mean > count) - (mean < count)
        moved.append(bias + rate * sign)
    return torch.tensor(moved, dtype=torch.float64)


def counts_by_loops(topk_ids, num_experts, counted):
    counts = [0] * num_experts
    for row, is_counted in zip(topk_ids.tolist(), counted, strict=True):
        for expert in row:
            counts[expert] += bool(is_counted)
    return counts


def metrics_by_loops(counts):
    total, num_experts = sum(counts), len(counts)
    shares = [n / total if total else 1 / num_experts for n in counts]
    return {
        "max_over_mean": max(shares) / (sum(shares) / num_experts),
        "dead_experts": sum(n == 0 for n in counts),
        "entropy": -sum(p * math.log(p) for p in shares if p > 0),
    }


def test_update_by_hand():
    """The mean is 3: one expert is above it, one below, two on it."""
    bias = torch.tensor([0.5, 0.5, 0.5, -0.25], dtype=torch.float64)
    counts = torch.tensor([5, 1, 3, 3], dtype=torch.int32)
    expected = [0.5 - 0.125, 0.5 + 0.125, 0.5, -0.25]
    assert updated_by_loops(bias.tolist(), counts.tolist(), 0.125).tolist() == expected
    assert update_selection_bias_(bias, counts, 0.125) is bias
    assert bias.tolist() == expected
    assert counts.tolist() == [5, 1, 3, 3]


@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    factor=st.sampled_from([1, 1000, 2**50 + 1]),
    rate=st.sampled_from([1e-3, 0.5, 0.0]),
)
def test_update_matches_reference(counts, factor, rate):
    """Few levels, so that experts lie on the mean, and counts that fp64 does not hold exactly."""
    counts = [factor * count for count in counts]
    bias = torch.randn(len(counts), dtype=torch.float64)
    expected = updated_by_loops(bias.tolist(), counts, rate)
    assert torch.equal(update_selection_bias_(bias, torch.tensor(counts), rate), expected)


def test_update_of_a_parameter_records_no_gradient():
    """DeepSeek-V3's own code has one."""
    bias = torch.nn.Parameter(torch.zeros(2))
    update_selection_bias_(bias, torch.tensor([3, 1]), 1e-3)
    assert bias.tolist() == torch.tensor([-1e-3, 1e-3]).tolist()
    assert bias.grad_fn is None
    assert bias.grad is None


def make_router(dtype=torch.float32):
    router = Router(16, 8, 3, **DEEPSEEK, dtype=dtype)
    assert router.e_score_correction_bias is not None
    router.e_score_correction_bias.normal_(std=0.1)
    return router


@given(
    num_tokens=st.integers(0, 9),
    ties=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    deepseek=st.booleans(),
    data=st.data(),
)
def test_counts_are_of_what_forward_chose(num_tokens, ties, dtype, deepseek, data):
    router = make_router(dtype) if deepseek else Router(16, 8, 3, dtype=dtype)
    if ties:
        with torch.no_grad():
            router.weight.copy_(router.weight[:2].repeat(4, 1))
    router_logits, _, topk_ids = router(torch.randn(num_tokens, 16, dtype=dtype))
    counted = data.draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
    found = router.token_counts(router_logits, torch.tensor(counted))
    assert found.tolist() == counts_by_loops(topk_ids, 8, counted)
    found = router.token_counts(router_logits)
    assert found.dtype == torch.int64
    assert found.tolist() == routing_indices(topk_ids, 8)[0].tolist()


def test_counts_do_not_read_padding():
    router = make_router()
    logits, mask = torch.randn(6, 8), torch.tensor([1, 0, 1, 1, 0, 1])
    padded = logits.masked_fill(mask[:, None] == 0, float("nan"))
    expected = router.token_counts(logits[mask == 1])
    assert torch.equal(router.token_counts(padded, mask.view(2, 3)), expected)
    assert expected.sum() == 4 * 3


def test_method_moves_the_routers_bias():
    router, counts = make_router(), torch.arange(8)
    expected = update_selection_bias_(router.e_score_correction_bias.clone(), counts, 1e-3)
    before = router.e_score_correction_bias
    router.update_selection_bias_(counts, 1e-3)
    assert router.e_score_correction_bias is before
    assert torch.equal(before, expected)


def test_updates_balance_a_router():
    """Nothing but the bias learns, and the busiest expert loses what it had too much."""
    router = Router(16, 8, 2, score_function="sigmoid", selection_bias=True)
    with torch.no_grad():
        router.weight[:2] += 0.2
    tokens = torch.randn(512, 16) + 0.5

    def max_over_mean():
        return load_balance_metrics(router.token_counts(router(tokens)[0]))["max_over_mean"].item()

    before = max_over_mean()
    for _ in range(200):
        router.update_selection_bias_(router.token_counts(router(tokens)[0]), 5e-3)
    assert before > 2
    assert max_over_mean() < 1.1


def make_layer():
    router = Router(16, 8, 2, **DEEPSEEK, dtype=torch.bfloat16)
    return MoE(router, Experts(8, 16, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_loop_in_bf16(backend):
    """A compiled training step counts, and a compiled update moves the fp32 bias of a bf16 layer."""
    layer = make_layer()
    eager = copy.deepcopy(layer)

    def step(layer, hidden_states, mask):
        output, router_logits = layer(hidden_states)
        return output.square().mean(), layer.router.token_counts(router_logits, mask)

    def update(router, counts):
        router.update_selection_bias_(counts, 1e-3)

    compiled_step, compiled_update = (
        torch.compile(function, fullgraph=True, backend=backend) for function in (step, update)
    )
    for num_tokens in (6, 9, 9):
        hidden_states = torch.randn(2, num_tokens, 16).bfloat16()
        mask = torch.rand(2, num_tokens) < 0.8
        loss, counts = compiled_step(layer, hidden_states, mask)
        loss.backward()
        compiled_update(layer.router, counts)
        _, expected = step(eager, hidden_states, mask)
        assert torch.equal(counts, expected)
        assert expected.sum() == mask.sum() * 2
        update(eager.router, expected)
    bias = layer.router.e_score_correction_bias
    assert bias.dtype == torch.float32
    assert torch.equal(bias, eager.router.e_score_correction_bias)
    assert bias.any()


def test_nothing_is_read_on_the_host():
    """Meta tensors have no values to read."""
    router = Router(16, 8, 3, **DEEPSEEK, device="meta")
    counts = router.token_counts(torch.empty(5, 8, device="meta"), torch.ones(5, device="meta"))
    router.update_selection_bias_(counts, 1e-3)
    assert {value.shape for value in load_balance_metrics(counts).values()} == {torch.Size([])}


def test_autocast_changes_nothing():
    router, counts = make_router(), torch.arange(8)
    logits = torch.randn(7, 8)
    expected = update_selection_bias_(router.e_score_correction_bias.clone(), counts, 1e-3)
    in_fp32 = router.token_counts(logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router.token_counts(logits), in_fp32)
        router.update_selection_bias_(counts, 1e-3)
    assert torch.equal(router.e_score_correction_bias, expected)


def test_metrics_by_hand():
    """Shares 1/2, 1/4, 1/4, 0: log 2 / 2 + log 4 / 2 nats."""
    expected = {"max_over_mean": 2.0, "dead_experts": 1.0, "entropy": 1.5 * math.log(2)}
    counts = [4, 2, 2, 0]
    assert metrics_by_loops(counts) == pytest.approx(expected)
    found = load_balance_metrics(torch.tensor(counts, dtype=torch.int32))
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected)


@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=3))
def test_metrics_match_reference(layers):
    found = load_balance_metrics(torch.tensor(layers))
    for index, counts in enumerate(layers):
        values = {name: value[index].item() for name, value in found.items()}
        assert values == pytest.approx(metrics_by_loops(counts), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("bias", "counts", "error", "message"),
    [
        (torch.zeros(4), torch.zeros(3).long(), ValueError, r"of one shape .* \(4,\) and \(3,\)"),
        (torch.zeros(2, 2), torch.zeros(2, 2).long(), ValueError, r"one shape \(num_experts,\)"),
        (torch.zeros(4).half(), torch.zeros(4).long(), TypeError, "float16, where small steps"),
        (torch.zeros(4).long(), torch.zeros(4).long(), TypeError, "or float64, got int64$"),
        (torch.zeros(4), torch.zeros(4), TypeError, "integers, got float32; pass token_counts.lon"),
    ],
)
def test_update_rejects(bias, counts, error, message):
    with pytest.raises(error, match=message):
        update_selection_bias_(bias, counts, 1e-3)


@pytest.mark.parametrize("counts", [torch.zeros(0), torch.zeros(2, 0), torch.tensor(3)])
def test_metrics_need_an_expert(counts):
    with pytest.raises(ValueError, match=r"token_counts of shape .* with an expert, got"):
        load_balance_metrics(counts)


def test_advice_for_a_bias_in_bf16_works():
    router = make_router().to(torch.bfloat16)
    with pytest.raises(TypeError, match=r"e_score_correction_bias.float\(\)"):
        router.update_selection_bias_(torch.arange(8), 1e-3)
    router.e_score_correction_bias = router.e_score_correction_bias.float()
    router.update_selection_bias_(torch.arange(8), 1e-3)
    assert "e_score_correction_bias" in router.state_dict()


def test_router_rejects():
    with pytest.raises(ValueError, match="selection bias, got one without; make it with"):
        Router(16, 8, 3).update_selection_bias_(torch.arange(8), 1e-3)
    with pytest.raises(ValueError, match=r"one element per token \(4\), got 3"):
        make_router().token_counts(torch.zeros(4, 8), torch.ones(3))
    for shape in ((4, 9), (8,), (2, 2, 8)):
        with pytest.raises(
            ValueError, match=r"token_counts: expected .* \(num_tokens, num_experts"
        ):
            Router(16, 8, 3).token_counts(torch.zeros(shape))

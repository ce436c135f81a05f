# SPDX-License-Identifier: Apache-2.0
"""The sample that judges a block's results: what it finds, and whom it lets through."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import moe_ops
from benchmarks import suite
from benchmarks.cuda import gpt_oss, sampled, sweep
from benchmarks.cuda.experts import BOTH, EAGER, FORWARD, Implementation
from benchmarks.cuda.timing import OURS, Bench
from testing import reference

TINY = suite.TINY_SUITE[0]
GPT_OSS = replace(TINY, name="gpt-oss", is_gpt_oss=True)
CEILINGS = {"dense_tflops": 790.0, "copy_tbs": 4.3, "read_tbs": 4.4}


# 512 rows an expert, in whose sums bf16 loses more than in a product.
MANY_ROWS = replace(GPT_OSS, name="many rows", num_tokens=1024)


class Bf16Bench(Bench):
    """transformers' bf16, whose sums of the biases' gradients are rounded after each addition."""

    dtype = torch.bfloat16


def bench(kind=Bench):
    return kind(torch.device("cpu"), tiny=True, seconds=0.0, least_turns=2, ceilings=CEILINGS)


@pytest.mark.parametrize("shape", [TINY, GPT_OSS], ids=lambda shape: shape.name)
@pytest.mark.parametrize("routing", ["uniform", "zipf", "hot_and_empty"])
def test_the_sample_is_the_whole_reference(monkeypatch, shape, routing):
    """Taken in pieces of a few tokens, against autograd on the whole block."""
    monkeypatch.setattr(sampled, "_CHUNK", 5 * shape.hidden_size)
    torch.manual_seed(0)
    block = sweep.make_block(bench(), shape)
    topk_ids = block.route(routing)
    sample = sampled.Sample(block, topk_ids)
    leaves = [leaf.detach().double().requires_grad_() for leaf in block.leaves]
    arguments: dict[str, Any] = {
        **block.parameters(leaves),
        **block.options,
        "rounds_to": block.bench.dtype if shape.is_gpt_oss else torch.float64,
    }
    output = reference.fused_experts(
        leaves[0], topk_ids=topk_ids, topk_weights=leaves[3], **arguments
    )
    expected = (output, *torch.autograd.grad(output, leaves, block.grad_output.double()))
    assert sample.error(expected) < 1e-6
    assert sample.error(expected[:1]) < 1e-6


@pytest.mark.parametrize("shape", [TINY, GPT_OSS], ids=lambda shape: shape.name)
@pytest.mark.parametrize("which", range(5))
def test_the_sample_finds_a_wrong_result(shape, which):
    torch.manual_seed(0)
    block = sweep.make_block(bench(), shape)
    topk_ids = block.route("uniform")
    results = list(gpt_oss.ours(block).call(BOTH, topk_ids, block.grad_output)())
    sample = sampled.Sample(block, topk_ids)
    assert sample.error(results) <= block.bench.tolerance
    for spoiled in (1.1, math.nan):
        wrong = [result * spoiled if i == which else result for i, result in enumerate(results)]
        assert not sample.error(wrong) <= block.bench.tolerance


@pytest.mark.parametrize("which", range(7))
def test_gpt_oss_biases_and_all_are_judged(which):
    torch.manual_seed(0)
    block = sweep.make_block(bench(), GPT_OSS)
    topk_ids = block.route("uniform")
    results = list(gpt_oss.ours(block).call(BOTH, topk_ids, block.grad_output)())
    assert len(results) == 7
    results[which] = results[which] * 1.1
    assert sampled.Sample(block, topk_ids).error(results) > block.bench.tolerance


def test_what_the_sample_leaves_out_is_compared_with_the_peer(monkeypatch):
    """One element of the gradients of the weights, outside of the sampled columns."""
    monkeypatch.setattr(sampled, "NUM_COLUMNS", 2)
    monkeypatch.setattr(sampled, "NUM_TOKENS", 2)
    torch.manual_seed(0)
    block = sweep.make_block(bench(), TINY)
    topk_ids = block.route("uniform")
    columns = sampled.Sample(block, topk_ids).columns.tolist()
    outside = next(i for i in range(TINY.intermediate_size) if i not in columns)
    right = sweep.implementations_of(block, None)

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            grad = grad.clone()
            grad[0, outside] += 10
            return grad

    def forward(ids):
        parameters = (Spoil.apply(block.gate_up_proj), block.down_proj)
        return reference.fused_experts(
            block.hidden_states, *parameters, ids, block.topk_weights
        ).to(block.bench.dtype)

    found = {**right, OURS: Implementation(forward, block.leaves)}
    comparison = sampled.SampledComparison(block, topk_ids, found)
    assert not comparison.failed
    assert comparison.is_right(OURS, FORWARD)
    assert not comparison.is_right(OURS, BOTH)
    assert comparison.is_right(EAGER, BOTH)


def test_a_failure_is_told_and_the_other_is_measured():
    block = sweep.make_block(bench(), TINY)

    def fail(topk_ids):
        raise RuntimeError("out of memory\nand more")

    right = sweep.implementations_of(block, None)
    found = {**right, EAGER: Implementation(fail, block.leaves)}
    comparison = sampled.SampledComparison(block, block.route("uniform"), found)
    record = comparison.measure(BOTH, {EAGER: (EAGER, OURS)})
    json.dumps(record, allow_nan=False)
    assert record["failed"] == {EAGER: "RuntimeError: out of memory"}
    assert record["wrong"] == [EAGER]
    assert set(record["milliseconds"]) == {OURS}
    assert record["ratio"] == {}


def test_a_sketch_is_of_every_element():
    result = torch.randn(3, 4, 5)
    (before,) = sampled.sketch([result])
    assert before.shape == (12,)
    for i in range(60):
        changed = result.flatten().clone()
        changed[i] += 1
        (after,) = sampled.sketch([changed.view(3, 4, 5)])
        assert (after != before).nonzero().flatten().tolist() == [i // 5]


# A peer that is less exact


class Scaled(torch.autograd.Function):
    """Its gradient is too large by a factor, in all of its rows or in one."""

    @staticmethod
    def forward(ctx, x, factor, row):
        ctx.factor, ctx.row = factor, row
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[ctx.row] *= ctx.factor
        return grad, None, None


def spoiled(block, which, factor, row=slice(None)):
    """Our own way to compute a block, with a gradient that is wrong."""
    leaves = list(block.leaves)

    def forward(topk_ids):
        given = list(leaves)
        given[which] = Scaled.apply(given[which], factor, row)
        return moe_ops.fused_experts(
            given[0],
            topk_ids=topk_ids,
            topk_weights=given[3],
            **block.parameters(given),
            **block.options,
        )

    return Implementation(forward, block.leaves)


def compared(**others):
    """What is found of a block with many rows; `others` make implementations of it."""
    torch.manual_seed(0)
    block = sweep.make_block(bench(Bf16Bench), MANY_ROWS)
    found = {OURS: gpt_oss.ours(block)} | {who: make(block) for who, make in others.items()}
    return sampled.SampledComparison(block, block.route("uniform"), found)


def transformers_way(block):
    pytest.importorskip("transformers")
    return sweep.implementations_of(block, None)[EAGER]


def test_sums_of_the_biases_in_bf16_are_timed():
    comparison = compared(eager=transformers_way)
    record = comparison.measure(BOTH, {EAGER: (EAGER, OURS)})
    json.dumps(record, allow_nan=False)
    assert "wrong" not in record
    assert set(record["milliseconds"]) == {OURS, EAGER}
    assert record["errors"][OURS] < comparison.bench.tolerance < record["errors"][EAGER]
    less_exact = record["less_exact"][EAGER]
    assert set(less_exact) == set(sampled.BIASES)
    for told in less_exact.values():
        assert comparison.bench.tolerance < told["error"] < told["tolerance"] < 0.05
    assert "less_exact" not in comparison.measure(FORWARD, {EAGER: (EAGER, OURS)})


@pytest.mark.parametrize(
    ("which", "factor"),
    [(0, 1.03), (1, 1.03), (2, 1.03), (3, 1.03), (4, 1.1), (5, 1.1), (4, math.nan), (5, math.nan)],
)
def test_a_peer_that_is_wrong_is_refused(which, factor):
    """Of the biases' gradients one tenth is too much, and of the others three hundredths."""
    comparison = compared(eager=lambda block: spoiled(block, which, factor))
    assert comparison.is_right(OURS, BOTH)
    assert comparison.is_right(EAGER, FORWARD)
    record = comparison.measure(BOTH, {EAGER: (EAGER, OURS)})
    assert record["wrong"] == [EAGER]
    assert set(record["milliseconds"]) == {OURS}
    assert "less_exact" not in record


def test_a_peer_without_the_rows_of_one_expert_is_refused():
    comparison = compared(eager=lambda block: spoiled(block, 5, 0.0, row=0))
    assert not comparison.is_right(EAGER, BOTH)


@pytest.mark.parametrize("which", range(6))
def test_ours_has_no_tolerance_of_its_own(which, monkeypatch):
    monkeypatch.setattr(gpt_oss, "ours", lambda block: spoiled(block, which, 1.03))
    comparison = compared(eager=transformers_way)
    assert comparison.errors[BOTH][OURS] < 0.05
    assert not comparison.is_right(OURS, BOTH)
    assert comparison.is_right(EAGER, BOTH)


def test_ours_is_compared_with_a_less_exact_peer_outside_of_the_sample(monkeypatch):
    """A column of gate_up_bias, whose gradient the sample does not have."""
    monkeypatch.setattr(sampled, "NUM_COLUMNS", 2)
    block = sweep.make_block(bench(), MANY_ROWS)
    columns = sampled.Sample(block, block.route("uniform")).columns.tolist()
    outside = next(i for i in range(MANY_ROWS.intermediate_size) if i not in columns)
    row = (slice(None), 2 * outside)
    monkeypatch.setattr(gpt_oss, "ours", lambda block: spoiled(block, 4, 2.0, row))
    comparison = compared(eager=transformers_way)
    assert not comparison.is_right(OURS, BOTH)
    assert comparison.is_right(EAGER, BOTH)


def test_the_tolerance_of_a_peer_grows_with_its_rows():
    one_expert = torch.zeros(4096, 1, dtype=torch.int32)
    few = sampled.peer_tolerances(bench(Bf16Bench), one_expert[:16])
    many = sampled.peer_tolerances(bench(Bf16Bench), one_expert)
    assert set(few.values()) == {bench(Bf16Bench).tolerance}
    assert many == few | dict.fromkeys(sampled.BIASES, 0.125)

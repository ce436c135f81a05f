# SPDX-License-Identifier: Apache-2.0
"""Autocast casts the operands of GEMMs and leaves everything else as it is."""

import pytest
import torch

from moe_ops._core.library import SCHEMAS
from testing import checks
from testing.moe_block import BLOCKS, loss_and_gradients, make_tokens, make_weights
from testing.strategies import PRESENT, Sample, seeded_sample, variants

moe = torch.ops.moe
LOW = (torch.bfloat16, torch.float16)
low_precision = pytest.mark.parametrize("dtype", LOW, ids=str)


def gemm(dtype: torch.dtype = torch.float32) -> Sample:
    return seeded_sample(
        SCHEMAS["grouped_gemm"], 3, T=5, D=8, N=8, E=3, dtype=dtype, routing="uniform",
        topk_weights=PRESENT, bias=PRESENT, gather_indices=PRESENT, layout="contiguous",
    )  # fmt: skip


@low_precision
def test_grouped_gemm_casts_input_weight_and_bias_alone(dtype):
    sample = gemm()
    cast = {name: sample.arguments[name].to(dtype) for name in ("input", "weight", "bias")}
    expected = sample(**cast)
    rounded = sample(**cast, topk_weights=sample.arguments["topk_weights"].to(dtype))
    with torch.autocast("cpu", dtype):
        output = sample()
        by_keyword = moe.grouped_gemm(**sample.arguments)
    assert output.dtype == dtype
    assert torch.equal(output, expected)
    assert torch.equal(by_keyword, expected)
    # On these values a cast of topk_weights would show.
    assert not torch.equal(rounded, expected)


@low_precision
def test_gradients_come_back_in_the_dtype_of_the_arguments(dtype):
    sample = gemm()
    arguments = sample.requiring_grad()
    names = sample.differentiable()
    with torch.autocast("cpu", dtype):
        output = sample(**arguments)
    grads = torch.autograd.grad(output, [arguments[n] for n in names], torch.ones_like(output))
    expected = checks.oracle_gradients(sample, torch.ones_like(output))
    for name, grad in zip(names, grads, strict=True):
        assert grad.dtype == torch.float32
        checks.assert_close(grad, expected[name], dtype=dtype, what=name)


def test_mixed_operands_meet_in_the_autocast_dtype():
    sample = gemm()
    with torch.autocast("cpu", torch.bfloat16):
        output = sample(input=sample.arguments["input"].to(torch.bfloat16))
    assert output.dtype == torch.bfloat16


def test_fp64_is_left():
    sample = gemm(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        output = sample()
    assert output.dtype == torch.float64
    assert torch.equal(output, sample())


@low_precision
def test_fused_experts_casts_rows_weights_and_biases_alone(dtype):
    sample = seeded_sample(
        SCHEMAS["fused_experts"], 1, T=6, H=8, I=4, E=3, K=2, dtype=torch.float32,
        routing="uniform", layout="contiguous", gate_up_bias=PRESENT, down_bias=PRESENT,
    )  # fmt: skip
    names = ["hidden_states", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias"]
    cast = {name: sample.arguments[name].to(dtype) for name in names}
    expected = sample(**cast)
    rounded = sample(**cast, topk_weights=sample.arguments["topk_weights"].to(dtype))
    arguments = sample.requiring_grad()
    with torch.autocast("cpu", dtype):
        without_grad, output = sample(), sample(**arguments)
    assert output.dtype == dtype
    assert torch.equal(output, expected)
    assert torch.equal(without_grad, expected)
    assert not torch.equal(rounded, expected)
    for name, grad in zip(
        sample.differentiable(),
        torch.autograd.grad(
            output, [arguments[n] for n in sample.differentiable()], torch.ones_like(output)
        ),
        strict=True,
    ):
        assert grad.dtype == torch.float32, name


@pytest.mark.parametrize(
    "name", [n for n in sorted(SCHEMAS) if not any(a.autocast for a in SCHEMAS[n].arguments)]
)
def test_nothing_within_an_op_is_autocast(name):
    """A backward may run under autocast, and an implementation may call torch.mm. It stays fp32."""
    for seed, variant in enumerate(variants(SCHEMAS[name])):
        sample = seeded_sample(SCHEMAS[name], seed, **variant, T=5, dtype=torch.float32)
        expected = checks.as_tuple(sample())
        with torch.autocast("cpu", torch.bfloat16):
            outputs = checks.as_tuple(sample())
        for got, want in zip(outputs, expected, strict=True):
            assert got.dtype == want.dtype, sample
            assert torch.equal(got, want), sample


def test_disabled_autocast_casts_nothing():
    sample = gemm()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            inside = sample()
        assert sample().dtype == torch.bfloat16
    assert inside.dtype == torch.float32
    assert torch.equal(inside, sample())


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_topk_routing_stays_fp32(logits_dtype):
    logits = torch.randn(9, 8).to(logits_dtype).requires_grad_()
    expected, expected_ids = moe.topk_routing(logits, 2, renormalize=True)
    with torch.autocast("cpu", torch.bfloat16):
        topk_weights, topk_ids = moe.topk_routing(logits, 2, renormalize=True)
    assert topk_weights.dtype == torch.float32
    assert torch.equal(topk_weights, expected)
    assert torch.equal(topk_ids, expected_ids)


@pytest.mark.parametrize("name", ["permute", "unpermute"])
def test_row_movers_keep_their_dtype(name):
    sample = seeded_sample(SCHEMAS[name], 0, T=5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = sample()
    assert output.dtype == torch.float32
    assert torch.equal(output, sample())


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_compiled_equals_eager(name):
    def block(hidden, weights):
        with torch.autocast("cpu", torch.bfloat16):
            return BLOCKS[name](hidden, weights)

    hidden, weights = make_tokens(6), make_weights()
    eager = loss_and_gradients(block, hidden, weights)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    got = loss_and_gradients(compiled, hidden, weights)
    for position, (actual, want) in enumerate(zip(got, eager, strict=True)):
        assert actual.dtype == want.dtype
        checks.assert_close(
            actual, want, dtype=torch.bfloat16, what=f"output or gradient {position}"
        )


def test_autocast_around_a_compiled_block():
    hidden, weights = make_tokens(6), make_weights()
    compiled = torch.compile(BLOCKS["fused"], fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        got, want = compiled(hidden, weights), BLOCKS["fused"](hidden, weights)
    assert got.dtype == want.dtype == torch.bfloat16
    checks.assert_close(got, want)

# SPDX-License-Identifier: Apache-2.0
"""Quantised weights on a GPU: the decoder bit for bit, products beside plain ones, memory."""

import pytest
import torch

import moe_ops
from moe_ops import quantize_weight
from moe_ops._pytorch.dequantize import dequantize_weight
from moe_ops.quantization.formats import FORMATS
from testing.on_device import DEVICE, assert_same_bits, memory_slot, move
from testing.quantized_problem import KINDS, assert_equal, stored, values_of

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
kinds = pytest.mark.parametrize(("format", "encoding", "group_size"), KINDS)
formats = pytest.mark.parametrize("format", FORMATS)
# E, N, D: whole blocks, a part of one, odd widths, one element, several tiles of a row, nothing.
SHAPES = [
    (3, 130, 256), (3, 130, 70), (2, 5, 1000), (2, 3, 2043), (1, 1, 1), (2, 300, 5120), (2, 3, 7168),
    (0, 3, 64), (2, 3, 0),
]  # fmt: skip
# The projections of qwen3-30b and gpt-oss-20b.
REAL = [(128, 1536, 2048), (128, 2048, 768), (32, 5760, 2880), (32, 2880, 2880)]


def check(arguments, dtype):
    on_device = [move(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    got = torch.ops.moe.dequantize_weight.default(*on_device, dtype)
    assert_equal(got.cpu(), dequantize_weight(*(*arguments, dtype)))


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decodes_bit_for_bit(format, encoding, group_size, dtype):
    for seed, shape in enumerate(SHAPES):
        check(stored(format, encoding, group_size, shape, seed), dtype)


@formats
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_decodes_real_weights_bit_for_bit(format, shape):
    with memory_slot():
        weight = quantize_weight(torch.randn(shape, device=DEVICE).bfloat16() / 32, format)
        got = weight.dequantize()
        expected = dequantize_weight(*(*weight.stored, shape[2], torch.bfloat16))
        assert torch.equal(got, expected)


def problem(format, num_tokens=300):
    generator = torch.Generator(DEVICE).manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, device=DEVICE, generator=generator).bfloat16()

    up = quantize_weight(randn(8, 512, 320) / 16, format)
    down = quantize_weight(randn(8, 320, 256) / 16, format)
    hidden_states = randn(num_tokens, 320).requires_grad_()
    keys = torch.rand(num_tokens, 8, device=DEVICE, generator=generator)
    topk_weights = torch.rand(num_tokens, 2, device=DEVICE, generator=generator).requires_grad_()
    return up, down, hidden_states, keys.topk(2).indices.int(), topk_weights


def step(up, down, hidden_states, topk_ids, topk_weights, **options):
    output = moe_ops.fused_experts(hidden_states, up, down, topk_ids, topk_weights, **options)
    leaves = [hidden_states, topk_weights]
    return output, *torch.autograd.grad(output, leaves, torch.ones_like(output))


@formats
@pytest.mark.parametrize("num_tokens", [300, 4])
@pytest.mark.parametrize("weights_before", [False, True])
@pytest.mark.parametrize("recompute", ["none", "pre_activation"])
def test_experts_equal_those_with_plain_weights(format, num_tokens, weights_before, recompute):
    """The later calls are replayed: they free and allocate what the first ones did."""
    options = {"weights_before": weights_before, "recompute": recompute}
    up, down, *others = problem(format, num_tokens)
    plain = [values_of(weight, torch.bfloat16) for weight in (up, down)]
    want = step(*plain, *others, **options)
    for _ in range(4):
        assert_same_bits(step(up, down, *others, **options), want)


@formats
def test_a_step_in_a_graph(format):
    given = problem(format)
    want = step(*given)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        got = step(*given)
    graph.replay()
    assert_same_bits(got, want)


@formats
def test_no_dequantised_weight_is_kept(format):
    with memory_slot(all_of_them=True):
        shape = (32, 2048, 2048)
        up = quantize_weight(torch.randn(shape, device=DEVICE).bfloat16(), format)
        down = quantize_weight(torch.randn(32, 2048, 1024, device=DEVICE).bfloat16(), format)
        hidden_states = torch.randn(64, 2048, device=DEVICE).bfloat16().requires_grad_()
        topk_ids = torch.randint(0, 32, (64, 2), device=DEVICE)
        topk_weights = torch.rand(64, 2, device=DEVICE).requires_grad_()
        large = 2 * 32 * 2048 * 2048
        for _ in range(4):
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            output = moe_ops.fused_experts(hidden_states, up, down, topk_ids, topk_weights)
            assert torch.cuda.memory_allocated() - before < large / 16
            output.sum().backward()
            # The larger weight alone, not both.
            assert torch.cuda.max_memory_allocated() - before < 1.25 * large
            del output
            hidden_states.grad = topk_weights.grad = None

# SPDX-License-Identifier: Apache-2.0
"""Quantised weights on a GPU: the decoder bit for bit, products beside plain ones, memory."""

import pytest
import torch

import moe_ops
from moe_ops import quantize_weight
from moe_ops._pytorch.dequantize import dequantize_weight
from moe_ops._triton import replay, weight_plan
from moe_ops.layers import Experts
from moe_ops.layers.lora import LoraExperts
from moe_ops.quantization.formats import FORMATS
from testing import device_memory, dropped_slots, experts_problem, gemm_problem
from testing.on_device import DEVICE, assert_same_bits, memory_slot, move
from testing.quantized_problem import (
    KINDS,
    QuantizedExperts,
    QuantizedGemm,
    assert_equal,
    stored,
    values_of,
)

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
    gradients = torch.autograd.grad(output, leaves, torch.ones_like(output))
    # With its graph it would keep nodes of the leaves, which belong to the stream that it was made on.
    return output.detach(), *gradients


@formats
@pytest.mark.parametrize("weights_before", [False, True])
@pytest.mark.parametrize("recompute", ["none", "pre_activation"])
def test_many_rows_equal_those_with_plain_weights(format, weights_before, recompute):
    """The later calls are replayed: they free and allocate what the first ones did."""
    options = {"weights_before": weights_before, "recompute": recompute}
    up, down, *others = problem(format)
    plain = [values_of(weight, torch.bfloat16) for weight in (up, down)]
    want = step(*plain, *others, **options)
    for _ in range(4):
        assert_same_bits(step(up, down, *others, **options), want)


# T, K, E, N, D: few rows an expert, whose products decode; some experts have several tiles of rows.
DECODED = {
    "decode": (6, 4, 32, 256, 512), "decode-odd": (3, 2, 8, 67, 131), "some": (100, 2, 8, 200, 328),
    "more": (250, 2, 8, 136, 264), "qwen3": (8, 8, 128, 1536, 2048), "gptoss": (8, 4, 32, 360, 2880),
}  # fmt: skip


@pytest.mark.parametrize(("format", "group_size"), sorted({(f, size) for f, _, size in KINDS}))
@pytest.mark.parametrize("shape", DECODED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_decoded_in_the_product(format, group_size, shape, dtype):
    given = gemm_problem.problem(
        DECODED[shape], dtype, routing="dropped", permute_x=True, weights=True, bias=True
    )
    gemm_problem.check(QuantizedGemm(given, format, group_size=group_size))


@pytest.mark.parametrize("format", [None, *FORMATS])
@pytest.mark.parametrize("adapters", [False, True])
def test_the_weights_of_dropped_slots_are_not_read(format, adapters):
    """Of few rows: no schedule counts the rows that belong to an expert."""
    layer = Experts(4, 128, 64, device=DEVICE, dtype=torch.bfloat16)
    if format is not None:
        layer.quantize_(format)
    module = LoraExperts(layer, rank=2) if adapters else layer

    def on_device(hidden_states, topk_ids, topk_weights):
        arguments = (hidden_states, topk_ids, topk_weights)
        return module(*(tensor.to(DEVICE) for tensor in arguments)).cpu()

    hidden_states = torch.randn(12, 128).bfloat16()
    dropped_slots.assert_not_read(on_device, hidden_states, 4, top_k=2)


@formats
@pytest.mark.parametrize("mode", gemm_problem.MODES)
@pytest.mark.parametrize("shape", ["decode", "moonlight"])
def test_modes_of_the_product(format, mode, shape):
    sizes = {**gemm_problem.SHAPES, **DECODED}[shape]
    given = gemm_problem.problem(
        sizes, torch.bfloat16, routing="dropped", **gemm_problem.MODES[mode]
    )
    gemm_problem.check(QuantizedGemm(given, format))


# T, K, E, H, I.
EXPERTS = {
    "decode": (5, 4, 32, 512, 200),
    "some": (100, 2, 8, 328, 136),
    "many": (900, 2, 4, 320, 264),
}


@formats
@pytest.mark.parametrize("mode", experts_problem.MODES)
@pytest.mark.parametrize("shape", EXPERTS)
def test_experts(format, mode, shape):
    flags = experts_problem.MODES[mode]
    given = experts_problem.problem(EXPERTS[shape], torch.bfloat16, routing="dropped", **flags)
    problem = QuantizedExperts(given, format, is_exact=shape == "decode" and format == "fp8_block")
    first = experts_problem.check(problem)
    # These are recorded, then replayed.
    for _ in range(3):
        output, gradients = problem.run()
        assert_same_bits([output, *gradients.values()], [first[0], *first[1].values()])


@pytest.mark.parametrize("mode", experts_problem.MODES)
def test_numbers_do_not_depend_on_the_parts_of_experts(mode, monkeypatch):
    found = []
    for size in (2**30, 1):
        monkeypatch.setattr(weight_plan, "SCRATCH_BYTES", size)
        weight_plan.plan_weight.cache_clear()
        replay.forget()
        flags = experts_problem.MODES[mode]
        given = experts_problem.problem(EXPERTS["many"], torch.bfloat16, **flags)
        output, gradients = QuantizedExperts(given, "int4").run()
        found.append([output, *gradients.values()])
    monkeypatch.undo()
    weight_plan.plan_weight.cache_clear()
    replay.forget()
    assert_same_bits(*found)


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
            before = device_memory.held()
            torch.cuda.reset_peak_memory_stats()
            output = moe_ops.fused_experts(hidden_states, up, down, topk_ids, topk_weights)
            assert device_memory.held() - before < large / 16
            output.sum().backward()
            # The larger weight alone, not both.
            assert device_memory.most_held() - before < 1.25 * large
            del output
            hidden_states.grad = topk_weights.grad = None

# SPDX-License-Identifier: Apache-2.0
"""Products with quantised weights are right: decoded in the product, and dequantised in parts."""

import gc
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import moe_ops
from moe_ops.layers import Experts
from moe_ops.layers.lora import LoraExperts, LoraWeights, lora_experts
from moe_ops.quantization.formats import FORMATS
from testing import dropped_slots, experts_problem, gemm_problem
from testing.checks import assert_close
from testing.interpreted import pytestmark  # noqa: F401
from testing.on_device import assert_same_bits
from testing.quantized_problem import KINDS, QuantizedExperts, QuantizedGemm
from testing.recorders import MoeOps

CPU = torch.device("cpu")
kinds = pytest.mark.parametrize(
    ("format", "group_size"), sorted({(format, size) for format, _, size in KINDS})
)
formats = pytest.mark.parametrize("format", sorted({format for format, *_ in KINDS}))
# T, K, E, N, D: every dimension ends in a part of a tile, some experts have several tiles of rows.
FEW_ROWS = {
    "one": (3, 2, 8, 72, 136), "some": (40, 2, 4, 40, 72), "more": (70, 2, 3, 40, 264),
    "even": (5, 2, 8, 17, 512),
}  # fmt: skip
MANY_ROWS = (150, 3, 3, 24, 40)
# Whose numbers are rounded to the dtype of the rows though they are few: in fp16, which stands for
# bf16 here.
IN_PLACE = {(format, torch.float16) for format in ("nf4", "mxfp4", "int4")}


def experts(format: str, shape: tuple[int, ...], dtype: torch.dtype, **flags: Any):
    num_tokens, top_k, num_experts, width, hidden = shape
    given = experts_problem.problem(
        (num_tokens, top_k, num_experts, hidden, width), dtype, device=CPU, **flags
    )
    is_summed = num_tokens * top_k <= num_experts and (format, dtype) not in IN_PLACE
    return QuantizedExperts(given, format, is_exact=is_summed)


@kinds
@pytest.mark.parametrize("shape", FEW_ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_decoded_in_the_product(format, group_size, shape, dtype):
    given = gemm_problem.problem(
        FEW_ROWS[shape],
        dtype,
        routing="dropped",
        permute_x=True,
        weights=True,
        bias=True,
        device=CPU,
    )
    gemm_problem.check(QuantizedGemm(given, format, group_size=group_size))


@formats
@pytest.mark.parametrize("mode", gemm_problem.MODES)
def test_modes_of_the_product(format, mode):
    flags = gemm_problem.MODES[mode]
    for shape in (FEW_ROWS["one"], MANY_ROWS):
        given = gemm_problem.problem(shape, torch.float16, routing="dropped", device=CPU, **flags)
        gemm_problem.check(QuantizedGemm(given, format))


@formats
@pytest.mark.parametrize("mode", experts_problem.MODES)
def test_experts_of_few_rows(format, mode):
    """The two routings take turns: a format meets both, and so does a mode."""
    flags = experts_problem.MODES[mode]
    turn = sorted(FORMATS).index(format) + list(experts_problem.MODES).index(mode)
    routing = ("dropped", "hot_and_empty")[turn % 2]
    experts_problem.check(experts(format, FEW_ROWS["one"], torch.float16, routing=routing, **flags))


@formats
@pytest.mark.parametrize("adapters", [False, True])
def test_the_weights_of_dropped_slots_are_not_read(format, adapters):
    """Of few rows: the product decodes the weight, and no schedule counts the used rows."""
    layer = Experts(4, 64, 32).quantize_(format)
    dropped_slots.assert_not_read(
        LoraExperts(layer, rank=2) if adapters else layer, torch.randn(12, 64), 4, top_k=2
    )


@pytest.mark.parametrize("mode", experts_problem.MODES)
def test_experts_of_many_rows(mode):
    flags = experts_problem.MODES[mode]
    experts_problem.check(experts("nf4", MANY_ROWS, torch.float32, routing="dropped", **flags))


@pytest.fixture
def scratch_of(monkeypatch):
    """Return what sets how many bytes a scratch has at most."""
    from moe_ops._triton import weight_plan

    def bound(size: int) -> None:
        monkeypatch.setattr(weight_plan, "SCRATCH_BYTES", size)
        weight_plan.plan_weight.cache_clear()

    yield bound
    monkeypatch.undo()
    weight_plan.plan_weight.cache_clear()


@pytest.mark.parametrize("mode", experts_problem.MODES)
def test_numbers_do_not_depend_on_the_parts_of_experts(mode, scratch_of):
    flags = experts_problem.MODES[mode]
    # Three experts, in parts of two or of one. With fewer rows the product decodes the weights itself.
    shape = (300, 2, 3, 24, 40)
    found = []
    for size in (2**30, 2 * 24 * 40 * 4, 1):
        scratch_of(size)
        output, gradients = experts("mxfp4", shape, torch.float32, routing="dropped", **flags).run()
        found.append([output, *gradients.values()])
    for other in found[1:]:
        assert_same_bits(found[0], other)


def test_numbers_with_adapters_do_not_depend_on_the_parts(scratch_of):
    num_tokens, top_k, num_experts, hidden, inner, rank = 280, 2, 3, 40, 24, 3
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weights = [randn(num_experts, *shape) for shape in ((2 * inner, hidden), (hidden, inner))]
    up, down = (moe_ops.quantize_weight(weight, "nf4") for weight in weights)
    x, topk_weights = randn(num_tokens, hidden), torch.rand(num_tokens, top_k, generator=generator)
    ids = torch.randint(-1, num_experts, (num_tokens, top_k), generator=generator)
    shapes = ((rank, hidden), (2 * inner, rank), (rank, inner), (hidden, rank))
    leaves = [x, topk_weights, *(randn(num_experts, *shape) for shape in shapes)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    _, _, up_a, up_b, down_a, down_b = leaves
    adapters = [LoraWeights(up_a, up_b, 2.0)], [LoraWeights(down_a, down_b, 0.5)]
    grad = randn(num_tokens, hidden)
    found = []
    for size in (2**30, 2 * inner * hidden * 4, 1):
        scratch_of(size)
        with MoeOps() as ops:
            output = lora_experts(x, up, down, ids, topk_weights, *adapters)
            found.append([output, *torch.autograd.grad(output, leaves, grad)])
        assert set(ops.counts) == {
            "fused_experts_lora_quantized_forward", "fused_experts_lora_quantized_backward",
        }  # fmt: skip
    for other in found[1:]:
        assert_same_bits(found[0], other)
    plain = lora_experts(x, up.dequantize(), down.dequantize(), ids, topk_weights, *adapters)
    for actual, expected in zip(
        found[0], [plain, *torch.autograd.grad(plain, leaves, grad)], strict=True
    ):
        assert_close(actual, expected)


def test_no_scratch_is_there_when_the_output_is_allocated(monkeypatch):
    from moe_ops._triton import quantized
    from moe_ops.ops.fused_experts import triton as fused

    scratches: list[StorageWeakRef] = []
    alive: list[list[bool]] = []
    replaced = ((quantized, "new_rows"), (fused, "sum_rows"))
    new_rows, sum_rows = (getattr(module, name) for module, name in replaced)

    def noted(*args: Any) -> torch.Tensor:
        rows = new_rows(*args)
        scratches.append(StorageWeakRef(rows.untyped_storage()))
        return rows

    def watched(*args: Any) -> torch.Tensor:
        gc.collect()  # the interpreter's launches are cycles
        alive.append([not scratch.expired() for scratch in scratches])
        return sum_rows(*args)

    for (module, name), function in zip(replaced, (noted, watched), strict=True):
        monkeypatch.setattr(module, name, function)
    experts("nf4", (300, 2, 3, 24, 40), torch.float32).inference()
    assert alive == [[False, False]]


@pytest.mark.parametrize("mode", gemm_problem.MODES)
def test_numbers_of_a_product_do_not_depend_on_the_parts(mode, scratch_of, descriptors):
    found = []
    for size in (2**30, 1):
        scratch_of(size)
        given = gemm_problem.problem(
            (300, 2, 3, 24, 40), torch.float16, routing="dropped", device=CPU,
            **gemm_problem.MODES[mode],
        )  # fmt: skip
        output, gradients = QuantizedGemm(given, "int4").run()
        found.append([output, *gradients.values()])
    assert_same_bits(*found)


@formats
def test_without_rows_and_with_empty_sizes(format):
    for shape in ((0, 2, 3, 8, 40), (3, 2, 3, 0, 40), (3, 2, 3, 8, 0)):
        num_rows, num_experts = shape[0] * shape[1], shape[2]
        given = moe_ops.quantize_weight(torch.ones(num_experts, *shape[3:]), format)
        counts = torch.zeros(num_experts, dtype=torch.int32)
        output = moe_ops.grouped_gemm(torch.ones(num_rows, shape[4]), given, counts)
        assert output.shape == (num_rows, shape[3])
        assert not output.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_infinite_scale_does_not_reach_beyond_its_row(dtype):
    """Its block ends behind the row's end, where both kernels for few rows sum nothing."""
    for width in (40, 70, 300):
        weight = moe_ops.quantize_weight(torch.ones(1, 2, width).bfloat16(), "int4")
        weight.scale.view(torch.bfloat16)[..., -1] = torch.inf
        output = moe_ops.grouped_gemm(torch.ones(1, width, dtype=dtype), weight, torch.tensor([1]))
        assert (output == torch.inf).all(), width


def test_every_code_of_fp8_is_exact():
    """As the weights of a row's product and of its gradient: NaN is NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).view(torch.float8_e4m3fn)
    weight = moe_ops.QuantizedWeight.from_fp8_block(codes, torch.ones(1, 2, 1))
    expected = codes.float().view(256)
    assert expected.isnan().sum() == 2
    for num_rows in (1, 70, 600):
        counts = torch.tensor([num_rows])
        rows = torch.ones(num_rows, 1, requires_grad=True)
        output = moe_ops.grouped_gemm(rows, weight, counts)
        assert torch.equal(output.isnan(), expected.isnan().expand_as(output))
        assert torch.equal(output.nan_to_num(), expected.nan_to_num().expand_as(output))
        numbers = torch.where(expected.isnan(), 0.0, torch.arange(256) % 3 - 1.0)
        tangent = numbers.expand_as(output).contiguous()
        (gradient,) = torch.autograd.grad(output, rows, tangent)
        # NaN times zero is NaN.
        assert gradient.isnan().all()

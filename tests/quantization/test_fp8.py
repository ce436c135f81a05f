# SPDX-License-Identifier: Apache-2.0
"""quantize_fp8 and dequantize_fp8: rounding, what is not finite, strides, and errors."""

import pytest
import torch
from torch import Tensor

import moe_ops

FP8 = torch.float8_e4m3fn
FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", [(128, 128), (3, 200, 300), (2, 3, 1, 129), (2, 0, 5)], ids=str)
def test_quantise_and_back(shape, dtype):
    """A weight is off by at most a sixteenth of it, or by half of the smallest step."""
    weight = torch.randn(shape).to(dtype)
    quantised, scale = moe_ops.quantize_fp8(weight)
    assert (quantised.dtype, quantised.shape) == (FP8, weight.shape)
    *outer, rows, columns = shape
    assert scale.shape == (*outer, -(-rows // 128), -(-columns // 128))
    assert scale.dtype == torch.float32
    back = moe_ops.dequantize_fp8(quantised, scale, torch.float64)
    spread = scale.double().repeat_interleave(128, -2).repeat_interleave(128, -1)
    spread = spread[..., :rows, :columns]
    limit = torch.maximum(weight.double().abs() / 16, spread * 2**-10) * (1 + 1e-6)
    assert ((back - weight.double()).abs() <= limit).all()
    # The largest weight of each block becomes the largest FP8 number, so no range is wasted.
    for block, of_block in zip(blocks_of(quantised), scale.flatten(), strict=True):
        assert block.double().abs().max() == 448
        assert of_block > 0


def blocks_of(matrices: Tensor) -> list[Tensor]:
    """Yield the blocks of 128 x 128 of all matrices, in the order of their scales."""
    rows, columns = (range(0, size, 128) for size in matrices.shape[-2:])
    flat = matrices.reshape(max(matrices.shape[:-2].numel(), 1), *matrices.shape[-2:])
    if matrices.numel() == 0:
        return []
    return [m[r : r + 128, c : c + 128] for m in flat for r in rows for c in columns]


def test_quantise_by_hand():
    """The largest weight of the first block is 448 / 2, so its scale is a half."""
    weight = torch.zeros(1, 1, 130)
    weight[0, 0, :4] = torch.tensor([224.0, -1.0, 0.53125, 2**-11])
    quantised, scale = moe_ops.quantize_fp8(weight)
    assert scale.tolist() == [[[0.5, 1.0]]]
    # 1.0625 lies between 1 and 1.125 and goes to the even one. 2**-10 goes to zero.
    assert quantised[0, 0, :4].float().tolist() == [448, -2, 1, 0]
    assert not quantised[0, 0, 4:].float().any()
    back = moe_ops.dequantize_fp8(quantised, scale, torch.float32)
    assert back[0, 0, :4].tolist() == [224, -1, 0.5, 0]


def test_quantise_what_is_not_finite_and_what_is_tiny():
    weight = torch.full((256, 128), 1.0)
    weight[0, 0] = float("nan")
    weight[200, 5] = 1e-30
    quantised, scale = moe_ops.quantize_fp8(weight)
    assert quantised[:128].float().isnan().all()
    assert not quantised[128:].float().isnan().any()
    tiny = torch.full((2, 2), 1e-44)
    tiny[0, 0] = 0
    quantised, scale = moe_ops.quantize_fp8(tiny)
    assert scale.item() > 0
    assert not quantised.float().isnan().any()


def test_quantise_takes_what_fp32_does_not_hold():
    """An fp64 weight may be too large for fp32 as long as its scale fits."""
    quantised, scale = moe_ops.quantize_fp8(torch.full((1, 1), 1e39, dtype=torch.float64))
    back = moe_ops.dequantize_fp8(quantised, scale, torch.float64)
    torch.testing.assert_close(back, torch.full_like(back, 1e39), rtol=1e-6, atol=0)


def test_quantise_takes_any_strides():
    weight = torch.randn(2, 300, 200)
    expected = moe_ops.quantize_fp8(weight.transpose(1, 2).contiguous())
    for got, want in zip(moe_ops.quantize_fp8(weight.transpose(1, 2)), expected, strict=True):
        assert torch.equal(got.float(), want.float())
        assert got.is_contiguous()


@pytest.mark.parametrize(
    ("function", "arguments", "error", "expected"),
    [
        ("quantize_fp8", (torch.ones(2, 2).to(FP8),), TypeError, "got float8_e4m3fn"),
        ("quantize_fp8", (torch.ones(2, 2).int(),), TypeError, "got int32"),
        ("quantize_fp8", (None,), TypeError, "weight to be a tensor, got None"),
        ("dequantize_fp8", (None, None), TypeError, "weight to be a tensor, got None"),
        (
            "dequantize_fp8", (torch.ones(2, 2).to(FP8), [1.0]), TypeError,
            "weight_scale to be a tensor, got list",
        ),
        ("quantize_fp8", (torch.ones(2),), ValueError, r"weight.dim\(\) >= 2, got 1 \(2,\)"),
        (
            "dequantize_fp8", (torch.ones(2, 2), torch.ones(1, 1)), TypeError,
            "weight.dtype == float8_e4m3fn, got float32",
        ),
        (
            "dequantize_fp8", (torch.ones(2, 2).to(FP8), torch.ones(1, 1).bfloat16()), TypeError,
            "weight_scale.dtype == float32, got bfloat16",
        ),
        (
            "dequantize_fp8", (torch.ones(2, 200).to(FP8), torch.ones(1, 1)), ValueError,
            r"weight_scale.shape == \(1, 2\), .*, got \(1, 1\)",
        ),
        (
            "dequantize_fp8", (torch.ones(2).to(FP8), torch.ones(1)), ValueError,
            r"weight.dim\(\) >= 2, got 1 \(2,\)",
        ),
        (
            "dequantize_fp8", (torch.ones(2, 2).to(FP8), torch.ones(1, 1, device="meta")), ValueError,
            r"weight_scale.device == weight.device \(cpu\), got meta",
        ),
        *[
            (
                "dequantize_fp8", (torch.ones(2, 2).to(FP8), torch.ones(1, 1), dtype), TypeError,
                f"dtype in .*, got {name}",
            )
            for dtype, name in ((torch.int8, "int8"), (FP8, "float8_e4m3fn"))
        ],
    ],
)  # fmt: skip
def test_quantise_rejects(function, arguments, error, expected):
    with pytest.raises(error, match=rf"^moe_ops\.{function}: expected .*{expected}$"):
        getattr(moe_ops, function)(*arguments)


def test_parameters_are_dequantised():
    """Layers of other libraries have both as parameters that require gradients."""
    weight, scale = moe_ops.quantize_fp8(torch.randn(2, 130, 140))
    expected = moe_ops.dequantize_fp8(weight, scale, torch.float32)
    found = moe_ops.dequantize_fp8(
        torch.nn.Parameter(weight), torch.nn.Parameter(scale), torch.float32
    )
    assert torch.equal(found, expected)
    assert not found.requires_grad

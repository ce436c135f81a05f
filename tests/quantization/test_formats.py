# SPDX-License-Identifier: Apache-2.0
"""Every format decodes as the oracle does, and encodes to the scale and the codes that it tells."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from moe_ops.fp8 import dequantize_fp8, quantize_fp8
from moe_ops.quantization.codes import Nibbles, nearest
from moe_ops.quantization.format import Format, Layout, in_blocks
from moe_ops.quantization.formats import FORMATS
from moe_ops.quantization.scales import DYNAMIC_CODE, FLOAT32
from moe_ops.quantization.storage import (
    Packed,
    dequantized,
    empty,
    layout_of,
    quantized,
    shapes,
)
from testing.oracle import quantized as oracle

# Every format with every encoding of its scales and every group size.
KINDS = [
    (name, size, scale.name)
    for name, declared in FORMATS.items()
    for size in declared.group_sizes
    for scale in declared.scales
]
kinds = pytest.mark.parametrize(("format", "group_size", "encoding"), KINDS)
# What quantize_weight makes.
makes = pytest.mark.parametrize(
    ("format", "group_size"),
    [(name, size) for name, f in FORMATS.items() for size in f.group_sizes],
)
formats = pytest.mark.parametrize("format", FORMATS)
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
# No block divides most of these, and some rows are shorter than one.
SHAPES = [(1, 1, 1), (2, 3, 33), (1, 2, 64), (3, 1, 65), (2, 1, 96), (1, 130, 2), (1, 1, 300)]


def judged(packed: Packed) -> torch.Tensor:
    """Return the oracle's weight, in fp64 and not rounded."""
    return oracle.dequantize(packed.tensors, **packed.layout._asdict(), dynamic=DYNAMIC_CODE)


def check_decoded(packed: Packed) -> None:
    """Check that the weight is codes times scales, rounded to fp32 and then to each dtype."""
    exact = judged(packed)
    for dtype in DTYPES:
        actual, expected = dequantized(packed, dtype), exact.float().to(dtype)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def random_bytes(layout: Layout) -> Packed:
    """Return a weight whose stored tensors hold any bits, NaN and infinite scales among them."""
    packed = empty(layout)
    for tensor in packed.tensors.values():
        tensor.random_(0, 256)
    return packed


@kinds
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decodes_any_bits_as_the_oracle(format, group_size, encoding, shape):
    check_decoded(random_bytes(layout_of("test", format, shape, group_size, encoding)))


@kinds
def test_decodes_every_code(format, group_size, encoding):
    layout = layout_of("test", format, (1, 1, 512), group_size, encoding)
    packed = random_bytes(layout)
    every = torch.arange(256, dtype=torch.uint8).repeat(2)
    packed.tensors["codes"].copy_(every[: packed.tensors["codes"].shape[2]])
    check_decoded(packed)


def test_decodes_every_e8m0():
    packed = random_bytes(layout_of("test", "mxfp4", (1, 256, 32)))
    packed.tensors["scale"].copy_(torch.arange(256)[:, None])
    check_decoded(packed)
    weight = dequantized(packed, torch.float32)
    assert weight[0, 255].isnan().all()
    assert not weight[0, :255].isnan().any()


# Magnitudes at which no fp32 scale over- or underflows, and far smaller ones.
EXPONENTS = st.sampled_from([0, -3, 100, -20, -140])


@makes
@given(
    shape=st.sampled_from(SHAPES),
    exponent=EXPONENTS,
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
    spread=st.booleans(),
)
@example(shape=(1, 1, 33), exponent=-140, dtype=torch.float32, seed=0, spread=False)
def test_encodes_to_the_nearest_codes(format, group_size, shape, exponent, dtype, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, dtype=torch.float64, generator=generator)
    if spread:
        # Weights of many magnitudes, and zeros.
        weight = weight * 2.0 ** (weight * 6).round() * (weight.abs() > 0.2)
    if dtype != torch.float16:
        weight = weight * 2.0**exponent
    largest = torch.finfo(dtype).max
    check_encoded(weight.clamp(-largest, largest).to(dtype), format, group_size)


def check_encoded(weight: torch.Tensor, format: str, group_size: int) -> None:
    layout = layout_of("test", format, tuple(weight.shape), group_size)
    packed = quantized(weight, layout)
    check_decoded(packed)
    weight = weight.float()
    values = torch.tensor(oracle.code_values(format), dtype=torch.float64)
    # What codes were chosen by: a nested scale is stored with less precision than that.
    chosen = packed
    if layout.scale_encoding == "nested":
        scale = blocks_of(weight, layout).abs().amax((2, 4)).view(torch.uint8)
        chosen = Packed(
            layout._replace(scale_encoding="float32"),
            {"codes": packed.tensors["codes"], "scale": scale},
        )
    decoded = judged(chosen)
    scales = spread_scales(chosen)
    for w, actual, scale in zip(
        weight.float().flatten().tolist(),
        decoded.flatten().tolist(),
        scales.flatten().tolist(),
        strict=True,
    ):
        best = (w - values * scale).abs().min().item()
        # Rounding weight / scale to fp32 may decide between two codes that are as near.
        assert abs(w - actual) <= best + 1e-6 * abs(w)


def blocks_of(weight: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return weight (E, N, D) as (E, rows of blocks, rows of a block, blocks of a row, group_size)."""
    rows, width = FORMATS[layout.format].block_rows, layout.group_size
    _, out_features, in_features = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -in_features % width, 0, -out_features % rows))
    return padded.unflatten(2, (-1, width)).unflatten(1, (-1, rows))


def spread_scales(packed: Packed) -> torch.Tensor:
    """Return the scale of each element, read from the weight whose codes are all one number."""
    code = {"fp8_block": 0x38, "nf4": 0xFF, "mxfp4": 0x22, "int4": 0x99}[packed.layout.format]
    ones = torch.full_like(packed.tensors["codes"], code)
    return judged(packed._replace(tensors={**packed.tensors, "codes": ones}))


@makes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("exponent", [0, 30, -100, -135, -148])
def test_scales(format, group_size, shape, exponent):
    weight = (torch.randn(shape, dtype=torch.float64) * 2.0**exponent).float()
    layout = layout_of("test", format, shape, group_size)
    packed = quantized(weight, layout)
    if layout.scale_encoding == "nested":
        check_nested(packed, blocks_of(weight, layout).abs().amax((2, 4)))
        return
    largest = blocks_of(weight, layout).abs().amax((2, 4))
    actual = blocks_of(spread_scales(packed), layout)[:, :, 0, :, 0]
    for block, scale in zip(largest.flatten().tolist(), actual.flatten().tolist(), strict=True):
        expected = oracle.rounded(oracle.block_scale(format, block))
        if format == "int4":
            expected = torch.tensor(expected).bfloat16().item()
        # torch may divide by multiplying with a reciprocal.
        assert scale == pytest.approx(expected, rel=2.0**-23 if format == "fp8_block" else 0, abs=0)


def check_nested(packed: Packed, absmax: torch.Tensor) -> None:
    """Check the offset, the nested scales and the codes of absmax (E, N, G)."""
    code = torch.tensor(DYNAMIC_CODE, dtype=torch.float64)
    for expert, values in enumerate(absmax.flatten(1)):
        offset = packed.tensors["nested_offset"][expert].view(torch.float32)[0]
        torch.testing.assert_close(
            offset.double(), values.double().mean(), rtol=1e-6, atol=2.0**-149
        )
        nested = packed.tensors["nested_scale"][expert].view(torch.float32)
        chosen = packed.tensors["scale"][expert].flatten()
        for block, start in enumerate(range(0, len(values), 256)):
            rest = values[start : start + 256] - offset
            assert nested[block] == rest.abs().max()
            for value, index in zip(
                rest.tolist(), chosen[start : start + 256].tolist(), strict=True
            ):
                distances = (value - code * nested[block].double()).abs()
                assert distances[index] <= distances.min() + 1e-6 * abs(value)


def quantized_as(weight: torch.Tensor, format: str, group_size: int | None = None) -> torch.Tensor:
    """Return weight quantised and dequantised, in fp32."""
    layout = layout_of("test", format, tuple(weight.shape), group_size)
    return dequantized(quantized(weight, layout), torch.float32)


@makes
def test_nested_blocks_of_many_scales(format, group_size):
    # 3 x 100 blocks or more: nested scales run from row to row.
    weight = torch.randn(2, 3, 100 * group_size)
    layout = layout_of("test", format, tuple(weight.shape), group_size)
    packed = quantized(weight, layout)
    if format == "nf4":
        assert packed.tensors["nested_scale"].shape == (2, 8)
        check_nested(packed, blocks_of(weight, layout).abs().amax((2, 4)))
    error = dequantized(packed, torch.float32) - weight
    assert error.norm() < {"fp8_block": 0.04}.get(format, 0.13) * weight.norm()


def test_error_bounds_of_the_docstrings():
    weight = torch.randn(4, 8, 256).bfloat16().float()
    largest = weight.unflatten(2, (-1, 32)).abs().amax(3, keepdim=True)
    error = (quantized_as(weight, "int4") - weight).unflatten(2, (-1, 32)).abs()
    assert (error <= 0.53 * largest / 7.5).all()
    error = (quantized_as(weight, "mxfp4") - weight).unflatten(2, (-1, 32)).abs()
    # Half of the largest step of two codes, 2, times a scale of at most 2 / 7 of the maximum.
    assert (error <= 2 / 7 * largest).all()


def test_mxfp4_by_hand():
    # 7 is the largest maximum of the scale 1. The codes' middles go to even codes.
    weight = torch.zeros(1, 1, 32)
    weight[0, 0, :9] = torch.tensor([7, 0.25, 0.75, 1.25, -1.75, 2.5, 3.5, -5, 0.26])
    assert quantized_as(weight, "mxfp4")[0, 0, :9].tolist() == [6, 0, 1, 1, -2, 2, 4, -4, 0.5]
    weight[0, 0, 0] = 7.001
    assert quantized_as(weight, "mxfp4")[0, 0, :9].tolist() == [8, 0, 1, 1, -2, 2, 4, -4, 0]


def test_int4_by_hand():
    # The scale is 1. -7.5 becomes -8, and 7.5 the largest code.
    weight = torch.zeros(1, 1, 33)
    weight[0, 0, :6] = torch.tensor([7.5, -7.5, 0.5, 1.5, -0.4, 6.6])
    weight[0, 0, 32] = 15
    expected = [7, -8, 0, 2, 0, 7]
    assert quantized_as(weight, "int4")[0, 0, :6].tolist() == expected
    assert quantized_as(weight, "int4")[0, 0, 32].item() == 14
    # In one group the scale is 2.
    assert quantized_as(weight, "int4", 128)[0, 0, :6].tolist() == [8, -8, 0, 2, 0, 6]


def test_nf4_by_hand():
    # Two blocks of one absmax, so that its offset is it and the rest of it zero.
    weight = torch.zeros(1, 2, 64)
    weight[0, :, :4] = torch.tensor([2.0, -2.0, 1.5, -0.1])
    expected = [2.0, -2.0, 2 * 0.7229568362236023, 2 * -0.09105003625154495]
    for row in quantized_as(weight, "nf4")[0].tolist():
        assert row[:4] == expected
        assert set(row[4:]) == {0.0}
    # The code of zero.
    packed = quantized(weight, layout_of("test", "nf4", (1, 2, 64)))
    assert packed.tensors["scale"].flatten().tolist() == [127, 127]


def test_fp8_block_is_quantize_fp8():
    weight = torch.randn(2, 130, 150).bfloat16()
    for dtype in (torch.bfloat16, torch.float32):
        layout = layout_of("test", "fp8_block", (2, 130, 150))
        actual = dequantized(quantized(weight, layout), dtype)
        expected = dequantize_fp8(*quantize_fp8(weight), dtype)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@formats
def test_zeros(format):
    weight = torch.zeros(2, 3, 70)
    assert not quantized_as(weight, format).any()
    weight[1, 2, 69] = 1.0
    actual = quantized_as(weight, format)
    assert not actual.flatten()[:-1].any()
    assert actual[1, 2, 69] == pytest.approx(1, rel=0.07)


@formats
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_makes_its_block_nan(format, value):
    weight = torch.ones(2, 129, 300)
    weight[1, 128, 150] = value
    is_nan = quantized_as(weight, format).isnan()
    expected = torch.zeros_like(is_nan)
    block = {
        "fp8_block": (slice(128, 129), slice(128, 256)),
        "nf4": (slice(None), slice(None)),
        "mxfp4": (slice(128, 129), slice(128, 160)),
        "int4": (slice(128, 129), slice(128, 160)),
    }[format]
    expected[1][block] = True
    assert torch.equal(is_nan, expected)


def test_a_quiet_row_beside_a_loud_one():
    """nf4 loses it, since scales are stored as distances from their mean, and other formats do not."""
    weight = torch.randn(1, 16, 1024, generator=torch.Generator().manual_seed(0)) / 50
    weight[0, 3] /= 1000
    weight[0, 5] *= 10
    quiet = weight[0, 3]
    for format in FORMATS:
        actual = quantized_as(weight, format)[0, 3]
        cosine, norm = torch.cosine_similarity(actual, quiet, 0), actual.norm() / quiet.norm()
        if format == "nf4":
            assert cosine < -0.9
            assert norm > 10
        else:
            assert cosine > 0.99
            assert norm == pytest.approx(1, rel=0.02)


def test_large_numbers_whose_scales_nf4_cannot_sum():
    weight = torch.full((2, 64, 256), 1e36)
    weight[1] *= 3
    for format in FORMATS:
        is_nan = quantized_as(weight, format).isnan()
        assert not is_nan[0].any()
        assert is_nan[1].all() if format == "nf4" else not is_nan[1].any()


@makes
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty(format, group_size, shape):
    packed = quantized(torch.ones(shape), layout_of("test", format, shape, group_size))
    assert dequantized(packed, torch.bfloat16).shape == shape
    actual = {name: tuple(tensor.shape) for name, tensor in packed.tensors.items()}
    assert actual == shapes(packed.layout)


@makes
@pytest.mark.parametrize("width", [1, 2, 33, 64, 129, 256])
def test_rows_are_padded_with_codes_of_zero(format, group_size, width):
    packed = quantized(
        torch.ones(2, 3, width), layout_of("test", format, (2, 3, width), group_size)
    )
    codes = packed.tensors["codes"]
    if format == "fp8_block":
        assert codes.shape == (2, 3, width)
        return
    # Whole blocks, and so a multiple of 16 bytes.
    full = -(-width // group_size) * group_size
    assert codes.shape == (2, 3, full // 2)
    padding = FORMATS[format].codes.decode(codes.flatten(0, 1))[:, width:]
    assert not padding.any()


@makes
def test_any_strides_and_dtypes(format, group_size):
    weight = torch.randn(3, 65, 130).bfloat16()
    expected = quantized_as(weight, format, group_size)
    transposed = weight.transpose(1, 2).contiguous().transpose(1, 2)
    for other in (transposed, weight.float(), weight.double()):
        torch.testing.assert_close(
            quantized_as(other, format, group_size), expected, rtol=0, atol=0
        )
    # No two experts share a block.
    alone = quantized_as(weight[1:2], format, group_size)
    torch.testing.assert_close(alone, expected[1:2], rtol=0, atol=0)


def test_a_fifth_format_is_a_declaration():
    # bitsandbytes' FP4, without its order of codes.
    table = (*(m / 12 for m in (0, 0.0625, 2, 3, 4, 6, 8, 12)), *[0.0] * 8)
    codes = Nibbles(table, low_first=False)

    def encode(weight, group_size):
        rows = in_blocks(weight, group_size)
        absmax = rows.abs().amax(2)
        chosen = nearest(rows / absmax[..., None], torch.tensor(table[:8]))
        return {"codes": codes.pack(chosen.flatten(1)), **FLOAT32.encode(absmax)}

    fp4 = Format("fp4", codes, scales=(FLOAT32,), group_sizes=(64,), encode=encode)
    layout = Layout("fp4", (1, 2, 70), 64, "float32")
    weight = torch.tensor([12.0, 8.2, 5.9, 0.06, 0.0]).repeat(28).view(2, 70)
    tensors = fp4.encode(weight, 64)
    assert {n: (1, *tensor.shape) for n, tensor in tensors.items()} == fp4.shapes(layout)
    expected = torch.tensor([12.0, 8.0, 6.0, 0.0625, 0.0]).repeat(28).view(2, 70)
    torch.testing.assert_close(fp4.decode(tensors, layout), expected)

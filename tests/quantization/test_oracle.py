# SPDX-License-Identifier: Apache-2.0
"""The oracle of each format gives the numbers that are worked out by hand, and so do we."""

import math

import pytest
import torch

from moe_ops.quantization.format import Layout
from moe_ops.quantization.scales import DYNAMIC_CODE
from moe_ops.quantization.storage import Packed, dequantized, shapes
from testing.oracle import quantized as oracle

# The bytes of a number in a stored tensor.
SIZES = {"float32": 4, "bfloat16": 2, "e8m0": 1, "nested": 1}


def in_bytes(values, size):
    """Return numbers in nested lists as the bytes of each, lowest first, along the last dimension."""
    if isinstance(values[0], list):
        return [in_bytes(value, size) for value in values]
    return list(b"".join(value.to_bytes(size, "little") for value in values))


def both(layout, codes, scale, **nested):
    """Return what the oracle and dequantized make of the tensors of one expert, as lists."""
    lists = {
        "codes": codes,
        "scale": in_bytes(scale, SIZES[layout.scale_encoding]),
        **{name: in_bytes(values, 4) for name, values in nested.items()},
    }
    made = {name: torch.tensor(value, dtype=torch.uint8)[None] for name, value in lists.items()}
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == shapes(layout)
    judged = oracle.dequantize(made, **layout._asdict(), dynamic=DYNAMIC_CODE)
    ours = dequantized(Packed(layout, made), torch.float32)
    return judged[0].tolist(), ours[0].tolist()


def test_bits_by_hand():
    # 0 01111111 100...: 1.5; the sign; the least subnormal; the infinities.
    assert oracle.fp32(0x3FC00000) == 1.5
    assert oracle.fp32(-0x40400000) == -1.5
    assert oracle.fp32(1) == 2.0**-149
    assert oracle.fp32(0x7F800000) == math.inf
    assert math.isnan(oracle.fp32(0x7FC00000))
    assert oracle.bf16(0x3FC0) == 1.5
    assert oracle.bf16(-0x4040) == -1.5
    # 0 1111 110: 1.75 * 2**8; 0 0111 000: 1; 0 0000 001: 2**-9.
    assert [oracle.e4m3(code) for code in (0x7E, 0x38, 0x01, 0xB8)] == [448.0, 1.0, 2.0**-9, -1.0]
    assert oracle.e4m3(0x78) == 256.0
    assert math.isnan(oracle.e4m3(0x7F))
    assert math.isnan(oracle.e4m3(0xFF))
    assert [oracle.e8m0(byte) for byte in (0, 126, 127, 254)] == [2.0**-127, 0.5, 1.0, 2.0**127]
    assert math.isnan(oracle.e8m0(255))
    assert [oracle.e2m1(code) for code in range(8)] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert [oracle.e2m1(code) for code in (9, 15)] == [-0.5, -6.0]


def test_every_e4m3_is_torchs():
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    ours = torch.tensor([oracle.e4m3(code) for code in range(256)], dtype=torch.float64)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_fp8_block_by_hand():
    # Row 128 has another scale than row 0, column 128 than column 0.
    codes = [[0] * 129 for _ in range(129)]
    codes[0][0], codes[0][128], codes[128][0], codes[128][128] = 0x38, 0x38, 0xB8, 0x7E
    scale = [[0x3F800000, 0x40000000], [0x3F000000, 0x3FC00000]]  # 1, 2; 0.5, 1.5
    layout = Layout("fp8_block", (1, 129, 129), 128, "float32")
    for weight in both(layout, codes=codes, scale=scale):
        assert [weight[0][0], weight[0][128]] == [1.0, 2.0]
        assert [weight[128][0], weight[128][128]] == [-0.5, 672.0]
        assert weight[1][1] == 0.0
    layout = layout._replace(scale_encoding="e8m0")
    for weight in both(layout, codes=codes, scale=[[127, 128], [126, 255]]):
        assert [weight[0][0], weight[0][128], weight[128][0]] == [1.0, 2.0, -0.5]
        assert math.isnan(weight[128][128])


def test_nf4_by_hand():
    # The first element is in the high half. The second block has five elements and 59 of padding.
    codes = [[0x0F, 0x78, *[0x77] * 30, 0xF0, 0x17, 0xF7, *[0x77] * 29]]
    layout = Layout("nf4", (1, 1, 69), 64, "float32")
    for (row,) in both(layout, codes=codes, scale=[[0x40000000, 0x3F000000]]):  # 2, 0.5
        assert row[:4] == [-2.0, 2.0, 0.0, 2 * 0.07958029955625534]
        assert row[64:] == [0.5, -0.5, 0.5 * -0.6961928009986877, 0.0, 0.5]


def test_nested_absmax_by_hand():
    # 257 blocks of 64: the last one is the first of the second nested block. Code 255 is 1, 127 is
    # 0, so absmax is twice 1 plus 3, 3 and so on, and 8 plus 3.
    layout = Layout("nf4", (1, 1, 257 * 64), 64, "nested")
    weights = both(
        layout,
        codes=[[0xFF] * (257 * 32)],
        scale=[[255] + [127] * 255 + [255]],
        nested_scale=[0x40000000, 0x41000000],
        nested_offset=[0x40400000],
    )
    for (row,) in weights:
        assert [row[0], row[63], row[64], row[255 * 64], row[256 * 64]] == [
            5.0,
            5.0,
            3.0,
            3.0,
            11.0,
        ]


def test_nested_blocks_run_from_row_to_row():
    # 2 rows of 129 blocks: block 256 is the second row's 127th.
    layout = Layout("nf4", (1, 2, 129 * 64), 64, "nested")
    weights = both(
        layout,
        codes=[[0xFF] * (129 * 32)] * 2,
        scale=[[255] * 129] * 2,
        nested_scale=[0x3F800000, 0x40000000],
        nested_offset=[0],
    )
    for weight in weights:
        assert set(weight[0]) == {1.0}
        assert weight[1][127 * 64 - 1 : 127 * 64 + 1] == [1.0, 2.0]


def test_mxfp4_by_hand():
    # The first element is in the low half.
    codes = [[0x2F, 0x01, *[0] * 14, 0x75, *[0] * 15]]
    layout = Layout("mxfp4", (1, 1, 34), 32, "e8m0")
    for (row,) in both(layout, codes=codes, scale=[[128, 126]]):
        assert row[:4] == [-12.0, 2.0, 1.0, 0.0]
        assert row[32:] == [1.5, 3.0]
    for (row,) in both(layout, codes=codes, scale=[[0, 255]]):
        assert row[:3] == [-6 * 2.0**-127, 2.0**-127, 2.0**-128]
        assert all(map(math.isnan, row[32:]))


def test_int4_by_hand():
    # code - 8, the first in the low half.
    codes = [[0xF0, 0x98, *[0x88] * 14, 0x87, *[0x88] * 15]]
    layout = Layout("int4", (1, 1, 33), 32, "bfloat16")
    for (row,) in both(layout, codes=codes, scale=[[0x4000, 0x3F80]]):  # 2, 1
        assert row[:4] == [-16.0, 14.0, 0.0, 2.0]
        assert row[32] == -1.0
    layout = layout._replace(scale_encoding="float32")
    for (row,) in both(layout, codes=codes, scale=[[0x3F000000, 0x40400000]]):  # 0.5, 3
        assert row[:4] == [-4.0, 3.5, 0.0, 0.5]
        assert row[32] == -3.0
    layout = Layout("int4", (1, 1, 129), 128, "bfloat16")
    for (row,) in both(
        layout, codes=[[0x88] * 63 + [0x98, 0x89] + [0x88] * 63], scale=[[0x4000, 0x3F80]]
    ):
        assert row[127:] == [2.0, 1.0]


def test_dynamic_code():
    exact = oracle.dynamic_code()
    assert len(DYNAMIC_CODE) == len(exact) == 256
    # By hand: 1e-6 * 0.55, and the largest below one, 1 - 0.9 / 128.
    assert exact[127:130] == [0.0, pytest.approx(5.5e-7), pytest.approx(3.25e-6)]
    assert exact[254:] == [pytest.approx(0.99296875), 1.0]
    torch.testing.assert_close(torch.tensor(DYNAMIC_CODE), torch.tensor(exact), rtol=3e-7, atol=0)

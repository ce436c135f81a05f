# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of dequantize_weight equals the PyTorch implementation bit for bit."""

import pytest
import torch

from moe_ops._pytorch.dequantize import dequantize_weight
from moe_ops._triton.dequantize import _tile
from moe_ops.quantization.formats import FORMATS
from moe_ops.quantization.scales import SCALES
from testing.interpreted import pytestmark as interpreted
from testing.layouts import lay_out
from testing.quantized_problem import KINDS, assert_equal, stored

pytestmark = [
    interpreted,
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

# Triton's interpreter truncates to bf16. tests/gpu holds bf16.
DTYPES = (torch.float16, torch.float32, torch.float64)
kinds = pytest.mark.parametrize(("format", "encoding", "group_size"), KINDS)


def check(arguments, dtype):
    got = torch.ops.moe.dequantize_weight.default(*arguments, dtype)
    assert_equal(got, dequantize_weight(*(*arguments, dtype)))
    assert got.is_contiguous()


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_format(format, encoding, group_size, dtype):
    for seed, shape in enumerate([(2, 3, 256), (3, 130, 70), (1, 5, 1), (2, 3, 328), (1, 3, 136)]):
        check(stored(format, encoding, group_size, shape, seed), dtype)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("encoding", SCALES)
def test_any_scales_with_any_format(format, encoding):
    """The op reads what no format declares today."""
    for group_size in (32, 64, 128):
        given = stored("nf4", "float32", 64, (2, 3, 200))
        blocks = (-(-3 // FORMATS[format].block_rows), -(-200 // group_size))
        scales = SCALES[encoding].shapes(*blocks)
        row_bytes = FORMATS[format].codes.row_bytes(200, group_size)
        generator = torch.Generator().manual_seed(0)

        def draw(*size, generator=generator):
            return torch.randint(0, 64, size, generator=generator, dtype=torch.uint8)

        given[:4] = [
            draw(2, 3, row_bytes),
            *(draw(2, *scales[name]) if name in scales else None
              for name in ("scale", "nested_scale", "nested_offset")),
        ]  # fmt: skip
        given[4:7] = [format, group_size, encoding]
        check(given, torch.float32)


@pytest.mark.parametrize("format", FORMATS)
def test_every_code_and_scale(format):
    """NaN, infinities, subnormals and zeros of either sign come out as in PyTorch."""
    encoding = FORMATS[format].scales[-1].name
    arguments = stored(format, encoding, FORMATS[format].group_sizes[0], (1, 256, 256))
    codes = arguments[0]
    codes[...] = torch.arange(codes.numel()).view(codes.shape) % 256
    scale = arguments[1]
    if encoding == "e8m0":
        scale[...] = torch.arange(scale.numel()).view(scale.shape) % 256
    else:
        numbers = scale.view(torch.float32).flatten()
        special = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, 2.0**-149, 3e38]
        numbers[: len(special)] = torch.tensor(special)[: len(numbers)]
    check(arguments, torch.float32)


@kinds
def test_strides_and_offsets(format, encoding, group_size):
    plain = stored(format, encoding, group_size, (3, 4, 136))
    for layout in ("sliced", "transposed", "expanded"):
        moved = [lay_out(t, layout) if isinstance(t, torch.Tensor) else t for t in plain]
        if layout != "expanded":
            assert_equal(
                torch.ops.moe.dequantize_weight.default(*moved, torch.float32),
                dequantize_weight(*(*plain, torch.float32)),
            )
        check(moved, torch.float32)
    shifted = [t if not isinstance(t, torch.Tensor) else by_one_byte(t) for t in plain]
    check(shifted, torch.float32)


def by_one_byte(tensor):
    buffer = torch.zeros(tensor.numel() + 1, dtype=torch.uint8)
    buffer[1:] = tensor.flatten()
    return buffer[1:].view(tensor.shape)


@kinds
@pytest.mark.parametrize("shape", [(0, 3, 64), (2, 0, 64), (2, 3, 0), (0, 0, 0)], ids=str)
def test_empty(format, encoding, group_size, shape):
    check(stored(format, encoding, group_size, shape), torch.float16)


def test_tiles_cover_a_row_with_few_idle_elements():
    for group_size, size in ((32, 4096), (64, 4096), (128, 4096), (128, 2048)):
        for num_groups in range(1, 200):
            rows, blocks = _tile(num_groups, group_size, size)
            assert rows * blocks * group_size == size
            assert blocks & (blocks - 1) == 0
            assert blocks * group_size >= min(256, num_groups * group_size) / 2
    # in_features 768 of nf4: three tiles of four blocks, and none of them idle.
    assert _tile(12, 64, 4096) == (16, 4)
    assert _tile(32, 64, 4096) == (2, 32)

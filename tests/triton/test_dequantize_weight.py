# SPDX-License-Identifier: Apache-2.0
"""The kernel of dequantize_weight moves 16 bytes in each thread, and rounds after each step.

Without a GPU: it is compiled and its instructions are read.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels, which TRITON_INTERPRET=1 interprets", allow_module_level=True)
pytest.importorskip("triton", exc_type=ImportError)

from moe_ops.quantization.formats import FORMATS
from testing import kernel_calls as calls
from testing.compiled import GPUS, Resources, compiling_for
from testing.kernel_calls import Call, Sizes

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rows of gpt-oss, of a width that 8 divides and 16 does not, and of one with a single block.
WIDTHS = (2880, 1000, 16)


def kernel_of(call: Call, gpu: str = "sm_90") -> Resources:
    with compiling_for(GPUS[gpu]) as found:
        call()
    return found[-1]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("width", WIDTHS)
def test_moves_16_bytes_in_a_thread(format, width):
    for dtype in DTYPES:
        sizes = Sizes(num_experts=3, out_features=200, in_features=width)
        for encoding, call in calls.dequantize_weight(sizes, dtype, format).items():
            kernel = kernel_of(call)
            what = (kernel.kernel, encoding, dtype)
            moves = [line.split() for line in kernel.ptx.splitlines() if ".global." in line]
            loads = [words for words in moves if any(word.startswith("ld.") for word in words)]
            stores = [words for words in moves if any(word.startswith("st.") for word in words)]
            # Rows of 1000 bytes begin at multiples of eight.
            widest = ".v2.b32" if (format, width) == ("fp8_block", 1000) else ".v4.b32"
            assert any(widest in word for words in loads for word in words), what
            assert all(any(".v4.b32" in word for word in words) for words in stores), what
            assert kernel.stack == 0, what


@pytest.mark.parametrize("gpu", ["sm_75", "sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("format", FORMATS)
def test_fuses_no_product_with_a_sum(format, gpu):
    """The nested scale of nf4 is rounded between them, and no other GPU may differ."""
    for call in calls.dequantize_weight(Sizes(), torch.float32, format).values():
        kernel = kernel_of(call, gpu)
        assert "mul" in kernel.ptx
        assert "fma" not in kernel.ptx
        assert ".ftz" not in kernel.ptx


@pytest.mark.parametrize("format", FORMATS)
def test_odd_widths_compile(format):
    for width in (1, 7, 2043):
        sizes = Sizes(num_experts=3, out_features=5, in_features=width)
        for call in calls.dequantize_weight(sizes, torch.bfloat16, format).values():
            assert kernel_of(call).stack == 0

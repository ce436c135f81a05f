# SPDX-License-Identifier: Apache-2.0
"""The kernels that move rows between ranks, compiled for Hopper: what they use, and how they move.

test_compile.py compiles them for the other GPUs.
"""

import itertools
import os
import re

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels, which TRITON_INTERPRET=1 interprets", allow_module_level=True)
pytest.importorskip("triton", exc_type=ImportError)

from testing.compiled import GPUS, Resources, compiling_for
from testing.kernel_calls import SIZES, Call, Sizes, expert_parallel

pytestmark = pytest.mark.slow

push = pytest.mark.parametrize("push", [False, True])


def compiled(call: Call) -> list[Resources]:
    with compiling_for(GPUS["sm_90"]) as found:
        call()
    return found


@push
@pytest.mark.parametrize("size", ["training", "uneven"])
def test_rows_move_16_bytes_at_a_time(size, push):
    """Triton knows that pools are aligned. Rows that are not are moved number by number."""
    for name, call in expert_parallel(SIZES[size], torch.bfloat16, push=push).items():
        for kernel in compiled(call):
            assert kernel.stack == 0, name
            assert kernel.registers <= 128, name
            if name.startswith(("send tokens", "send filled", "send gradients", "receive", "sum")):
                for direction in ("ld", "st"):
                    wide = re.search(rf"\b{direction}\.global\S*\.v4\.b32", kernel.ptx)
                    assert (wide is not None) == (size == "training"), (name, direction)


def test_the_comparison_of_sizes_is_compiled():
    """Triton leaves assertions out where it is not asked for them."""
    (kernel,) = compiled(expert_parallel(SIZES["training"], torch.bfloat16, push=True)["begin"])
    assert "__assertfail" in kernel.ptx
    assert "ranks exchanged different numbers of tokens" in "".join(
        chr(int(code))
        for code in re.findall(r"\b(\d{1,3})\b(?=[,}])", kernel.ptx)
        if int(code) < 128
    )


@push
@pytest.mark.parametrize("world_size", [1, 2])
def test_sizes_that_are_one(world_size, push):
    """Triton takes an integer that is 1 for a constant, which has not all methods of a number."""
    for num_tokens, top_k, num_experts, hidden in itertools.product(
        (1, 20), (1, 3), (1, 2), (1, 9)
    ):
        if num_experts % world_size == 0:
            sizes = Sizes(num_tokens, top_k, num_experts, 8, hidden)
            for call in expert_parallel(sizes, torch.float32, world_size, push).values():
                compiled(call)

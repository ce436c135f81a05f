# SPDX-License-Identifier: Apache-2.0
"""Values exactly at a boundary are right in the interpreter. tests/ops has the same on the CPU."""

import pytest
import torch

import moe_ops
from testing import boundaries, reference
from testing.gemm_problem import MODES
from testing.interpreted import pytestmark  # noqa: F401

CPU = torch.device("cpu")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("counts", "tail"), [((2, 2, 2, 2), 1), ((2, 2, 2, 2), 2), ((40, 30), 1)])
def test_tails_of_one_row_and_of_more(counts, tail, mode):
    """For few rows the kernel finds its tiles itself, for more it reads a schedule."""
    widths = boundaries.TAIL_WIDTHS[tail % 2]
    given = boundaries.tail_problem(
        tail, torch.float16, widths=widths, counts=counts, device=CPU, **MODES[mode]
    )
    boundaries.check_tail(given, tail)


@pytest.mark.parametrize("flags", boundaries.LIMITED)
def test_gradients_pass_at_the_limit_and_not_beyond(flags):
    """fp32 and fp16 take turns."""
    dtype = (torch.float32, torch.float16)[list(boundaries.LIMITED).index(flags) % 2]
    given = boundaries.limit_problem(
        dtype, device=CPU, hidden_size=6, intermediate_size=9, **boundaries.LIMITED[flags]
    )
    boundaries.check_limit(given)


@pytest.mark.parametrize("num_slots", [63, 64, 65, 511, 512, 513])
def test_the_most_slots_that_one_program_sorts(num_slots):
    """And that one of one warp does. Some slots are dropped, at both ends of the ids."""
    generator = torch.Generator().manual_seed(num_slots)
    ids = torch.randint(-1, 7, (num_slots, 1), generator=generator)
    got, want = moe_ops.routing_indices(ids, 6), reference.routing_indices(ids, 6)
    for one, two in zip(got, want, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("hidden_size", [63, 64, 65])
def test_the_last_row_of_unpermute(hidden_size, weighted):
    """A program has one row, so there are no chunks. But the row may end within a block."""
    boundaries.check_unpermute((33, 2, hidden_size), torch.bfloat16, weighted=weighted, device=CPU)

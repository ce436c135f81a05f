# SPDX-License-Identifier: Apache-2.0
"""Widths that are multiples of 8 elements and not of 16, through descriptors, against fp64.

Every last tile is a part of one: what descriptors load past the ends must be zeros.
"""

import pytest
import torch

from moe_ops.configs import cache
from testing import experts_problem, gemm_problem
from testing.interpreted import pytestmark  # noqa: F401

CPU = torch.device("cpu")
# T and K by the range of rows that two experts get. Widths are 200 and 88.
ROWS = {"few": (5, 2), "some": (41, 2), "many": (100, 2)}


@pytest.fixture(autouse=True)
def _nothing_tuned(monkeypatch):
    monkeypatch.setenv("MOE_OPS_AUTOTUNE", "0")
    cache.forget()
    yield
    cache.forget()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_grouped_gemm(rows, layout, descriptors):
    shape = (*ROWS[rows], 2, 200, 88)
    given = gemm_problem.problem(shape, torch.float16, routing="dropped", layout=layout, device=CPU)
    gemm_problem.check(given)
    assert len(descriptors) >= (3 if rows == "few" else 6)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_experts(rows, layout, descriptors):
    shape = (*ROWS[rows], 2, 200, 88)
    given = experts_problem.problem(
        shape, torch.float16, routing="dropped", layout=layout, device=CPU
    )
    experts_problem.check(given)
    assert len(descriptors) >= (3 if rows == "few" else 6)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_what_descriptors_cannot_read_is_copied(layout, descriptors):
    shape = (*ROWS["many"], 2, 201, 89)
    given = gemm_problem.problem(shape, torch.float16, routing="dropped", layout=layout, device=CPU)
    gemm_problem.check(given)
    assert descriptors
    experts = experts_problem.problem(
        shape, torch.float16, routing="dropped", layout=layout, device=CPU
    )
    experts_problem.check(experts)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expert-last"])
@pytest.mark.parametrize("sides", [(1, 1), (100, 1), (1, 101), (1001, 1)])
def test_sides_of_one(sides, layout, descriptors):
    """Views give a dimension of size 1 any stride."""
    shape = (*ROWS["many"], 2, *sides)
    given = gemm_problem.problem(shape, torch.float16, routing="dropped", layout=layout, device=CPU)
    gemm_problem.check(given)


def test_sides_of_zero_of_many_rows(descriptors):
    for sides in ((64, 0), (0, 64)):
        shape = (*ROWS["many"], 2, *sides)
        gemm_problem.check(gemm_problem.problem(shape, torch.float16, device=CPU))


@pytest.mark.parametrize("width", [1, 3, 8, 1001])
@pytest.mark.parametrize("begin", range(5))
@pytest.mark.parametrize("dtype", [torch.float16, torch.int16, torch.float32])
def test_rows_that_begin_anywhere_are_gathered(width, begin, dtype):
    from moe_ops._triton.rows import gather_rows

    source = torch.arange(begin + 3 * (width + 2), dtype=dtype)[begin:].view(3, -1)[:, :width]
    gather = torch.tensor([5, 0, 6, 3, 1, -1])
    found = gather_rows(source, gather, None, 2, 2)
    expected = torch.stack(
        [source[slot // 2] if 0 <= slot < 6 else 0 * source[0] for slot in gather]
    )
    assert torch.equal(found, expected)
    assert found.stride(0) * found.itemsize % 32 == 0
    assert torch.equal(gather_rows(source, None, None, 1), source)

# SPDX-License-Identifier: Apache-2.0
"""Widths that are multiples of 8 elements and not of 16, through descriptors, against fp64.

Every last tile is a part of one: what descriptors load past the ends must be zeros.
"""

import pytest
import torch

from moe_ops.configs import choose
from testing import experts_problem, gemm_problem
from testing.interpreted import pytestmark  # noqa: F401

CPU = torch.device("cpu")
# T and K by the range of rows that two experts get. Widths are 200 and 88.
ROWS = {"few": (5, 2), "some": (41, 2), "many": (100, 2)}


@pytest.fixture(autouse=True)
def _nothing_tuned(monkeypatch):
    monkeypatch.setenv("MOE_OPS_AUTOTUNE", "0")
    choose.forget()
    yield
    choose.forget()


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

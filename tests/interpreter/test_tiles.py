# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm is right at sizes of several tiles, by pointers and by descriptors."""

import pytest
import torch

from testing.gemm_problem import MODES, check, problem
from testing.interpreted import pytestmark  # noqa: F401

CPU = torch.device("cpu")
# T, K, E, N, D: every dimension ends in a part of a tile.
SHAPE = (70, 2, 3, 136, 72)
DECODE = (2, 3, 8, 136, 264)
modes = pytest.mark.parametrize("mode", MODES)


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_pointers(mode, dtype):
    check(problem(SHAPE, dtype, routing="dropped", device=CPU, **MODES[mode]))


@modes
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_descriptors(mode, layout, descriptors):
    flags = MODES[mode]
    check(problem(SHAPE, torch.float16, routing="dropped", layout=layout, device=CPU, **flags))
    # Forward and dX describe the weight, and the rows if they are read in order.
    assert len(descriptors) >= 2


def pad(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Return the same rows with `width` elements from one to the next."""
    room = rows.new_full((*rows.shape[:-1], width), float("nan"))
    return room[..., : rows.shape[-1]].copy_(rows)


def test_descriptors_of_padded_rows(descriptors):
    """Rows of 200 bytes stand every 208: descriptors can read them, but not write a gradient so."""
    given = problem((150, 1, 2, 100, 100), torch.float16, device=CPU)
    for name in ("input", "weight"):
        given.arguments[name] = pad(given.arguments[name], 104)
    given.grad_output = pad(given.grad_output, 104)
    check(given)
    assert len(descriptors) >= 2


@modes
def test_few_rows(mode):
    check(problem(DECODE, torch.float16, routing="uniform", device=CPU, **MODES[mode]))


@pytest.mark.parametrize("routing", ["hot_and_empty", "all_dropped"])
def test_routings(routing):
    check(problem((40, 2, 4, 40, 40), torch.float16, routing=routing, device=CPU, bias=True))

# SPDX-License-Identifier: Apache-2.0
"""Values exactly at a boundary are right on a GPU. tests/ops has the same on the CPU."""

import pytest

from testing import boundaries
from testing.gemm_problem import MODES
from testing.on_device import DEVICE, DTYPES

pytestmark = pytest.mark.gpu

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.parametrize("counts", [(2, 2, 2, 2), (200, 0, 300, 256)], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tail", boundaries.TAILS)
@dtypes
def test_tails_of_no_row_of_one_and_of_many(dtype, tail, mode, counts):
    for widths in (*boundaries.TAIL_WIDTHS, (256, 128)):
        given = boundaries.tail_problem(
            tail, dtype, widths=widths, counts=counts, device=DEVICE, **MODES[mode]
        )
        boundaries.check_tail(given, tail)


@pytest.mark.parametrize("flags", boundaries.LIMITED)
@dtypes
def test_gradients_pass_at_the_limit_and_not_beyond(dtype, flags):
    boundaries.check_limit(
        boundaries.limit_problem(dtype, device=DEVICE, **boundaries.LIMITED[flags])
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", boundaries.CHUNK_SHAPES, ids=str)
@dtypes
def test_rows_at_the_ends_of_chunks(shape, dtype, weighted):
    boundaries.check_unpermute(shape, dtype, weighted=weighted, device=DEVICE)

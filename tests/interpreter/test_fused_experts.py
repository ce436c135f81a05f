# SPDX-License-Identifier: Apache-2.0
"""fused_experts at sizes of more than one tile, by pointers and by descriptors, against fp64."""

import pytest
import torch

from testing.experts_problem import MODES, check, problem
from testing.interpreted import pytestmark  # noqa: F401

CPU = torch.device("cpu")
# T, K, E, H, I: the last tile of every dimension is a part of one.
SHAPE = (70, 2, 3, 72, 136)
DECODE = (3, 2, 8, 72, 40)
modes = pytest.mark.parametrize("mode", MODES)


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_pointers(mode, dtype):
    check(problem(DECODE, dtype, routing="dropped", device=CPU, **MODES[mode]))


@modes
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_descriptors(mode, layout, descriptors):
    check(
        problem(SHAPE, torch.float16, routing="dropped", layout=layout, device=CPU, **MODES[mode])
    )
    # The pre-activation and the activation's output are stored by ragged ones.
    kinds = [kind for kind, _ in descriptors]
    assert kinds.count("ragged") >= 2
    assert kinds.count("plain") >= 2

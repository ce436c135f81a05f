# SPDX-License-Identifier: Apache-2.0
"""fused_experts is right at sizes of several tiles, by pointers and by descriptors."""

import pytest
import torch

from moe_ops import KernelConfigForward, kernel_config
from testing.experts_problem import MODES, check, problem
from testing.interpreted import pytestmark  # noqa: F401

CPU = torch.device("cpu")
# T, K, E, H, I: every dimension ends in a part of a tile.
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
    # Ragged descriptors store the pre-activation and the activation's output.
    kinds = [kind for kind, _ in descriptors]
    assert kinds.count("ragged") >= 2
    assert kinds.count("plain") >= 2


# In tiles of 16 rows the kernels find their tiles themselves, and no schedule counts the used rows.
LOW_TILES = kernel_config(forward=KernelConfigForward(BLOCK_M=16, BLOCK_N=32, BLOCK_K=32))


@pytest.mark.parametrize("weights_before", [False, True])
@pytest.mark.parametrize("tiles", [None, LOW_TILES], ids=["scheduled", "found"])
def test_the_weights_of_dropped_slots_are_not_read(tiles, weights_before):
    given = problem(
        DECODE, torch.float32, routing="dropped", device=CPU, weights_before=weights_before,
        kernel_config=tiles,
    )  # fmt: skip
    ids = given.arguments["topk_ids"]
    dropped = (ids < 0) | (ids >= DECODE[2])
    assert dropped.any()
    output, gradients = given.run()
    weights = given.arguments["topk_weights"].detach()
    given.arguments["topk_weights"] = weights.masked_fill(dropped, float("nan"))
    found, found_gradients = given.run()
    assert torch.equal(found, output)
    for name, gradient in gradients.items():
        assert torch.equal(found_gradients[name], gradient), name

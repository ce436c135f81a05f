# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm and its gradients are right with configurations that a caller gives."""

from typing import Any

import pytest
import torch

from moe_ops.configs.kernel_config import (
    KernelConfigBackward_dW,
    KernelConfigBackward_dX,
    KernelConfigForward,
)
from moe_ops.configs.kernel_string import kernel_config
from testing.gemm_problem import MODES, check, problem
from testing.interpreted import pytestmark  # noqa: F401

CPU = torch.device("cpu")
# T, K, E, N, D: every dimension ends in a part of a tile, and both widths are 16-byte rows.
SHAPE = (60, 2, 4, 136, 72)
EVERY_FLAG = ("permute_x-weights-bias", "permute_y-weights-bias")
SMALL: dict[str, Any] = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}

modes = pytest.mark.parametrize("mode", ["plain", *EVERY_FLAG])


def run(
    config: dict[str, Any] | None = None,
    *,
    forward: dict[str, Any] | None = None,
    dx: dict[str, Any] | None = None,
    dw: dict[str, Any] | None = None,
    shape: tuple[int, ...] = SHAPE,
    mode: str = EVERY_FLAG[0],
    dtype: torch.dtype = torch.float16,
    **more: Any,
) -> None:
    """Check with `config` for all three passes, and more fields for single ones."""
    given = problem(shape, dtype, device=CPU, **{"routing": "dropped", **MODES[mode], **more})
    config = config or {}
    given.arguments["kernel_config"] = kernel_config(
        KernelConfigForward(**config, **(forward or {})),
        KernelConfigBackward_dX(**config, **(dx or {})),
        KernelConfigBackward_dW(**config, **(dw or {})),
    )
    check(given)


@modes
@pytest.mark.parametrize("blocks", [(16, 64, 32), (32, 16, 64), (64, 32, 16), (128, 256, 128)])
def test_blocks(mode, blocks):
    """Tiles of 16 and 32 rows find themselves, larger ones are read from a schedule."""
    run(dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), blocks, strict=True)), mode=mode)


@modes
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("group_m", [1, 3])
def test_order_of_tiles(mode, flatten, group_m):
    run({**SMALL, "flatten": flatten, "group_m": group_m, "programs_per_sm": 3}, mode=mode)


TAILS: dict[str, Any] = {"forward": {"tail_tiles": True}, "dx": {"tail_tiles": True}}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block_m", [32, 64])
def test_tail_tiles(mode, block_m):
    run({**SMALL, "BLOCK_M": block_m, "flatten": False}, mode=mode, **TAILS)


@modes
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_tail_tiles_by_descriptors(mode, layout, descriptors):
    run(
        {**SMALL, "BLOCK_M": 64, "flatten": False, "use_tma_store": True},
        forward={"tail_tiles": True, "use_tma_load_x": True, "use_tma_load_w": True},
        dx={"tail_tiles": True, "use_tma_load_dy": True, "use_tma_load_w": True},
        mode=mode,
        layout=layout,
    )
    assert descriptors


# For each flag, the descriptors that the three passes of a plain call make for it.
ONE_FLAG = {
    "forward use_tma_load_x": [("plain", 2)],
    "forward use_tma_load_w": [("plain", 3)],
    "forward use_tma_store": [("ragged", 2)],
    "dx use_tma_load_dy": [("plain", 2)],
    "dx use_tma_load_w": [("plain", 3)],
    "dx use_tma_store": [("ragged", 2)],
    "dw use_tma_load_dy": [("ragged", 2)],
    "dw use_tma_load_x": [("ragged", 2)],
    "dw use_tma_store": [("plain", 3)],
}


@pytest.mark.parametrize("one", ONE_FLAG)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_one_descriptor(one, layout, descriptors):
    name, flag = one.split()
    for mode in ("plain", "permute_y-weights-bias"):
        descriptors.clear()
        given: dict[str, Any] = {name: {flag: True}}
        run(SMALL, **given, mode=mode, layout=layout)
        assert mode != "plain" or descriptors == ONE_FLAG[one]


@modes
@pytest.mark.parametrize("block_m", [16, 32, 64])
def test_every_descriptor(mode, block_m, descriptors):
    run(
        {**SMALL, "BLOCK_M": block_m, "use_tma_store": True},
        forward={"use_tma_load_x": True, "use_tma_load_w": True},
        dx={"use_tma_load_dy": True, "use_tma_load_w": True},
        dw={"use_tma_load_dy": True, "use_tma_load_x": True},
        mode=mode,
    )
    assert descriptors


@modes
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_halves(mode, tma, layout, descriptors):
    run(
        {**SMALL, "use_tma_store": tma, "epilogue_subtile": 2},
        dw={"use_tma_load_x": tma},
        mode=mode,
        layout=layout,
    )
    assert bool(descriptors) == tma


def test_descriptors_that_cannot_apply(descriptors):
    """Rows with an odd number of elements are read by pointers, with the same result."""
    flags = {"use_tma_load_w": True, "use_tma_store": True}
    run(SMALL, forward=flags, dx=flags, dw={"use_tma_store": True}, shape=(60, 2, 4, 35, 71))
    assert not descriptors


@pytest.mark.parametrize("block_m", [16, 32])
@pytest.mark.parametrize("mode", MODES)
def test_few_rows(block_m, mode):
    run({**SMALL, "BLOCK_M": block_m}, shape=(3, 2, 8, 72, 40), mode=mode)


@pytest.mark.parametrize("routing", ["hot_and_empty", "all_dropped", "uniform"])
@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("tma", [False, True])
def test_routings(routing, block_m, tma, descriptors):
    run(
        {**SMALL, "BLOCK_M": block_m, "use_tma_store": tma},
        mode="plain-weights-bias",
        routing=routing,
    )
    assert bool(descriptors) == tma


def test_fp32():
    for mode in EVERY_FLAG:
        run({**SMALL, "flatten": False}, mode=mode, dtype=torch.float32, **TAILS)

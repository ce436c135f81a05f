# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm_fp8 is right at sizes of several tiles and several scales."""

from typing import Any

import pytest
import torch

import moe_ops
from testing.gemm_problem import FP8_MODES, check, check_every_code, fp8_problem
from testing.interpreted import pytestmark  # noqa: F401

CPU = torch.device("cpu")
# T, K, E, N, D: every dimension ends in a part of a tile, and an expert has four scales.
SHAPE = (70, 2, 3, 136, 200)
DECODE = (2, 3, 8, 136, 264)
modes = pytest.mark.parametrize("mode", FP8_MODES)
layouts = pytest.mark.parametrize("layout", ["contiguous", "transposed", "padded", "expert-last"])


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_pointers(mode, dtype):
    check(fp8_problem(SHAPE, dtype, routing="dropped", device=CPU, **FP8_MODES[mode]))


@modes
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_descriptors(mode, layout, descriptors):
    shape = (140, 2, 3, 144, 208)
    flags = FP8_MODES[mode]
    check(fp8_problem(shape, torch.float16, routing="dropped", layout=layout, device=CPU, **flags))
    # Forward and dX describe the weight, and the rows if they are read in order.
    assert len(descriptors) >= 2


@modes
@layouts
def test_few_rows(mode, layout):
    check(fp8_problem(DECODE, torch.float16, layout=layout, device=CPU, **FP8_MODES[mode]))


@layouts
def test_strides_of_the_weight(layout):
    check(fp8_problem(SHAPE, torch.float16, layout=layout, device=CPU, weights=True))


def test_strides_of_the_scales():
    given = fp8_problem(SHAPE, torch.float16, device=CPU)
    scale = given.arguments["weight_scale"]
    given.arguments["weight_scale"] = scale.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    check(given)
    given.arguments["weight_scale"] = scale[:1, :1, :1].expand_as(scale)
    check(given)


@pytest.mark.parametrize("routing", ["hot_and_empty", "all_dropped"])
@pytest.mark.parametrize("mode", ["permute_x-weights", "permute_y-weights"])
def test_routings(routing, mode):
    shape = (40, 2, 4, 40, 40)
    check(fp8_problem(shape, torch.float16, routing=routing, device=CPU, **FP8_MODES[mode]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_code(dtype):
    check_every_code(dtype, CPU)


def configs(blocks: tuple[int, int, int], **more: Any) -> str:
    more.update(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), blocks, strict=True))
    return moe_ops.kernel_config(
        moe_ops.KernelConfigForward(**more), moe_ops.KernelConfigBackward_dX(**more)
    )


@pytest.mark.parametrize("mode", ["permute_x-weights", "permute_y-weights"])
@pytest.mark.parametrize("blocks", [(16, 64, 32), (32, 16, 128), (64, 128, 16), (128, 128, 128)])
def test_configurations(mode, blocks):
    """Tiles of 16 and 32 rows find themselves, larger ones are read from a schedule."""
    for flatten, subtile in ((False, 2), (True, 1)):
        given = fp8_problem((60, 2, 4, 136, 200), torch.float16, device=CPU, **FP8_MODES[mode])
        given.arguments["kernel_config"] = configs(
            blocks, flatten=flatten, epilogue_subtile=subtile, group_m=3, programs_per_sm=3
        )
        check(given)


@pytest.mark.parametrize("name", ["BLOCK_N", "BLOCK_K"])
@pytest.mark.parametrize("kind", ["forward", "backward_dX"])
def test_refuses_a_tile_of_several_scales(name, kind):
    made = {"forward": moe_ops.KernelConfigForward, "backward_dX": moe_ops.KernelConfigBackward_dX}
    given = fp8_problem(DECODE, torch.float16, device=CPU)
    block: dict[str, Any] = {name: 256}
    config: dict[str, Any] = {kind: made[kind](**block)}
    given.arguments["kernel_config"] = moe_ops.kernel_config(**config)
    expected = f"^moe::grouped_gemm_fp8: expected {name} <= 128 in kernel_config, .*, got 256$"
    with pytest.raises(ValueError, match=expected):
        given.run()


def test_refuses_tail_tiles():
    given = fp8_problem(DECODE, torch.float16, device=CPU)
    config = moe_ops.KernelConfigForward(BLOCK_M=32, flatten=False, tail_tiles=True)
    given.arguments["kernel_config"] = moe_ops.kernel_config(config)
    with pytest.raises(ValueError, match=r"^moe::grouped_gemm_fp8: expected tail_tiles=False"):
        given.run()

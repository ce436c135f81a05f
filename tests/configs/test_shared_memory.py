# SPDX-License-Identifier: Apache-2.0
"""The estimate of shared memory, by which configurations fit, is that of compiled kernels.

No GPU is needed. How Triton uses shared memory is its own affair, so a new release may fail this.
"""

import os
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch

from moe_ops.configs.footprint import shared_memory
from moe_ops.configs.kernel_config import (
    PASSES,
    KernelConfig,
    KernelConfigBackward_dW,
    KernelConfigBackward_dX,
    KernelConfigForward,
)
from moe_ops.configs.kernel_string import kernel_config
from testing.problem_keys import make_problem

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels, which TRITON_INTERPRET=1 interprets", allow_module_level=True)
pytest.importorskip("triton", exc_type=ImportError)

from testing import kernel_calls as calls
from testing.compiled import GPUS, compiling_for
from testing.kernel_calls import SIZES

pytestmark = pytest.mark.slow


def forward(m: int, n: int, k: int, warps: int, stages: int, **fields: int) -> KernelConfig:
    return KernelConfigForward(m, n, k, warps, stages, **cast(dict[str, Any], fields))


def dx(m: int, n: int, k: int, warps: int, stages: int, **fields: int) -> KernelConfig:
    return KernelConfigBackward_dX(m, n, k, warps, stages, **cast(dict[str, Any], fields))


def dw(m: int, n: int, k: int, warps: int, stages: int, **fields: int) -> KernelConfig:
    return KernelConfigBackward_dW(m, n, k, warps, stages, **cast(dict[str, Any], fields))


TMA: dict[str, bool] = {"use_tma_load_x": True, "use_tma_load_w": True}
TMA_DX = {"use_tma_load_dy": True, "use_tma_load_w": True}
TMA_DW = {"use_tma_load_dy": True, "use_tma_load_x": True}
STORE = {"use_tma_store": True}
# Each case has a term of the estimate that no other has, or is the widest of its kind.
CASES: dict[str, tuple[KernelConfig, dict[str, bool], tuple[str, ...]]] = {
    "specialized": (
        forward(128, 256, 64, 8, 3, warp_specialize=True, **TMA, **STORE),
        {},
        (),
    ),
    "specialized dX": (dx(128, 32, 256, 8, 6, warp_specialize=True, **TMA_DX, **STORE), {}, ()),
    "specialized dW": (dw(32, 128, 256, 8, 6, warp_specialize=True, **TMA_DW, **STORE), {}, ()),
    "tall": (forward(192, 256, 64, 8, 3, warp_specialize=True, **TMA, **STORE), {}, ()),
    "tall dX": (dx(192, 32, 256, 8, 6, warp_specialize=True, **TMA_DX, **STORE), {}, ()),
    "tall, scattered": (
        forward(192, 256, 64, 8, 3, warp_specialize=True, **TMA, **STORE),
        {"permute_y": True},
        ("scatter",),
    ),
    "in turns": (
        forward(128, 128, 64, 8, 6, epilogue_subtile=2, warp_specialize=True, **TMA, **STORE),
        {},
        (),
    ),
    "in turns, deep": (
        forward(128, 128, 128, 8, 2, warp_specialize=True, **TMA, **STORE),
        {},
        (),
    ),
    "in turns, scattered": (
        forward(128, 128, 64, 8, 5, warp_specialize=True, **TMA, **STORE),
        {"permute_y": True},
        ("scatter",),
    ),
    "in turns, dW": (
        dw(64, 128, 128, 8, 6, epilogue_subtile=2, warp_specialize=True, **TMA_DW, **STORE),
        {},
        (),
    ),
    "pointers store in halves": (forward(128, 256, 64, 8, 3, **TMA), {}, ()),
    "pointers store at once": (forward(128, 128, 64, 8, 4), {}, ()),
    "fewer rows than the tile has": (forward(128, 64, 64, 4, 3), {}, ()),
    "not flattened": (forward(128, 256, 64, 8, 3, flatten=False, **TMA), {}, ()),
    "stored by a descriptor": (forward(64, 256, 64, 4, 3, **TMA, **STORE), {}, ()),
    "stored in halves": (
        forward(128, 256, 64, 8, 4, epilogue_subtile=2, **TMA, **STORE),
        {},
        (),
    ),
    "pointers store two halves": (forward(128, 256, 64, 8, 4, epilogue_subtile=2, **TMA), {}, ()),
    "tails": (forward(128, 128, 64, 8, 3, flatten=False, tail_tiles=True, **TMA, **STORE), {}, ()),
    "scattered": (forward(128, 128, 64, 4, 4, **STORE), {"permute_y": True}, ("scatter",)),
    "few rows, flattened": (forward(32, 128, 128, 4, 3), {}, ()),
    "dX, dots": (dx(128, 64, 128, 8, 4, **TMA_DX, **STORE), {"weights": True}, ("scale", "dots")),
    "dW, pointers": (dw(64, 128, 256, 8, 3), {}, ()),
    "dW, transposed": (
        dw(64, 32, 128, 4, 4, **TMA_DW, **STORE),
        {"transposed": True},
        ("transposed",),
    ),
    "dW, in halves": (dw(64, 128, 256, 8, 4, epilogue_subtile=2, **TMA_DW, **STORE), {}, ()),
    "dW, descriptors": (dw(32, 128, 128, 4, 4, **TMA_DW, **STORE), {}, ()),
}


def taken(
    config: KernelConfig, dtype: str, gpu: str, dots: bool = False, **mode: bool
) -> tuple[str, int]:
    """Return the pass, and the bytes of its GEMM, which takes the most of all kernels launched."""
    kind = next(kind for kind, made in PASSES.items() if isinstance(config, made))
    text = kernel_config(**cast(dict[str, Any], {kind: config}))
    made = calls.grouped_gemm(
        SIZES["training"], getattr(torch, dtype), kernel_config=text, **cast(dict[str, Any], mode)
    )
    name = {"forward": "forward", "backward_dX": "dx", "backward_dW": "dw"}[kind]
    with compiling_for(GPUS[gpu]) as found:
        made["dx-dots" if dots else name]()
    return kind, max(kernel.shared for kernel in found)


def estimated(config: KernelConfig, kind: str, dtype: str, gpu: str, flags: tuple[str, ...]) -> int:
    return shared_memory(config, make_problem(kind, dtype, 128, 1536, 2048, 512, flags), GPUS[gpu])


@pytest.mark.parametrize(("config", "mode", "flags"), CASES.values(), ids=CASES)
def test_is_what_triton_takes_on_hopper(config, mode, flags):
    kind, actual = taken(config, "bfloat16", "sm_90", "dots" in flags, **mode)
    assert actual <= estimated(config, kind, "bfloat16", "sm_90", flags) <= 1.08 * actual


@pytest.mark.parametrize("subtile", [1, 2])
@pytest.mark.parametrize("keeps", [False, True])
def test_is_what_an_activation_takes(subtile, keeps):
    """The estimate is an upper bound. A kernel that keeps no pre-activation takes less."""
    config = KernelConfigForward(
        128, 256, 64, 8, 3, epilogue_subtile=subtile,
        use_tma_load_x=True, use_tma_load_w=True, use_tma_store=True,
    )  # fmt: skip
    made = calls.experts(
        SIZES["training"], torch.bfloat16, kernel_config=kernel_config(forward=config)
    )
    with compiling_for(GPUS["sm_90"]) as found:
        made["forward" if keeps else "inference"]()
    (actual,) = (kernel.shared for kernel in found if kernel.kernel == "_expert_up_kernel")
    bound = estimated(config, "forward", "bfloat16", "sm_90", ("gather", "gated"))
    assert actual <= bound
    assert not keeps or bound <= 1.08 * actual


@pytest.mark.parametrize(("num_stages", "subtile"), [(4, 1), (5, 2), (6, 2)])
def test_is_what_an_activation_takes_in_turns(num_stages, subtile):
    """It follows the up projection, and the backward of the down projection."""
    fields = {"epilogue_subtile": subtile, "warp_specialize": True, **STORE}
    up = KernelConfigForward(128, 128, 64, 8, num_stages, **TMA, **fields)
    down = KernelConfigBackward_dX(128, 64, 128, 8, num_stages, **TMA_DX, **fields)
    made = calls.experts(SIZES["training"], torch.bfloat16, kernel_config=kernel_config(up, down))
    with compiling_for(GPUS["sm_90"]) as found:
        made["forward"]()
        made["backward"]()
    shared = {kernel.kernel: kernel.shared for kernel in found}
    for name, config, kind, flags in (
        ("expert_up_pingpong_kernel", up, "forward", ("gather", "gated")),
        ("expert_down_bwd_pingpong_kernel", down, "backward_dX", ("gated",)),
    ):
        bound = estimated(config, kind, "bfloat16", "sm_90", flags)
        assert shared[name] <= bound <= 1.08 * shared[name]


@pytest.fixture
def tf32() -> Iterator[None]:
    """Multiply fp32 as tf32, which takes more memory than fp32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    yield
    matmul.fp32_precision = before


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize(
    ("gpu", "dtype", "config"),
    [
        ("sm_75", "float16", forward(16, 64, 128, 4, 4, flatten=False)),
        ("sm_80", "bfloat16", forward(128, 128, 32, 8, 3)),
        ("sm_100", "bfloat16", forward(128, 64, 64, 8, 3, **TMA)),
        ("sm_90", "float32", forward(64, 64, 32, 4, 3)),
        ("sm_90", "float32", forward(64, 64, 32, 4, 3, flatten=False)),
    ],
)
def test_is_no_less_elsewhere(gpu, dtype, config):
    kind, actual = taken(config, dtype, gpu)
    assert actual <= estimated(config, kind, dtype, gpu, ())

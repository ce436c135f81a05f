# SPDX-License-Identifier: Apache-2.0
"""Widths that are multiples of 8 elements and not of 16 get Hopper's descriptors, and do not spill.

Without a GPU: the kernels are compiled for sm_90 and counted.
"""

import os

import pytest
import torch

from moe_ops.configs import cache

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels, which TRITON_INTERPRET=1 interprets", allow_module_level=True)
pytest.importorskip("triton", exc_type=ImportError)

from testing import kernel_calls as calls
from testing.compiled import GPUS, Resources, compiling_for
from testing.gemm_problem import MODES
from testing.kernel_calls import Call, Sizes

pytestmark = pytest.mark.slow

BF16 = torch.bfloat16
# hidden_size 1000 and intermediate_size 344: of an up projection with its gate, and of a down one.
TRAINING = Sizes(10007, 3, 24, 688, 1000)
DOWN = Sizes(10007, 3, 24, 1000, 344)
DECODE = Sizes(8, 3, 24, 688, 1000)
LOAD = "cp.async.bulk.tensor"


@pytest.fixture(autouse=True)
def _nothing_tuned(monkeypatch):
    monkeypatch.setenv("MOE_OPS_AUTOTUNE", "0")
    cache.forget()
    yield
    cache.forget()


def compiled(*called: Call) -> list[Resources]:
    with compiling_for(GPUS["sm_90"]) as found:
        for call in called:
            call()
    return found


def test_a_step_of_experts_runs_in_wide_tiles():
    kernels = compiled(*calls.experts(TRAINING, BF16).values())
    products = [kernel for kernel in kernels if LOAD in kernel.ptx]
    assert {kernel.kernel for kernel in products} == {
        "_expert_up_kernel", "grouped_gemm_cooperative_kernel",
        "grouped_gemm_bwd_dw_cooperative_kernel",
    }  # fmt: skip
    assert not any("mma" in kernel.ptx for kernel in kernels if kernel not in products)
    assert {kernel.stack for kernel in kernels} == {0}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", [TRAINING, DOWN], ids=["up", "down"])
@pytest.mark.parametrize("mode", MODES)
def test_a_grouped_gemm_loads_by_descriptors_and_does_not_spill(mode, sizes, transposed):
    for name, call in calls.grouped_gemm(sizes, BF16, transposed=transposed, **MODES[mode]).items():
        kernels = compiled(call)
        assert any(LOAD in kernel.ptx for kernel in kernels), name
        assert max(kernel.stack for kernel in kernels) <= (8 if "dots" in name else 0), name


def test_decoding_loads_the_weights_by_descriptors():
    """Pointers would read them number by number."""
    kernels = compiled(calls.experts(DECODE, BF16)["inference"])
    products = {kernel.kernel: LOAD in kernel.ptx for kernel in kernels if "mma" in kernel.ptx}
    assert products == {"_expert_up_kernel": True, "grouped_gemm_kernel": True}


def test_rows_move_in_pieces_of_16_bytes():
    kernels = compiled(*calls.experts(TRAINING, BF16).values())
    found = {kernel.kernel: kernel.ptx for kernel in kernels}
    for name in ("copy_rows_kernel", "sum_rows_kernel"):
        moves = [line.split()[-1] for line in found[name].splitlines() if ".global" in line]
        assert ".v4.b32" in found[name], moves
        assert ".global.b16" not in found[name], moves


# Rows that TMA cannot describe.
ODD = Sizes(num_tokens=8192, top_k=4, num_experts=16, out_features=2002, in_features=1001)
STORE = "global.shared::cta.bulk_group"


def test_h_is_stored_by_descriptor_where_no_pre_activation_is():
    """The rows of h begin at sectors at any width, those of the pre-activation do not.

    Beside a bias another kernel would store it, and add the bias at another time.
    """
    for bias in (False, True):
        found = calls.experts(ODD, BF16, bias=bias)
        stores = {
            name: STORE in kernel.ptx
            for name in ("inference", "forward")
            for kernel in compiled(found[name])
            if kernel.kernel == "_expert_up_kernel"
        }
        assert stores == {"inference": not bias, "forward": False}


def test_the_gradient_of_the_pre_activation_is_copied_once_for_both_products():
    """Copied are dY, dz, the hidden states and both weights, and no h: its rows begin at sectors."""
    kernels = [kernel.kernel for kernel in compiled(calls.experts(ODD, BF16)["backward"])]
    assert kernels.count("shift_rows_kernel") == 5


@pytest.mark.parametrize("num_tokens", [8, 512, 1024])
@pytest.mark.parametrize("widths", [(1536, 2001), (1522, 2048)], ids=["hidden", "intermediate"])
def test_few_rows_of_odd_widths_do_not_spill(num_tokens, widths):
    """An expert has 1, 32 or 64 rows. A few bytes of stack cost nothing; thousands took 38 times as long."""
    found = calls.experts(Sizes(num_tokens, 8, 128, *widths), BF16)
    kernels = compiled(*(found[name] for name in ("inference", "forward", "backward")))
    assert max(kernel.stack for kernel in kernels) <= 32

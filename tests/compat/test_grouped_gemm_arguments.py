# SPDX-License-Identifier: Apache-2.0
"""moe_ops.compat.grouped_gemm keeps its signature, ignores some flags, and rejects bad input."""

import inspect
from typing import Any

import pytest
import torch

import moe_ops
from moe_ops.compat import grouped_gemm
from testing import checks
from testing.compat_problem import problem
from testing.recorders import MoeOps


def test_signature():
    """Code written for it relies on names, order and defaults."""
    expected = (
        "X W m_sizes topk gather_indices=None permute_x=False permute_y=False topk_weights=None "
        "fuse_mul_post=False kernel_config_fwd=None kernel_config_bwd_dX=None "
        "kernel_config_bwd_dW=None autotune=False is_first_gemm=True dX_only=False dW_only=False"
    )
    parameters = inspect.signature(grouped_gemm).parameters.values()
    found = [
        p.name if p.default is inspect.Parameter.empty else f"{p.name}={p.default}"
        for p in parameters
    ]
    assert " ".join(found) == expected


@pytest.mark.parametrize("flag", ["is_first_gemm", "autotune"])
def test_flags_without_effect_on_numbers(flag):
    call = problem().call(permute_x=False, permute_y=True, weighted=True)
    with MoeOps() as ops:
        one, other = (grouped_gemm(**{**call, flag: value}) for value in (True, False))
    assert torch.equal(one, other)
    assert ops.names == ["grouped_gemm"] * 2


FORWARD = moe_ops.KernelConfigForward(BLOCK_M=64)
REJECTED: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "W of one dimension": (
        ValueError,
        {"W": torch.randn(45)},
        "expected W to have 2 or 3 dimensions, got 1",
    ),
    "W of two dimensions": (
        ValueError,
        {"W": torch.randn(36, 45)},
        "expected W.shape[0] to be a multiple of m_sizes.numel() (5), got 36",
    ),
    "no experts": (
        ValueError,
        {"W": torch.randn(0, 45), "m_sizes": torch.zeros(0, dtype=torch.int64)},
        "expected W.shape[0] to be a multiple of m_sizes.numel() (0), got 0",
    ),
    "floating counts": (
        TypeError,
        {"m_sizes": torch.ones(5)},
        "expected m_sizes to have an integer dtype, got torch.float32",
    ),
    "boolean indices": (
        TypeError,
        {"gather_indices": torch.ones(39, dtype=torch.bool)},
        "expected gather_indices to have an integer dtype, got torch.bool",
    ),
    "both only": (
        ValueError,
        {"dX_only": True, "dW_only": True},
        "expected at most one of dX_only and dW_only, got both",
    ),
    "nothing to multiply": (
        ValueError,
        {"fuse_mul_post": True},
        "expected topk_weights with fuse_mul_post=True, got None",
    ),
    "weights of part of a token": (
        ValueError,
        {"fuse_mul_post": True, "topk_weights": torch.rand(38)},
        "expected topk_weights.shape[0] to be a multiple of topk (3), got 38",
    ),
    "autotune and a configuration": (
        ValueError,
        {"autotune": True, "kernel_config_fwd": FORWARD},
        (
            "expected autotune=False with kernel_config_fwd, kernel_config_bwd_dX or "
            "kernel_config_bwd_dW, got True"
        ),
    ),
    "the configuration of another GEMM": (
        TypeError,
        {"kernel_config_bwd_dX": FORWARD},
        "expected kernel_config_bwd_dX to be a KernelConfigBackward_dX, got KernelConfigForward",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects(name):
    error, arguments, text = REJECTED[name]
    call = problem().call(permute_x=False, permute_y=False, weighted=False)
    found = checks.assert_rejects(error, (), grouped_gemm, {**call, **arguments})
    assert found == f"moe_ops.compat.grouped_gemm: {text}"


CONFIGS = [{}, {"kernel_config_fwd": FORWARD}, {"autotune": True}]


@pytest.mark.parametrize("tuned", CONFIGS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_rejects_both_permutations(tuned, weighted):
    """The error is the op's own in eager code, on fake tensors and on meta tensors."""
    call = problem(permute_x=True).call(True, permute_y=True, weighted=weighted)
    found = checks.assert_rejects(ValueError, (), grouped_gemm, {**call, **tuned})
    assert found.startswith("moe::grouped_gemm: expected not (permute_x and permute_y)")

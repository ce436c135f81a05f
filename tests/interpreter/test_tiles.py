# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm at sizes of more than one tile, by pointers and by descriptors, against fp64."""

import pytest
import torch

from tests.gpu.gemm_problem import MODES, check, problem
from tests.interpreter.interpreted import pytestmark  # noqa: F401

CPU = torch.device("cpu")
# T, K, E, N, D: the last tile of every dimension is a part of one.
SHAPE = (70, 2, 3, 136, 72)
DECODE = (2, 3, 8, 136, 264)
modes = pytest.mark.parametrize("mode", MODES)


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_pointers(mode, dtype):
    check(problem(SHAPE, dtype, routing="dropped", device=CPU, **MODES[mode]))


@modes
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_descriptors(mode, layout, monkeypatch):
    """What runs on Hopper, where descriptors can read the tensors."""
    launch = pytest.importorskip("moe_ops.ops.grouped_gemm.launch")
    used = []

    def has_tma(*tensors: torch.Tensor) -> bool:
        used.append(all(_is_readable(tensor) for tensor in tensors))
        return used[-1]

    monkeypatch.setattr(launch, "_has_tma", has_tma)
    given = problem(
        SHAPE, torch.float16, routing="dropped", layout=layout, device=CPU, **MODES[mode]
    )
    check(given)
    assert any(used)


def _is_readable(tensor: torch.Tensor) -> bool:
    strides = [stride * tensor.element_size() for stride in tensor.stride()[:-1]]
    return (
        tensor.data_ptr() % 16 == 0
        and tensor.stride(-1) == 1
        and all(stride > 0 and stride % 16 == 0 for stride in strides)
    )


@modes
def test_few_rows(mode):
    check(problem(DECODE, torch.float16, routing="uniform", device=CPU, **MODES[mode]))


@pytest.mark.parametrize("routing", ["hot_and_empty", "all_dropped"])
def test_routings(routing):
    check(problem((40, 2, 4, 40, 40), torch.float16, routing=routing, device=CPU, bias=True))

# SPDX-License-Identifier: Apache-2.0
"""ep_dispatch and ep_combine on several ranks, with interpreted kernels: the oracle's results."""

import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_ops
from moe_ops._core.library import OPS
from moe_ops._core.transport import ENVIRONMENT_VARIABLE
from testing.ep_ops import check_against_the_oracle, check_bits, group_name
from testing.interpreted import pytestmark  # noqa: F401

EP_OPS = ("ep_combine", "ep_combine_backward", "ep_dispatch", "ep_dispatch_backward")


def test_triton_serves_them():
    assert {OPS[name].choose("cpu").name for name in EP_OPS} == {"triton"}


@pytest.mark.parametrize("needs", [[True, False], [False, True], [False, False]])
def test_gradients_that_nobody_needs_have_the_dtype_of_the_fakes(needs):
    rows, weights = torch.ones(4, 2, dtype=torch.float16), torch.ones(4, 1)
    ids, slots = torch.zeros(4, 1, dtype=torch.int32), torch.arange(4, dtype=torch.int32)[:, None]
    arguments = (rows, weights, ids, slots, 6, 1, 4, "", needs)
    found = torch.ops.moe.ep_dispatch_backward(*arguments)
    with FakeTensorMode() as mode:
        given = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        expected = torch.ops.moe.ep_dispatch_backward(*given)
    for one, two in zip(found, expected, strict=True):
        assert (one.shape, one.dtype) == (two.shape, two.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_against_the_oracle(ranks, world_size):
    ranks(world_size).run(check_against_the_oracle, seeds=30)


@pytest.mark.slow
def test_bitwise_repeatable(ranks):
    ranks(2).run(check_bits)


def check_a_wish_that_cannot_be_met(rank, world_size):
    os.environ[ENVIRONMENT_VARIABLE] = "symmetric"
    try:
        with pytest.raises(RuntimeError, match=r"=symmetric: the tensors of rank 0 are on cpu"):
            moe_ops.ep_dispatch(
                torch.ones(1, 2), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1),
                4, 2, 1, group_name(),
            )  # fmt: skip
    finally:
        del os.environ[ENVIRONMENT_VARIABLE]


@pytest.mark.slow
def test_a_wish_that_cannot_be_met(ranks):
    ranks(2).run(check_a_wish_that_cannot_be_met)

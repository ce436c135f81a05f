# SPDX-License-Identifier: Apache-2.0
"""ep_dispatch and ep_combine on several ranks, with interpreted kernels: the oracle's results."""

import pytest

from moe_ops._core.library import OPS
from testing.ep_ops import check_against_the_oracle, check_bits
from testing.interpreted import pytestmark  # noqa: F401

EP_OPS = ("ep_combine", "ep_combine_backward", "ep_dispatch", "ep_dispatch_backward")


def test_triton_serves_them():
    assert {OPS[name].choose("cpu").name for name in EP_OPS} == {"triton"}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_against_the_oracle(ranks, world_size):
    ranks(world_size).run(check_against_the_oracle, seeds=30)


@pytest.mark.slow
def test_bitwise_repeatable(ranks):
    ranks(2).run(check_bits)

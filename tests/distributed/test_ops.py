# SPDX-License-Identifier: Apache-2.0
"""ep_dispatch and ep_combine on several ranks are the oracle's, values and gradients."""

import itertools

import pytest
import torch

import moe_ops
from testing.ep_ops import calls, check_against_the_oracle, check_bits, filled, group_name

WORLDS = [2, 4]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLDS)
def test_against_the_oracle(ranks, world_size):
    ranks(world_size).run(check_against_the_oracle)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLDS)
def test_bitwise_repeatable(ranks, world_size):
    ranks(world_size).run(check_bits)


def check_needs_are_kept_apart(rank, world_size):
    """A gradient that nobody asks for is not sent, and the others are as they were."""
    name = group_name()
    inputs, ids, weights, num_experts, capacity = calls(world_size, 3)
    sizes = (num_experts, world_size, capacity, name)
    for needs in itertools.product((True, False), repeat=2):
        leaves = [
            tensor.clone().requires_grad_(need)
            for tensor, need in zip((inputs[rank], weights[rank]), needs, strict=True)
        ]
        rows, local, sent, *_ = moe_ops.ep_dispatch(leaves[0], ids[rank], leaves[1], *sizes)
        asked = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
        if not asked:
            assert not rows.requires_grad
            continue
        total = rows.masked_fill(~filled(local), 0).sum() * needs[0] + sent.sum() * needs[1]
        found = torch.autograd.grad(total, asked)
        assert all(g.isfinite().all() for g in found)


@pytest.mark.slow
def test_gradients_of_one_argument(ranks):
    ranks(2).run(check_needs_are_kept_apart)


def check_wrong_world(rank, world_size):
    rows, ids = torch.ones(1, 2), torch.zeros(1, 1, dtype=torch.int32)
    name = group_name()
    with pytest.raises(
        ValueError, match=r"expected world_size == number of ranks of group .* \(2\)"
    ):
        moe_ops.ep_dispatch(rows, ids, torch.ones(1, 1), 4, 4, 1, name)


@pytest.mark.slow
def test_another_world_size_than_the_groups(ranks):
    ranks(2).run(check_wrong_world)

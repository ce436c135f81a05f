# SPDX-License-Identifier: Apache-2.0
"""Checks of ep_dispatch and ep_combine on several ranks: the results are the oracle's.

Each rank draws the calls of all ranks, so nothing is sent to compare with. testing.ranks runs the
checks.
"""

import random

import torch
from torch import Tensor, distributed

import moe_ops
from testing import checks, oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


def group_name() -> str:
    group = distributed.group.WORLD
    assert group is not None
    return group.group_name


def calls(world_size: int, seed: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], int, int]:
    """Draw the call of every rank; each rank draws all of them."""
    choose = random.Random(seed)
    num_local, top_k = choose.choice((1, 2, 3)), choose.choice((1, 2, 4))
    num_experts, width = world_size * num_local, choose.choice((1, 3, 8))
    dtype, weights_dtype = choose.choice(DTYPES), choose.choice(DTYPES)
    index_dtype = choose.choice((torch.int32, torch.int64))
    counts = [choose.choice((0, 1, 3, 7)) for _ in range(world_size)]
    # Often too few, now and then room for all.
    capacity = choose.choice((0, 1, 2, 3, 7))
    kind = choose.choice([k for k in oracle.ROUTINGS if k != "every_expert"])
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = [draw(count, width).to(dtype) for count in counts]
    ids = [
        oracle.random_topk_ids(kind, count, num_experts, top_k, generator, index_dtype)
        for count in counts
    ]
    weights = [draw(count, top_k).to(weights_dtype) for count in counts]
    return inputs, ids, weights, num_experts, capacity


def filled(local_ids: Tensor) -> Tensor:
    """Return the rows that hold a token, as a column."""
    return (local_ids >= 0).any(1, keepdim=True)


def check_against_the_oracle(rank: int, world_size: int, seeds: int = 60) -> None:
    """Compare values and gradients."""
    name = group_name()
    for seed in range(seeds):
        inputs, ids, weights, num_experts, capacity = calls(world_size, seed)
        sizes = (num_experts, world_size, capacity, name)
        leaves = [inputs[rank].clone().requires_grad_(), weights[rank].clone().requires_grad_()]
        with checks.poisoned_memory():
            got = moe_ops.ep_dispatch(leaves[0], ids[rank], leaves[1], *sizes)
        every = oracle.expert_parallel.dispatch(inputs, ids, weights, num_experts, capacity)
        want = every[rank]
        mask = filled(want[1])
        what = f"seed {seed}"
        checks.assert_close(got[0].masked_fill(~mask, 0), want[0].masked_fill(~mask, 0), what=what)
        checks.assert_close(got[2], want[2], what=what)
        assert got[2].dtype == weights[rank].dtype
        for one, two in zip((got[1], *got[3:]), (want[1], *want[3:]), strict=True):
            assert one.dtype == two.dtype
            assert torch.equal(one, two), what

        # Experts that weight their rows. What they make of a row without a token is NaN.
        outputs = (got[0] * got[2].sum(1, keepdim=True).to(got[0].dtype)).masked_fill(
            ~mask, float("nan")
        )
        output = moe_ops.ep_combine(outputs, got[1], got[3], *sizes)
        made = [each[0] * each[2].sum(1, keepdim=True) for each in every]
        sums = oracle.expert_parallel.combine(made, [e[3] for e in every], num_experts, capacity)
        scale = torch.stack([each.nan_to_num().abs().sum() for each in made]).sum()
        dtype = checks.coarser(output.dtype, weights[rank].dtype)
        checks.assert_close(output, sums[rank], dtype=dtype, scale=scale, what=what)

        # The oracle's rows of all ranks, differentiated together.
        clones = [[t.double().clone().requires_grad_() for t in each] for each in (inputs, weights)]
        every = oracle.expert_parallel.dispatch(clones[0], ids, clones[1], num_experts, capacity)
        made = [(e[0] * e[2].sum(1, keepdim=True)).nan_to_num() for e in every]
        sums = oracle.expert_parallel.combine(made, [e[3] for e in every], num_experts, capacity)
        tangents = [
            torch.linspace(-1, 1, s.numel(), dtype=torch.float64).reshape(s.shape) for s in sums
        ]
        terms = [(s * t).sum() for s, t in zip(sums, tangents, strict=True)]
        total = torch.stack([*terms, *(0 * leaf.sum() for leaf in clones[0] + clones[1])]).sum()
        own = [clones[0][rank], clones[1][rank]]
        expected = torch.autograd.grad(total, own, allow_unused=True, materialize_grads=True)
        found = torch.autograd.grad(output, leaves, tangents[rank].to(output.dtype))
        for one, two, leaf in zip(found, expected, leaves, strict=True):
            assert one.dtype == leaf.dtype
            size = torch.tensor(float(two.numel())).sqrt() * 8
            checks.assert_close(one, two, dtype=dtype, scale=size, what=what)


def check_bits(rank: int, world_size: int) -> None:
    """Check that the same call gives the same bits."""
    name = group_name()
    for seed in range(10):
        inputs, ids, weights, num_experts, capacity = calls(world_size, seed)
        sizes = (num_experts, world_size, capacity, name)
        found = []
        for _ in range(2):
            rows, local, *rest = moe_ops.ep_dispatch(inputs[rank], ids[rank], weights[rank], *sizes)
            rows = rows.masked_fill(~filled(local), 0)
            found.append([rows, local, *rest, moe_ops.ep_combine(rows, local, rest[1], *sizes)])
        for one, two in zip(*found, strict=True):
            assert torch.equal(one, two)

# SPDX-License-Identifier: Apache-2.0
"""Checks of ep_dispatch and ep_combine on several ranks: the results are the oracle's.

Each rank draws the calls of all ranks, so nothing is sent to compare with. testing.ranks runs the
checks.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor, distributed

import moe_ops
from testing import checks, oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


def dtypes_of(device: str) -> tuple[torch.dtype, ...]:
    """Return the dtypes of rows that the device takes."""
    return DTYPES if device == "cpu" else tuple(d for d in DTYPES if d != torch.float64)


def group_name() -> str:
    group = distributed.group.WORLD
    assert group is not None
    return group.group_name


def calls(
    world_size: int, seed: int, dtypes: Sequence[torch.dtype] = DTYPES
) -> tuple[list[Tensor], list[Tensor], list[Tensor], int, int]:
    """Draw the call of every rank; each rank draws all of them."""
    choose = random.Random(seed)
    num_local, top_k = choose.choice((1, 2, 3)), choose.choice((1, 2, 4))
    num_experts, width = world_size * num_local, choose.choice((1, 3, 8))
    dtype, weights_dtype = choose.choice(dtypes), choose.choice(dtypes)
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


def check_against_the_oracle(
    rank: int, world_size: int, seeds: int = 60, device: str = "cpu"
) -> None:
    """Compare values and gradients."""
    name = group_name()
    for seed in range(seeds):
        inputs, ids, weights, num_experts, capacity = calls(world_size, seed, dtypes_of(device))
        sizes = (num_experts, world_size, capacity, name)
        leaves = [t.detach().to(device).requires_grad_() for t in (inputs[rank], weights[rank])]
        with checks.poisoned_memory():
            sent = moe_ops.ep_dispatch(leaves[0], ids[rank].to(device), leaves[1], *sizes)
        got = [t.detach().cpu() for t in sent]
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
        made_here = sent[0] * sent[2].sum(1, keepdim=True).to(sent[0].dtype)
        made_here = made_here.masked_fill(~mask.to(device), float("nan"))
        output = moe_ops.ep_combine(made_here, sent[1], sent[3], *sizes)
        made = [each[0] * each[2].sum(1, keepdim=True) for each in every]
        sums = oracle.expert_parallel.combine(made, [e[3] for e in every], num_experts, capacity)
        scale = torch.stack([each.nan_to_num().abs().sum() for each in made]).sum()
        dtype = checks.coarser(output.dtype, weights[rank].dtype)
        checks.assert_close(output.cpu(), sums[rank], dtype=dtype, scale=scale, what=what)

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
        tangent = tangents[rank].to(device, output.dtype)
        found = torch.autograd.grad(output, leaves, tangent)
        for one, two, leaf in zip(found, expected, leaves, strict=True):
            assert one.dtype == leaf.dtype
            size = torch.tensor(float(two.numel())).sqrt() * 8
            checks.assert_close(one.cpu(), two, dtype=dtype, scale=size, what=what)


def check_bits(rank: int, world_size: int, device: str = "cpu") -> None:
    """Check that the same call gives the same bits."""
    name = group_name()
    for seed in range(10):
        inputs, ids, weights, num_experts, capacity = calls(world_size, seed, dtypes_of(device))
        own = [each[rank].to(device) for each in (inputs, ids, weights)]
        sizes = (num_experts, world_size, capacity, name)
        found = []
        for _ in range(2):
            rows, local, *rest = moe_ops.ep_dispatch(*own, *sizes)
            rows = rows.masked_fill(~filled(local), 0)
            found.append([rows, local, *rest, moe_ops.ep_combine(rows, local, rest[1], *sizes)])
        for one, two in zip(*found, strict=True):
            assert torch.equal(one, two)

# SPDX-License-Identifier: Apache-2.0
"""These tests are routing_indices's own. test_every_op.py holds what every op must do."""

import contextlib
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from testing import oracle

moe = torch.ops.moe


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("routing", oracle.ROUTINGS)
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 300])
def test_every_routing(num_tokens, routing, dtype):
    num_experts = 5
    top_k = num_experts if routing == "every_expert" else 3
    generator = torch.Generator().manual_seed(num_tokens)
    ids = oracle.random_topk_ids(routing, num_tokens, num_experts, top_k, generator, dtype)
    outputs = moe.routing_indices(ids, num_experts)
    for got, want in zip(outputs, oracle.routing_indices(ids, num_experts), strict=True):
        assert got.dtype == torch.int32
        assert torch.equal(got, want)


def test_extreme_ids_are_dropped():
    ids = torch.tensor([[2**62, 1], [-(2**63), 0], [2**32, 2**32 + 1], [4, 3]])
    token_counts, gather_indices, scatter_indices = moe.routing_indices(ids, 4)
    assert token_counts.tolist() == [1, 1, 0, 1]
    assert gather_indices.tolist() == [3, 1, 7, 0, 2, 4, 5, 6]
    assert scatter_indices[gather_indices.long()].tolist() == list(range(8))
    narrow = torch.tensor([[2**31 - 1, 1], [-(2**31), 0]], dtype=torch.int32)
    assert moe.routing_indices(narrow, 4)[1].tolist() == [3, 1, 0, 2]


def test_many_experts_and_one():
    ids = torch.randint(0, 1000, (40, 3))
    assert torch.equal(
        moe.routing_indices(ids, 1000)[1], torch.argsort(ids.flatten(), stable=True).int()
    )
    token_counts, gather_indices, _ = moe.routing_indices(torch.zeros_like(ids), 1)
    assert token_counts.tolist() == [120]
    assert gather_indices.tolist() == list(range(120))


@pytest.mark.parametrize("num_experts", [2**31, 2**63 - 1])
def test_more_experts_than_int32_numbers(num_experts):
    """It is refused before anything of that size is made, with the same text everywhere."""
    expected = (
        "moe::routing_indices: expected num_experts <= 2147483647 (experts are numbered in int32), "
        f"got num_experts={num_experts}"
    )
    for device, mode in (
        ("cpu", contextlib.nullcontext()),
        ("cpu", FakeTensorMode()),
        ("meta", contextlib.nullcontext()),
    ):
        with mode, pytest.raises(ValueError, match=re.escape(expected)):
            moe.routing_indices(torch.zeros(3, 2, dtype=torch.int32, device=device), num_experts)

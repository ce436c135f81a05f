# SPDX-License-Identifier: Apache-2.0
"""These tests are permute's own. test_every_op.py holds what every op must do."""

import pytest
import torch

from moe_ops._core.library import SCHEMAS
from testing.strategies import PRESENT, seeded_sample

moe = torch.ops.moe


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
def test_copies_bits(dtype):
    sample = seeded_sample(SCHEMAS["permute"], 0, T=9, H=17, dtype=dtype)
    rows, gather, top_k = (sample.arguments[n] for n in ("input", "gather_indices", "top_k"))
    expected = torch.stack([rows[slot // top_k] for slot in gather.tolist()])
    assert torch.equal(sample(), expected)


def test_copies_what_is_not_a_number():
    rows = torch.tensor([[float("nan"), 1.0], [float("inf"), -0.0]])
    output = moe.permute(rows, torch.tensor([1, 0]), 1)
    assert output[1].isnan().tolist() == [True, False]
    assert output[0].tolist() == [float("inf"), 0.0]
    assert output[0, 1].signbit()


def test_backward_is_unpermute_without_weights():
    for scatter in (None, PRESENT):
        sample = seeded_sample(SCHEMAS["permute"], 0, T=5, top_k=3, scatter_indices=scatter)
        arguments = sample.requiring_grad()
        output = sample(**arguments)
        tangent = torch.randn_like(output)
        (grad,) = torch.autograd.grad(output, arguments["input"], tangent)
        gather, scatter_indices = arguments["gather_indices"], arguments["scatter_indices"]
        assert torch.equal(grad, moe.unpermute(tangent, gather, None, 3, scatter_indices))


def test_top_k_one_is_a_permutation_and_back():
    rows, gather = torch.randn(7, 3), torch.randperm(7)
    assert torch.equal(moe.unpermute(moe.permute(rows, gather, 1), gather), rows)

# SPDX-License-Identifier: Apache-2.0
"""The fast reference of the GPU tests is the oracle; needs no GPU."""

import pytest
import torch

from moe_ops._core.library import SCHEMAS
from testing import checks, oracle, reference, strategies
from testing.strategies import seeded_sample

NAMES = ("permute", "unpermute", "grouped_gemm", "grouped_gemm_fp8", "routing_indices")


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_oracle(name):
    for seed, variant in enumerate(strategies.variants(SCHEMAS[name])):
        for more in range(3):
            sample = seeded_sample(SCHEMAS[name], 3 * seed + more, dtype=torch.float64, **variant)
            want = checks.as_tuple(getattr(oracle, name)(**sample.arguments))
            got = checks.as_tuple(getattr(reference, name)(**sample.arguments))
            for one, two in zip(got, want, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12, msg=str(sample))


@pytest.mark.parametrize("name", NAMES[:4])
def test_gradients_equal_the_oracles(name):
    for seed, variant in enumerate(strategies.variants(SCHEMAS[name])):
        sample = seeded_sample(SCHEMAS[name], seed, dtype=torch.float64, **variant)
        grad_output = torch.randn(sample().shape, dtype=torch.float64)
        call = (sample.arguments, sample.differentiable(), grad_output)
        want = oracle.gradients(getattr(oracle, name), *call)
        got = oracle.gradients(getattr(reference, name), *call)
        for argument, gradient in want.items():
            torch.testing.assert_close(
                got[argument], gradient, rtol=1e-12, atol=1e-12, msg=f"{sample}: {argument}"
            )


@pytest.mark.parametrize("routing", reference.ROUTINGS)
def test_routings_are_what_they_say(routing):
    num_tokens, num_experts, top_k = 4000, 8, 2
    ids = reference.route(routing, num_tokens, num_experts, top_k, torch.device("cpu"))
    assert ids.shape == (num_tokens, top_k)
    counts, _, _ = reference.routing_indices(ids, num_experts)
    slots = num_tokens * top_k
    if routing == "uniform":
        assert ((counts - slots / 8).abs() < 0.1 * slots / 8).all()
    elif routing == "zipf":
        assert (counts.diff() < 0).all()
        assert counts[0] > 4 * counts[-1] > 0
    elif routing == "hot_and_empty":
        assert counts[0] == num_tokens
        assert counts[-1] == 0
    elif routing == "dropped":
        assert 0.7 * slots < counts.sum() < 0.9 * slots
    else:
        assert counts.sum() == 0
    if routing in {"uniform", "zipf", "hot_and_empty"}:
        assert (ids[:, 0] != ids[:, 1]).all()

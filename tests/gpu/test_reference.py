# SPDX-License-Identifier: Apache-2.0
"""The fast reference of the GPU tests equals the oracle. No GPU is needed."""

import functools

import pytest
import torch

from moe_ops._core.library import SCHEMAS
from testing import checks, oracle, reference, strategies
from testing.strategies import seeded_sample
from testing.tolerances import EXACT_SUM

assert_close = functools.partial(torch.testing.assert_close, rtol=EXACT_SUM, atol=EXACT_SUM)
DIFFERENTIABLE = ("permute", "unpermute", "grouped_gemm", "fused_experts")


@pytest.mark.parametrize("name", ["routing_indices", *DIFFERENTIABLE])
def test_equals_the_oracle(name):
    for seed, variant in enumerate(strategies.variants(SCHEMAS[name])):
        for more in range(8):
            sample = seeded_sample(SCHEMAS[name], 8 * seed + more, dtype=torch.float64, **variant)
            want = checks.as_tuple(getattr(oracle, name)(**sample.arguments))
            got = checks.as_tuple(getattr(reference, name)(**sample.arguments))
            for one, two in zip(got, want, strict=True):
                assert_close(one, two, msg=str(sample))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_equal_the_oracles(name):
    for seed, variant in enumerate(strategies.variants(SCHEMAS[name])):
        sample = seeded_sample(SCHEMAS[name], seed, dtype=torch.float64, **variant)
        grad_output = torch.randn(sample().shape, dtype=torch.float64)
        call = (sample.arguments, sample.differentiable(), grad_output)
        want = oracle.gradients(getattr(oracle, name), *call)
        got = oracle.gradients(getattr(reference, name), *call)
        for argument, gradient in want.items():
            assert_close(got[argument], gradient, msg=f"{sample}: {argument}")


def test_routing_weights_equal_the_oracles():
    """Values and gradients do, and so do the keys by which the oracle selects."""
    for seed, variant in enumerate(strategies.variants(SCHEMAS["topk_routing"])):
        sample = seeded_sample(SCHEMAS["topk_routing"], seed, dtype=torch.float64, **variant)
        arguments = sample.arguments
        how = {name: arguments[name] for name in ("score_function", "score_before_topk")}
        logits, bias = arguments["logits"], arguments["selection_bias"]
        keys = reference.selection_keys(logits, bias, **how)
        for token, row in zip(logits, keys, strict=True):
            want = torch.tensor(oracle.selection_keys(token, bias, **how), dtype=torch.float64)
            assert_close(row, want, msg=str(sample))
        _, topk_ids = oracle.topk_routing(**arguments)
        call = {"logits": logits, "topk_ids": topk_ids, **how}
        call |= {name: arguments[name] for name in ("renormalize", "scaling_factor")}
        tangent = torch.randn(topk_ids.shape, dtype=torch.float64)
        found, wanted = (
            (
                module.routing_weights(**call),
                *oracle.gradients(module.routing_weights, call, ["logits"], tangent).values(),
            )
            for module in (reference, oracle)
        )
        for got, want in zip(found, wanted, strict=True):
            assert_close(got, want, msg=str(sample))


@pytest.mark.parametrize("routing", ["uniform", "dropped", "all_dropped"])
def test_experts_step_equals_the_oracle(routing):
    """It does so expert by expert, with weights made of a frozen base and LoRA's adapters."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, weights, tangent = randn(9, 5), randn(9, 2), randn(9, 5)
    gate_up, down = randn(4, 6, 5), randn(4, 5, 3)
    factors = {"up_a": randn(4, 2, 5), "up_b": randn(4, 6, 2)}
    factors |= {"down_a": randn(4, 2, 3), "down_b": randn(4, 5, 2)}
    ids = oracle.random_topk_ids(routing, 9, 4, 2, generator)

    def function(hidden_states, topk_weights, up_a, up_b, down_a, down_b):
        up, down_proj = (
            torch.stack([w + 0.5 * b @ a for w, a, b in zip(base, lora_a, lora_b, strict=True)])
            for base, lora_a, lora_b in ((gate_up, up_a, up_b), (down, down_a, down_b))
        )
        return oracle.fused_experts(hidden_states, up, down_proj, ids, topk_weights)

    call = {"hidden_states": x, "topk_weights": weights, **factors}
    wanted = [function(**call), *oracle.gradients(function, call, list(call), tangent).values()]

    def projections(e, up_a, up_b, down_a, down_b):
        up = reference.merged(gate_up[e], [(up_a, up_b, 0.5)])
        return up, reference.merged(down[e], [(down_a, down_b, 0.5)])

    grads = [torch.full_like(factor, torch.nan) for factor in factors.values()]
    found = reference.experts_step(
        x, ids, weights, tangent, list(factors.values()), grads, projections
    )
    for got, want in zip((*found, *grads), wanted, strict=True):
        assert_close(got, want)


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

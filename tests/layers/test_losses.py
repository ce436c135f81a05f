# SPDX-License-Identifier: Apache-2.0
"""load_balancing_loss equals transformers' own and loops over tokens."""

import importlib.util

import pytest
import torch

from moe_ops.layers import load_balancing_loss
from testing import checks

NUM_EXPERTS, TOP_K, BATCH, LENGTH = 6, 2, 3, 7
NUM_TOKENS = BATCH * LENGTH
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="the transformers extra is not installed",
)
over_masks = pytest.mark.parametrize("mask", [None, "long", "bool"])


def make_logits(num_layers, dtype=torch.float32):
    """Return logits with a slope over the experts, so that their loads differ."""
    slope = torch.linspace(-1, 1, NUM_EXPERTS)
    return tuple(
        (torch.randn(NUM_TOKENS, NUM_EXPERTS) + slope).to(dtype).requires_grad_()
        for _ in range(num_layers)
    )


def make_mask(mask):
    if mask is None:
        return None
    lengths = torch.tensor([LENGTH, 3, 0])
    counted = torch.arange(LENGTH) < lengths[:, None]
    return counted if mask == "bool" else counted.long()


def loss_by_loops(layers, top_k, mask):
    """Compute the loss by its definition, one token at a time."""
    counted = [True] * NUM_TOKENS if mask is None else mask.flatten().bool().tolist()
    slots, probability, num_tokens = [0.0] * NUM_EXPERTS, 0.0, 0
    for logits in layers:
        for row, counts in zip(logits, counted, strict=True):
            if not counts:
                continue
            num_tokens += 1
            probability = probability + row.exp() / row.exp().sum()
            for expert in sorted(range(NUM_EXPERTS), key=lambda e: -row[e].item())[:top_k]:
                slots[expert] += 1
    used = torch.tensor(slots, dtype=torch.float64) / num_tokens
    return NUM_EXPERTS * (used * (probability / num_tokens)).sum()


def assert_same_with_gradient(loss, expected, layers):
    checks.assert_close(loss, expected)
    tangent = torch.randn(())
    found = torch.autograd.grad(loss, layers, tangent.to(loss.dtype))
    wanted = torch.autograd.grad(expected, layers, tangent.to(expected.dtype))
    for actual, want in zip(found, wanted, strict=True):
        assert want.norm() > 0
        checks.assert_close(actual, want)


@over_masks
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe"])
@needs_transformers
def test_equals_transformers(model, num_layers, mask):
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    layers, attention_mask = make_logits(num_layers), make_mask(mask)
    expected = module.load_balancing_loss_func(layers, NUM_EXPERTS, TOP_K, attention_mask)
    loss = load_balancing_loss(layers, NUM_EXPERTS, TOP_K, attention_mask)
    assert_same_with_gradient(loss, expected, layers)


@over_masks
@pytest.mark.parametrize("top_k", [1, TOP_K, NUM_EXPERTS - 1])
def test_matches_reference(top_k, mask):
    layers, attention_mask = make_logits(2, torch.float64), make_mask(mask)
    loss = load_balancing_loss(list(layers), NUM_EXPERTS, top_k, attention_mask)
    assert loss.dtype == torch.float64
    assert_same_with_gradient(loss, loss_by_loops(layers, top_k, attention_mask), layers)


@over_masks
def test_tensor_is_one_layer(mask):
    (logits,), attention_mask = make_logits(1), make_mask(mask)
    alone = load_balancing_loss(logits, NUM_EXPERTS, TOP_K, attention_mask)
    assert torch.equal(alone, load_balancing_loss((logits,), NUM_EXPERTS, TOP_K, attention_mask))


def test_bf16_logits_lose_nothing():
    """The loss is computed in fp32 from the logits as they are."""
    (logits,) = make_logits(1, torch.bfloat16)
    loss = load_balancing_loss(logits, NUM_EXPERTS, TOP_K)
    assert loss.dtype == torch.float32
    expected = load_balancing_loss(logits.double(), NUM_EXPERTS, TOP_K)
    checks.assert_close(loss, expected)


def test_even_and_collapsed_use():
    """It is top_k if all experts are equally likely, and num_experts if one gets everything."""
    even = torch.eye(NUM_EXPERTS).repeat(4, 1) * 1e-3
    torch.testing.assert_close(load_balancing_loss(even, NUM_EXPERTS, 1), torch.tensor(1.0))
    collapsed = torch.zeros(10, NUM_EXPERTS)
    collapsed[:, 3] = 100.0
    loss = load_balancing_loss(collapsed, NUM_EXPERTS, 1)
    torch.testing.assert_close(loss, torch.tensor(float(NUM_EXPERTS)))


@pytest.mark.parametrize("num_tokens", [0, 4])
def test_no_counted_tokens(num_tokens):
    logits = torch.randn(num_tokens, NUM_EXPERTS, requires_grad=True)
    loss = load_balancing_loss(logits, NUM_EXPERTS, TOP_K, torch.zeros(num_tokens))
    assert loss == 0
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient.any()


def test_compiles():
    layers, attention_mask = make_logits(2), make_mask("long")
    compiled = torch.compile(load_balancing_loss, fullgraph=True, backend="aot_eager")
    loss = compiled(layers, NUM_EXPERTS, TOP_K, attention_mask)
    expected = load_balancing_loss(layers, NUM_EXPERTS, TOP_K, attention_mask)
    assert_same_with_gradient(loss, expected, layers)


@pytest.mark.parametrize(
    ("logits", "mask", "message"),
    [
        ((), None, "expected router_logits of at least one layer, got none"),
        (None, None, "got none; .* output_router_logits=True"),
        (torch.zeros(4, 5), None, r"expected router_logits of shape .*\(6\)\), got \(4, 5\)"),
        ((torch.zeros(4, 6), None), None, "expected router_logits of shape .*, got None"),
        (torch.zeros(2, 2, 6), None, r"expected router_logits of shape .*, got \(2, 2, 6\)"),
        (torch.zeros(4, 6), torch.ones(2, 3), r"one element per token \(4\), got 6"),
    ],
)
def test_rejects(logits, mask, message):
    with pytest.raises(ValueError, match=message):
        load_balancing_loss(logits, NUM_EXPERTS, TOP_K, mask)


def test_rejects_too_many_choices():
    with pytest.raises(ValueError, match=r"moe::topk_routing: expected .*top_k"):
        load_balancing_loss(torch.zeros(4, 6), 6, 7)


def test_padding_is_not_read():
    logits = torch.randn(6, 4)
    mask = torch.tensor([1, 1, 1, 1, 0, 0])
    padded = logits.clone()
    padded[4:] = float("nan")
    padded.requires_grad_()
    loss = load_balancing_loss(padded, 4, 2, mask)
    torch.testing.assert_close(loss, load_balancing_loss(logits[:4], 4, 2))
    (gradient,) = torch.autograd.grad(loss, padded)
    assert gradient[:4].any()
    assert torch.equal(gradient[4:], torch.zeros(2, 4))

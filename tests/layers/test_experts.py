# SPDX-License-Identifier: Apache-2.0
"""Experts equals loops over tokens and experts, and GatedMLP equals its formula."""

import re
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from moe_ops.layers import Experts, GatedMLP
from testing import checks, oracle

NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_TOKENS, TOP_K = 5, 12, 8, 17, 2

VARIANTS: dict[str, dict[str, Any]] = {
    "silu": {},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "bias": {"bias": True},
    "interleaved": {"interleaved": True},
    "gpt_oss": {
        "activation": "swiglu_oai",
        "interleaved": True,
        "bias": True,
        "activation_limit": 0.4,
    },
    "llama4": {"weights_before": True},
    "ungated": {"gated": False, "activation": "relu_squared"},
    "ungated_bias": {"gated": False, "bias": True},
    "recomputed": {"recompute": "pre_activation", "bias": True},
}
over_variants = pytest.mark.parametrize("name", list(VARIANTS))


def make_experts(name, dtype=torch.float64):
    return Experts(NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE, **VARIANTS[name], dtype=dtype)


def make_inputs(dtype=torch.float64):
    hidden_states = torch.randn(NUM_TOKENS, HIDDEN_SIZE, dtype=dtype, requires_grad=True)
    topk_ids = torch.rand(NUM_TOKENS, NUM_EXPERTS).topk(TOP_K).indices
    topk_weights = torch.rand(NUM_TOKENS, TOP_K, dtype=dtype, requires_grad=True)
    return hidden_states, topk_ids, topk_weights


def expected_output(experts, hidden_states, topk_ids, topk_weights):
    up_name = "gate_up_proj" if experts.gated else "up_proj"
    return oracle.fused_experts(
        hidden_states,
        getattr(experts, up_name),
        experts.down_proj,
        topk_ids,
        topk_weights,
        getattr(experts, f"{up_name}_bias"),
        experts.down_proj_bias,
        activation=experts.activation,
        gated=experts.gated,
        interleaved=experts.interleaved,
        activation_limit=experts.activation_limit,
        weights_before=experts.weights_before,
    )


@over_variants
def test_matches_reference(name):
    """The output does, and the gradients of the input, the router weights and every parameter."""
    experts, inputs = make_experts(name), make_inputs()
    hidden_states, _, topk_weights = inputs
    expected, output = expected_output(experts, *inputs), experts(*inputs)
    checks.assert_close(output, expected)
    wanted = [hidden_states, topk_weights, *experts.parameters()]
    tangent = torch.randn_like(output)
    found = torch.autograd.grad(output, wanted, tangent)
    for actual, want in zip(found, torch.autograd.grad(expected, wanted, tangent), strict=True):
        assert want.norm() > 0
        checks.assert_close(actual, want)


@over_variants
def test_parameters(name):
    """Names and shapes are Hugging Face's. Each begins as that of an nn.Linear does."""
    options = VARIANTS[name]
    experts = Experts(4, 64, 48, **options)
    up_name, factor = ("gate_up_proj", 2) if options.get("gated", True) else ("up_proj", 1)
    shapes: dict[str, tuple[int, ...]] = {up_name: (4, factor * 48, 64), "down_proj": (4, 64, 48)}
    if options.get("bias"):
        shapes |= {f"{up_name}_bias": (4, factor * 48), "down_proj_bias": (4, 64)}
    assert {key: tuple(value.shape) for key, value in experts.named_parameters()} == shapes
    for key, parameter in experts.named_parameters():
        bound = (48 if key.startswith("down") else 64) ** -0.5
        assert 0.9 * bound < parameter.abs().max() <= bound, key
        assert parameter.mean().abs() < 0.2 * bound, key


def test_recompute_saves_no_activation():
    saved = {}
    for name in ("bias", "recomputed"):
        sizes: list[int] = []

        def note(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            make_experts(name)(*make_inputs())
        saved[name] = sizes
    pre_activation = NUM_TOKENS * TOP_K * 2 * INTERMEDIATE_SIZE
    assert pre_activation in saved["bias"]
    assert pre_activation not in saved["recomputed"]


def test_dropped_slots():
    """An id outside the experts adds nothing, as if its weight were zero."""
    experts, (hidden_states, topk_ids, topk_weights) = make_experts("bias"), make_inputs()
    is_dropped = torch.zeros_like(topk_ids, dtype=torch.bool)
    is_dropped[::3, 1] = True
    dropped = experts(hidden_states, topk_ids.masked_fill(is_dropped, -1), topk_weights)
    zeroed = experts(hidden_states, topk_ids, topk_weights.masked_fill(is_dropped, 0.0))
    checks.assert_close(dropped, zeroed)
    assert not torch.equal(dropped, experts(hidden_states, topk_ids, topk_weights))


def test_wrong_options_are_the_ops_errors():
    experts = Experts(NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE, activation="tanh")
    with pytest.raises(ValueError, match=r"moe::fused_experts.*: expected activation"):
        experts(*make_inputs(torch.float32))


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"num_experts": 0}, "num_experts >= 1, got 0"),
        ({"hidden_size": -1}, "hidden_size >= 0, got -1"),
        ({"intermediate_size": -1}, "intermediate_size >= 0, got -1"),
    ],
)
def test_impossible_sizes_are_refused_when_it_is_made(sizes, text):
    text = f"^{re.escape(f'moe_ops.layers.Experts: expected {text}')}$"
    with pytest.raises(ValueError, match=text):
        Experts(**{"num_experts": 4, "hidden_size": 8, "intermediate_size": 6, **sizes})


@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size", "num_tokens"), [(0, 6, 3), (8, 0, 3), (8, 6, 0)]
)
def test_sizes_of_zero(hidden_size, intermediate_size, num_tokens):
    experts = Experts(4, hidden_size, intermediate_size)
    ids, weights = torch.zeros(num_tokens, 2, dtype=torch.long), torch.ones(num_tokens, 2)
    output = experts(torch.ones(num_tokens, hidden_size), ids, weights)
    assert torch.equal(output, torch.zeros(num_tokens, hidden_size))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("silu", lambda x: x * torch.sigmoid(x)),
        ("gelu", lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("relu", lambda x: x.clamp(min=0)),
        ("relu_squared", lambda x: x.clamp(min=0) ** 2),
    ],
)
def test_gated_mlp(name, function):
    """It equals the formula, and one expert of Experts with the same weights."""
    mlp = GatedMLP(HIDDEN_SIZE, INTERMEDIATE_SIZE, name, dtype=torch.float64)
    hidden_states, *_ = make_inputs()
    gate, up = hidden_states @ mlp.gate_proj.weight.T, hidden_states @ mlp.up_proj.weight.T
    expected = (function(gate) * up) @ mlp.down_proj.weight.T
    checks.assert_close(mlp(hidden_states), expected)

    experts = Experts(1, HIDDEN_SIZE, INTERMEDIATE_SIZE, activation=name, dtype=torch.float64)
    gate_up_proj = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    weights = {"gate_up_proj": gate_up_proj[None], "down_proj": mlp.down_proj.weight[None]}
    experts.load_state_dict(weights)
    every_token = torch.zeros(NUM_TOKENS, 1, dtype=torch.long)
    ones = torch.ones(NUM_TOKENS, 1, dtype=torch.float64)
    checks.assert_close(experts(hidden_states, every_token, ones), expected)


def test_gated_mlp_rejects_an_unknown_activation():
    with pytest.raises(ValueError, match=r"GatedMLP: expected activation to be one of silu, .*'t'"):
        GatedMLP(4, 4, "t")


def test_gated_mlp_names_a_size_that_does_not_fit():
    with pytest.raises(ValueError, match=r"GatedMLP: expected hidden_size >= 0, got -1$"):
        GatedMLP(-1, 4)
    with pytest.raises(
        ValueError,
        match=r"GatedMLP: expected hidden_states.shape\[-1\] == hidden_size \(9\), got 8$",
    ):
        GatedMLP(9, 4)(torch.zeros(2, 8))

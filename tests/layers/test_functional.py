# SPDX-License-Identifier: Apache-2.0
"""Composed experts equal loops over tokens and experts. No user of them reads dropped slots."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import moe_ops
from moe_ops.layers import Experts
from moe_ops.layers.functional import composed_experts, projection
from moe_ops.layers.lora import LoraExperts, lora_experts
from testing import checks, dropped_slots, oracle
from testing.lora_problem import make_adapter, randn

NUM_EXPERTS, HIDDEN, INTER, NUM_TOKENS, TOP_K = 5, 12, 8, 17, 2


def softcapped(z):
    """Apply an activation that moe::fused_experts does not have."""
    gate, up = z.chunk(2, dim=-1)
    return F.silu(torch.tanh(gate)) * up


over_options = pytest.mark.parametrize(
    "options",
    [{}, {"norm": dropped_slots.offset_norm}, {"weights_before": True}],
    ids=["plain", "norm", "weights_before"],
)


def make_weights():
    """Return both projections and both biases."""
    shapes = [(2 * INTER, HIDDEN), (HIDDEN, INTER), (2 * INTER,), (HIDDEN,)]
    return [randn(NUM_EXPERTS, *shape).requires_grad_() for shape in shapes]


def make_layer(weights, **options):
    """Return composed_experts as a function of hidden states, ids and router weights."""
    gate_up, down, gate_up_bias, down_bias = (*weights, None, None)[:4]

    def layer(hidden_states, topk_ids, topk_weights):
        return composed_experts(
            hidden_states,
            topk_ids,
            topk_weights,
            NUM_EXPERTS,
            up=projection(gate_up, gate_up_bias),
            activation=softcapped,
            down=projection(down, down_bias),
            **options,
        )

    return layer


def expected_output(
    hidden_states, topk_ids, topk_weights, weights, norm=lambda rows: rows, weights_before=False
):
    gate_up, down, gate_up_bias, down_bias = weights
    output = torch.zeros_like(hidden_states)
    for token, slot in (topk_ids < NUM_EXPERTS).nonzero().tolist():
        expert, weight = topk_ids[token, slot], topk_weights[token, slot]
        x = hidden_states[token] * (weight if weights_before else 1.0)
        z = gate_up[expert] @ x + gate_up_bias[expert]
        y = norm(down[expert] @ softcapped(z) + down_bias[expert])
        output = output.index_add(
            0, torch.tensor([token]), (y * (1.0 if weights_before else weight))[None]
        )
    return output


@over_options
def test_matches_reference(options):
    """The output does, and the gradients of the input, the router weights and every parameter."""
    generator = torch.Generator().manual_seed(3)
    ids = oracle.random_topk_ids("uniform", NUM_TOKENS, NUM_EXPERTS, TOP_K, generator)
    ids[3, 0] = ids[7] = NUM_EXPERTS
    x, topk_weights = randn(NUM_TOKENS, HIDDEN), torch.rand(NUM_TOKENS, TOP_K, dtype=torch.float64)
    leaves = [x.requires_grad_(), topk_weights.requires_grad_(), *make_weights()]
    output = make_layer(leaves[2:], **options)(x, ids, topk_weights)
    expected = expected_output(x, ids, topk_weights, leaves[2:], **options)
    checks.assert_close(output, expected)
    tangent = torch.randn_like(output)
    found = torch.autograd.grad(output, leaves, tangent)
    for actual, want in zip(found, torch.autograd.grad(expected, leaves, tangent), strict=True):
        assert want.norm() > 0
        checks.assert_close(actual, want)


@over_options
def test_dropped_slots_are_not_read(options):
    # With weights_before and a bias a slot of weight zero adds something, a dropped slot does not.
    weights = make_weights()[: 2 if "weights_before" in options else 4]
    dropped_slots.assert_not_read(
        make_layer(weights, **options), randn(NUM_TOKENS, HIDDEN), NUM_EXPERTS, weights
    )


def layer_norm(rows):
    """Norm rows as LayerNorm does, without eps."""
    centred = rows - rows.mean(-1, keepdim=True)
    return dropped_slots.offset_norm(centred)


@pytest.mark.parametrize("norm", [dropped_slots.offset_norm, layer_norm])
def test_dropped_slots_add_nothing_to_the_gradient_of_a_norm(norm):
    """Its derivative is NaN at a zero row, which zero times does not end."""
    weights, gain = make_weights(), randn(HIDDEN).requires_grad_()
    layer = make_layer(weights, norm=lambda rows: gain * norm(rows))
    dropped_slots.assert_not_read(layer, randn(NUM_TOKENS, HIDDEN), NUM_EXPERTS, [*weights, gain])


def test_dropped_slots_are_not_read_by_lora_experts():
    weights, adapters = make_weights(), []
    for out_features, in_features in ((2 * INTER, HIDDEN), (HIDDEN, INTER)):
        adapters.append(make_adapter(NUM_EXPERTS, out_features, in_features, 3))

    def layer(hidden_states, topk_ids, topk_weights):
        gate_up, down, *biases = weights
        lora = [adapters[0]], [adapters[1]]
        return lora_experts(hidden_states, gate_up, down, topk_ids, topk_weights, *lora, *biases)

    trained = [*weights, *adapters[0][:2], *adapters[1][:2]]
    dropped_slots.assert_not_read(layer, randn(NUM_TOKENS, HIDDEN), NUM_EXPERTS, trained)


@pytest.mark.parametrize("weights_before", [False, True])
@pytest.mark.parametrize("quantises", [False, True])
def test_dropped_slots_are_not_read_by_experts(quantises, weights_before):
    """The fused layer does not read them, nor the composed one that it is once quantised."""
    experts = Experts(NUM_EXPERTS, HIDDEN, INTER, weights_before=weights_before)
    trained = list(experts.parameters())
    if quantises:
        experts.quantize_fp8_()
        trained = []
    hidden_states = randn(NUM_TOKENS, HIDDEN, dtype=torch.float32)
    dropped_slots.assert_not_read(experts, hidden_states, NUM_EXPERTS, trained)


@pytest.mark.parametrize("quantises", [False, True])
def test_dropped_slots_are_not_read_by_experts_with_adapters(quantises):
    experts = Experts(NUM_EXPERTS, HIDDEN, INTER)
    if quantises:
        experts.quantize_fp8_()
    layer = LoraExperts(experts, rank=3, dtype=torch.float32)
    for name in layer.adapters:
        nn.init.normal_(layer.get_parameter(f"adapters.{name}.lora_B"), std=0.5)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    hidden_states = randn(NUM_TOKENS, HIDDEN, dtype=torch.float32)
    dropped_slots.assert_not_read(layer, hidden_states, NUM_EXPERTS, trained)


@pytest.mark.parametrize("num_columns", [1, 3])
def test_rejects_router_weights_of_another_shape(num_columns):
    ids, weights = torch.zeros(4, 2).int(), torch.ones(4, num_columns)
    with pytest.raises(
        ValueError, match=r"composed_experts: expected topk_weights\.shape == .*\(4, 2\), got \(4, "
    ):
        make_layer(make_weights())(randn(4, HIDDEN), ids, weights)


def test_rejects_a_bias_beside_fp8():
    codes, scale = moe_ops.quantize_fp8(torch.ones(2, 3, 5))
    with pytest.raises(ValueError, match=r"projection: expected bias=None .*from_fp8_block$"):
        projection(codes, torch.ones(2, 3), scale)

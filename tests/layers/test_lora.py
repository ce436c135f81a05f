# SPDX-License-Identifier: Apache-2.0
"""LoRA's functions compute the right sums and gradients, and refuse what does not fit."""

import functools
from typing import Any, cast

import pytest
import torch

import moe_ops
from moe_ops.layers.experts import Experts
from moe_ops.layers.functional import named_activation
from moe_ops.layers.lora import LoraExperts, LoraWeights, lora_experts, lora_grouped_gemm
from testing import lora_problem, oracle
from testing.lora_problem import (
    HIDDEN,
    INTER,
    NUM_EXPERTS,
    NUM_TOKENS,
    TOP_K,
    draw_ids,
    randn,
)
from testing.recorders import MoeOps
from testing.reference import merged
from testing.tolerances import RELATIVE_NORM, relative_error

RANKS = (1, 3, 8, 64)


make_adapter = functools.partial(lora_problem.make_adapter, NUM_EXPERTS)


def assert_same_gradients(actual, expected, inputs, dtype=torch.float64):
    """Compare the gradients of two outputs for one random tangent. None of them may be zero."""
    tangent = randn(*expected.shape)
    assert relative_error(actual, expected) <= RELATIVE_NORM[dtype]
    found = torch.autograd.grad(actual, inputs, tangent.to(actual.dtype))
    wanted = torch.autograd.grad(expected, inputs, tangent)
    for number, (gradient, reference) in enumerate(zip(found, wanted, strict=True)):
        assert reference.norm() > 0, number
        assert relative_error(gradient, reference) <= RELATIVE_NORM[dtype], number


@pytest.mark.parametrize("mode", ["plain", "permute_x", "permute_y"])
@pytest.mark.parametrize("rank", RANKS)
def test_matches_merged_weight(mode, rank):
    """Row order, router weights and every gradient equal those of loops over the merged weight."""
    counts, gather, _ = oracle.routing_indices(draw_ids("dropped"), NUM_EXPERTS)
    num_rows = NUM_TOKENS if mode == "permute_x" else NUM_TOKENS * TOP_K
    x = randn(num_rows, HIDDEN).requires_grad_()
    weight = randn(NUM_EXPERTS, INTER, HIDDEN).requires_grad_()
    bias, weights = randn(NUM_EXPERTS, INTER), randn(NUM_TOKENS, TOP_K).requires_grad_()
    adapters = [make_adapter(INTER, HIDDEN, rank), make_adapter(INTER, HIDDEN, 2, scaling=0.5)]
    flags: dict[str, Any] = {} if mode == "plain" else {mode: True}
    actual = lora_grouped_gemm(x, weight, counts, adapters, gather, weights, bias, TOP_K, **flags)
    expected = oracle.grouped_gemm(
        x, merged(weight, adapters), counts, gather, weights, bias, TOP_K, **flags
    )
    factors = [factor for adapter in adapters for factor in adapter[:2]]
    assert_same_gradients(actual, expected, [x, weights, weight, *factors])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_of_another_dtype(dtype):
    """PEFT keeps adapters in fp32 beside a base in another dtype. Their gradients are fp32."""
    counts, _, _ = oracle.routing_indices(draw_ids(), NUM_EXPERTS)
    x = randn(NUM_TOKENS * TOP_K, HIDDEN, dtype=dtype)
    weight = randn(NUM_EXPERTS, INTER, HIDDEN, dtype=dtype)
    adapter = make_adapter(INTER, HIDDEN, 8, torch.float32)
    actual = lora_grouped_gemm(x, weight, counts, [adapter])
    assert actual.dtype == dtype
    expected = oracle.grouped_gemm(x, merged(weight, [adapter]), counts)
    assert_same_gradients(actual, expected, list(adapter[:2]), dtype)


def quantised(weight, dtype=torch.float64):
    """Return FP8 weights, their scales, and the product of both."""
    codes, scale = moe_ops.quantize_fp8(weight)
    return codes, scale, moe_ops.dequantize_fp8(codes, scale, dtype)


@pytest.mark.parametrize("mode", ["plain", "permute_x", "permute_y"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fp8_base_matches_merged_weight(mode, dtype):
    """Rows, router weights and every gradient do, at widths with several scales."""
    counts, gather, _ = oracle.routing_indices(draw_ids("dropped"), NUM_EXPERTS)
    num_rows = NUM_TOKENS if mode == "permute_x" else NUM_TOKENS * TOP_K
    x = randn(num_rows, 150, dtype=dtype).requires_grad_()
    codes, scale, weight = quantised(randn(NUM_EXPERTS, 140, 150, scale=0.1))
    assert len(scale.unique()) == 4 * NUM_EXPERTS
    weights = randn(NUM_TOKENS, TOP_K).requires_grad_()
    adapters = [make_adapter(140, 150, 3, torch.float32)]
    flags: dict[str, Any] = {} if mode == "plain" else {mode: True}
    actual = lora_grouped_gemm(
        x, codes, counts, adapters, gather, weights, top_k=TOP_K, weight_scale=scale, **flags
    )
    assert actual.dtype == dtype
    expected = oracle.grouped_gemm(
        x, merged(weight, adapters), counts, gather, weights, top_k=TOP_K, **flags
    )
    coarsest = dtype if dtype != torch.float64 else torch.float32
    assert_same_gradients(actual, expected, [x, weights, *adapters[0][:2]], coarsest)


ACTIVATIONS = [
    ("silu", {}),
    ("gelu", {"gated": False}),
    ("gelu_tanh", {"interleaved": True}),
    ("relu", {"activation_limit": 0.8}),
    ("relu_squared", {"gated": False, "activation_limit": 0.8}),
    ("swiglu_oai", {"interleaved": True, "activation_limit": 0.8}),
]


@pytest.mark.parametrize("targets", ["both", "gate_up_proj", "down_proj"])
@pytest.mark.parametrize(("activation", "flags"), ACTIVATIONS)
def test_experts_match_reference(activation, flags, targets):
    width = INTER * (2 if flags.get("gated", True) else 1)
    x = randn(NUM_TOKENS, HIDDEN).requires_grad_()
    gate_up, down = randn(NUM_EXPERTS, width, HIDDEN), randn(NUM_EXPERTS, HIDDEN, INTER)
    biases = randn(NUM_EXPERTS, width), randn(NUM_EXPERTS, HIDDEN)
    ids, weights = draw_ids("dropped"), randn(NUM_TOKENS, TOP_K).requires_grad_()
    up_lora = [make_adapter(width, HIDDEN, 3)] if targets != "down_proj" else []
    down_lora = [make_adapter(HIDDEN, INTER, 5)] if targets != "gate_up_proj" else []
    actual = lora_experts(
        x, gate_up, down, ids, weights, up_lora, down_lora, *biases, activation, **flags
    )
    expected = oracle.fused_experts(
        x, merged(gate_up, up_lora), merged(down, down_lora), ids, weights, *biases, activation,
        **flags,
    )  # fmt: skip
    factors = [factor for adapter in up_lora + down_lora for factor in adapter[:2]]
    assert_same_gradients(actual, expected, [x, weights, *factors])


def draw_experts(flags, ranks=(3, 5), biased=True):
    """Return the leading arguments of lora_experts, frozen projections and one adapter for each."""
    width = INTER * (2 if flags.get("gated", True) else 1)
    sizes = (width, HIDDEN), (HIDDEN, INTER)
    gate_up, down = (randn(NUM_EXPERTS, *size) for size in sizes)
    x, weights = randn(NUM_TOKENS, HIDDEN), randn(NUM_TOKENS, TOP_K)
    return {
        "hidden_states": x.requires_grad_(),
        "gate_up_proj": gate_up,
        "down_proj": down,
        "topk_ids": draw_ids("dropped"),
        "topk_weights": weights.requires_grad_(),
        "gate_up_lora": [make_adapter(*sizes[0], ranks[0])] if ranks[0] else [],
        "down_lora": [make_adapter(*sizes[1], ranks[1])] if ranks[1] else [],
        "gate_up_bias": randn(NUM_EXPERTS, width) if biased else None,
        "down_bias": randn(NUM_EXPERTS, HIDDEN) if biased else None,
    }


def leaves_of(arguments):
    factors = [f for lora in ("gate_up_lora", "down_lora") for a in arguments[lora] for f in a[:2]]
    return [arguments["hidden_states"], arguments["topk_weights"], *factors]


def run_as_one_op(arguments, **flags):
    with MoeOps() as ops:
        output = lora_experts(**arguments, **flags)
    assert len(ops.calls) == 1
    assert ops.names[0].removesuffix("_forward") == "fused_experts_lora"
    return output


def run_composed(arguments, **flags):
    with MoeOps() as ops:
        output = lora_experts(**arguments, **flags)
    assert ops.counts["grouped_gemm"] == 2 + 2 * sum(
        len(arguments[lora]) for lora in ("gate_up_lora", "down_lora")
    )
    assert not any(name.startswith("fused_experts") for name in ops.names)
    return output


def as_function(activation="silu", **flags):
    """Return a named activation as a function, with which lora_experts composes the layer."""
    limit = flags.pop("activation_limit", None)
    flags = {"gated": True, "interleaved": False, **flags}
    return named_activation("test", activation, **flags, limit=limit)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("ranks", [(3, 5), (16, 1), (4, 0), (0, 2)])
@pytest.mark.parametrize(("activation", "flags"), ACTIVATIONS)
def test_one_op_equals_the_composed_layer(activation, flags, ranks, biased):
    """Whatever the activation's options, with ranks that differ, and one of them missing."""
    arguments = draw_experts(flags, ranks, biased)
    actual = run_as_one_op(arguments, activation=activation, **flags)
    expected = run_composed(arguments, activation=as_function(activation, **flags))
    assert_same_gradients(actual, expected, leaves_of(arguments))


@pytest.mark.parametrize("trained", ["gate_up_proj", "down_proj", "gate_up_bias", "down_bias"])
def test_a_trained_base_is_composed(trained):
    arguments = draw_experts({})
    frozen = run_as_one_op(arguments)
    base = arguments[trained].requires_grad_()
    actual = run_composed(arguments)
    assert_same_gradients(actual, frozen, leaves_of(arguments))
    expected = reference_experts(arguments)
    assert_same_gradients(run_composed(arguments), expected, [base, *leaves_of(arguments)])


def reference_experts(arguments):
    rest = dict(arguments)
    for name in ("gate_up", "down"):
        rest[f"{name}_proj"] = merged(rest[f"{name}_proj"], rest.pop(f"{name}_lora"))
    return oracle.fused_experts(**rest)


@pytest.mark.parametrize("trained", ["gate_up_proj", "down_bias"])
def test_without_a_gradient_a_trained_base_is_one_op(trained):
    arguments = draw_experts({})
    arguments[trained].requires_grad_()
    with torch.no_grad():
        actual = run_as_one_op(arguments)
    assert not actual.requires_grad
    assert relative_error(actual, reference_experts(arguments)) <= RELATIVE_NORM[torch.float64]


@pytest.mark.parametrize("which", ["gate_up_lora", "down_lora"])
def test_two_adapters_are_composed(which):
    """They equal the one adapter that has both their ranks, which is one op."""
    arguments = draw_experts({})
    (first,) = arguments[which]
    second = make_adapter(first.lora_B.shape[1], first.lora_A.shape[2], 2, scaling=first.scaling)
    both = LoraWeights(
        torch.cat([first.lora_A, second.lora_A], 1),
        torch.cat([first.lora_B, second.lora_B], 2),
        first.scaling,
    )
    two = {**arguments, which: [first, second]}
    actual, expected = run_composed(two), run_as_one_op({**arguments, which: [both]})
    assert_same_gradients(actual, expected, leaves_of(two))


def test_a_scaling_that_is_a_tensor_has_its_gradient():
    arguments = draw_experts({})
    expected = run_as_one_op(arguments)
    (adapter,) = arguments["down_lora"]
    scaling = torch.tensor(float(adapter.scaling), dtype=torch.float64, requires_grad=True)
    scaled = {**arguments, "down_lora": [adapter._replace(scaling=scaling)]}
    assert_same_gradients(run_as_one_op(scaled), expected, leaves_of(arguments))
    composed = run_composed({**scaled, "activation": as_function()})
    assert_same_gradients(run_as_one_op(scaled), composed, [scaling])


def test_dropout_is_composed():
    """Of two passes with the same zeros, one has a named activation and one a function."""
    arguments = draw_experts({})
    named, called = (
        run_with_seed(arguments, activation=activation, dropout_p=0.4)
        for activation in ("silu", as_function())
    )
    assert_same_gradients(named, called, leaves_of(arguments))
    assert relative_error(named, run_as_one_op(arguments)) > 0.01


def run_with_seed(arguments, **flags):
    torch.manual_seed(7)
    return run_composed(arguments, **flags)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_op_with_adapters_of_another_dtype(dtype):
    """The gradients of fp32 adapters beside a base in another dtype are fp32."""
    arguments = draw_experts({})
    for lora in ("gate_up_lora", "down_lora"):
        (adapter,) = arguments[lora]
        a, b = (factor.detach().float().requires_grad_() for factor in adapter[:2])
        arguments[lora] = [LoraWeights(a, b, adapter.scaling)]
    for name in ("hidden_states", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
        needs = arguments[name].requires_grad
        arguments[name] = arguments[name].detach().to(dtype).requires_grad_(needs)
    actual = run_as_one_op(arguments)
    assert actual.dtype == dtype
    assert_same_gradients(actual, reference_experts(arguments), leaves_of(arguments), dtype)
    for factor in leaves_of(arguments)[2:]:
        assert factor.dtype == torch.float32


def test_every_activation_of_the_op_is_here():
    choices = moe_ops._core.library.SCHEMAS["fused_experts"].scalars
    (activation,) = [a for a in choices if a.name == "activation"]
    assert {name for name, _ in ACTIVATIONS} == set(activation.choices)


def test_dropout():
    """It acts on the adapters' input alone, and gives all slots of a token the same zeros."""
    counts, gather, _ = oracle.routing_indices(draw_ids(), NUM_EXPERTS)
    x, weight = randn(NUM_TOKENS, HIDDEN), randn(NUM_EXPERTS, INTER, HIDDEN)
    adapter = make_adapter(INTER, HIDDEN, 3)
    flags: dict[str, Any] = {"top_k": TOP_K, "permute_x": True}
    torch.manual_seed(7)
    actual = lora_grouped_gemm(x, weight, counts, [adapter], gather, **flags, dropout_p=0.4)
    torch.manual_seed(7)
    dropped = torch.nn.functional.dropout(x, 0.4)
    assert 0 < (dropped == 0).sum() < dropped.numel()
    expected = oracle.grouped_gemm(x, weight, counts, gather, **flags) + oracle.grouped_gemm(
        dropped, merged(0 * weight, [adapter]), counts, gather, **flags
    )
    assert relative_error(actual, expected) <= RELATIVE_NORM[torch.float64]


GEMM = (torch.ones(4, 5), torch.ones(2, 3, 5), torch.tensor([2, 2]))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            LoraWeights(torch.ones(2, 4, 6), torch.ones(2, 3, 4), 1.0),
            r"lora_A\.shape == \(num_experts, rank, in_features\) \(2, rank, 5\), got \(2, 4, 6\)",
        ),
        (LoraWeights(torch.ones(2, 0, 5), torch.ones(2, 3, 0), 1.0), r"got \(2, 0, 5\)"),
        (LoraWeights(torch.ones(8, 5), torch.ones(3, 8), 1.0), r"got \(8, 5\)"),
        (
            LoraWeights(torch.ones(2, 4, 5), torch.ones(2, 4, 3), 1.0),
            r"lora_B\.shape == .* \(2, 3, 4\), got \(2, 4, 3\)",
        ),
    ],
)
def test_rejects_adapters_that_do_not_fit(adapter, message):
    with pytest.raises(
        ValueError, match=r"^moe_ops\.layers\.lora\.lora_grouped_gemm: .*" + message
    ):
        lora_grouped_gemm(*GEMM, [adapter])


def test_rejects_quantised_weights_without_scales():
    x, weight, counts = GEMM
    with pytest.raises(TypeError, match="from_fp8_block takes it, with its scales"):
        lora_grouped_gemm(x, weight.to(torch.float8_e4m3fn), counts, [])
    arguments = draw_experts({})
    for name in ("gate_up_proj", "down_proj"):
        coded = {**arguments, name: arguments[name].to(torch.float8_e4m3fn)}
        with pytest.raises(TypeError, match=rf"{name}.*from_fp8_block takes it, with its scales"):
            lora_experts(**coded)


def test_rejects_scales_with_a_bias_or_another_weight():
    x, weight, counts = GEMM
    quantised, scale = moe_ops.quantize_fp8(weight)
    with pytest.raises(
        ValueError, match=r"projection: expected bias=None with weight_scale, .*from_fp8_block$"
    ):
        lora_grouped_gemm(x, quantised, counts, [], bias=torch.ones(2, 3), weight_scale=scale)
    with pytest.raises(TypeError, match=r"projection: expected weight\.dtype .* got int8;"):
        lora_grouped_gemm(x, weight.to(torch.int8), counts, [], weight_scale=scale)


def experts(**flags):
    return Experts(NUM_EXPERTS, HIDDEN, INTER, **flags)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LoraExperts(experts(), 0), "LoraExperts: expected rank >= 1, got 0"),
        (lambda: LoraExperts(experts(), 2, targets=[]), "LoraExperts: expected targets among"),
        (
            lambda: LoraExperts(experts(), 2, targets=["gate"]),
            "LoraExperts: expected targets among",
        ),
        (lambda: LoraExperts(experts(), 2, lora_dropout=1.0), "expected 0 <= lora_dropout < 1"),
        (lambda: lora_grouped_gemm(*GEMM, [], dropout_p=-0.1), "expected 0 <= dropout_p < 1"),
        (lambda: run_activation("swish"), "lora_experts: expected activation to be one of silu"),
        (lambda: run_activation("swiglu_oai", gated=False), "expected gated=True with swiglu_oai"),
        (lambda: run_activation("silu", activation_limit=0.0), "activation_limit > 0, got 0.0"),
    ],
)
def test_rejects_bad_options(call, message):
    with pytest.raises(ValueError, match=r"^moe_ops\.layers\.lora\..*" + message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: LoraExperts(experts(), cast(Any, 2.5)),
            "LoraExperts: expected rank to be an int, got 2.5",
        ),
        (
            lambda: lora_grouped_gemm(*GEMM, cast(Any, LoraWeights(GEMM[1], GEMM[1], 1.0))),
            r"expected adapters to be a sequence of LoraWeights, got Tensor in it; pass \[adapter\]",
        ),
    ],
)
def test_rejects_what_has_another_type(call, message):
    with pytest.raises(TypeError, match=r"^moe_ops\.layers\.lora\..*" + message):
        call()


def run_activation(activation, **flags):
    return lora_experts(
        torch.ones(1, 4), torch.ones(1, 6, 4), torch.ones(1, 4, 3), torch.zeros(1, 1).int(),
        torch.ones(1, 1), activation=activation, **flags,
    )  # fmt: skip


def test_nan_weight_of_a_dropped_slot_is_not_read():
    ids = torch.tensor([[0, -1], [1, 3]])
    weights = torch.tensor([[0.5, float("nan")], [0.2, 0.3]])
    arguments = torch.randn(2, 8), torch.randn(4, 12, 8), torch.randn(4, 8, 6), ids
    expected = moe_ops.fused_experts(*arguments, weights)
    torch.testing.assert_close(lora_experts(*arguments, weights), expected)

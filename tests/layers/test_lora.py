# SPDX-License-Identifier: Apache-2.0
"""LoRA on experts: the sums, the gradients, and what a step with a frozen base does not do."""

import functools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import moe_ops
from moe_ops.layers import MoE, Router
from moe_ops.layers.experts import Experts
from moe_ops.layers.lora import (
    GroupedLora,
    LoraExperts,
    LoraWeights,
    lora_experts,
    lora_grouped_gemm,
)
from testing import lora_problem, oracle
from testing.lora_problem import merged, randn
from testing.tolerances import RELATIVE_NORM, relative_error

NUM_TOKENS, TOP_K, NUM_EXPERTS, HIDDEN, INTER = 12, 2, 4, 10, 6
RANKS = (1, 3, 8, 64)


make_adapter = functools.partial(lora_problem.make_adapter, NUM_EXPERTS)


def draw_ids(routing="uniform", num_tokens=NUM_TOKENS):
    generator = torch.Generator().manual_seed(3)
    return oracle.random_topk_ids(routing, num_tokens, NUM_EXPERTS, TOP_K, generator)


def assert_same_gradients(actual, expected, inputs, dtype=torch.float64):
    """Of two outputs, for one random tangent; every gradient is one that could be wrong."""
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
    """Row order, router weights and every gradient, against loops over the merged weight."""
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
    """As PEFT keeps them: fp32 adapters beside the base's dtype, with fp32 gradients."""
    counts, _, _ = oracle.routing_indices(draw_ids(), NUM_EXPERTS)
    x = randn(NUM_TOKENS * TOP_K, HIDDEN, dtype=dtype)
    weight = randn(NUM_EXPERTS, INTER, HIDDEN, dtype=dtype)
    adapter = make_adapter(INTER, HIDDEN, 8, torch.float32)
    actual = lora_grouped_gemm(x, weight, counts, [adapter])
    assert actual.dtype == dtype
    expected = oracle.grouped_gemm(x, merged(weight, [adapter]), counts)
    assert_same_gradients(actual, expected, list(adapter[:2]), dtype)


def quantised(weight, dtype=torch.float64):
    """FP8 weights, their scales, and what they are worth."""
    codes, scale = moe_ops.quantize_fp8(weight)
    return codes, scale, moe_ops.dequantize_fp8(codes, scale, dtype)


@pytest.mark.parametrize("mode", ["plain", "permute_x", "permute_y"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fp8_base_matches_merged_weight(mode, dtype):
    """Of widths with several scales: rows, router weights and every gradient."""
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


def test_every_activation_of_the_op_is_here():
    choices = moe_ops._core.library.SCHEMAS["fused_experts"].scalars
    (activation,) = [a for a in choices if a.name == "activation"]
    assert {name for name, _ in ACTIVATIONS} == set(activation.choices)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(num_tokens):
    module, x, ids, weights = make_layer(num_tokens)
    output = module(x, ids, weights)
    output.sum().backward()
    expected = module.merge()(x, ids, weights)
    assert output.shape == (num_tokens, HIDDEN)
    assert relative_error(output, expected) <= RELATIVE_NORM[torch.float64]
    for adapter in module.adapters.values():
        assert bool(adapter.lora_A.grad.norm() > 0) == (num_tokens > 0)


def make_layer(num_tokens=NUM_TOKENS, rank=3, dtype=torch.float64, sizes=(HIDDEN, INTER), **flags):
    """A module whose adapters are not zero, and a batch for it."""
    module = LoraExperts(Experts(NUM_EXPERTS, *sizes, dtype=dtype), rank, **flags)
    randomise(module)
    x = randn(num_tokens, sizes[0], dtype=dtype).requires_grad_()
    weights = torch.rand(num_tokens, TOP_K, dtype=dtype)
    return module, x, draw_ids(num_tokens=num_tokens), weights


def randomise(module):
    for name in module.adapters:
        torch.nn.init.normal_(module.get_parameter(f"adapters.{name}.lora_B"), std=0.5)


class Calls(TorchDispatchMode):
    """Every op that runs, with the tensors that it returns; tensors alone, in order."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, (tuple, list)) else [out]
        name = func._schema.name
        self.made += [(name, tuple(t.shape)) for t in tensors if isinstance(t, torch.Tensor)]
        return out

    def shapes_of(self, op):
        return sorted(shape for name, shape in self.made if name == op and shape != (0,))


def test_frozen_base_costs_no_gradient():
    """The backward has dW of the adapters alone, and no op makes anything of a weight's size."""
    sizes, rank = (40, 48), 3  # the weights are larger than all rows together
    module, x, ids, weights = make_layer(sizes=sizes, rank=rank)
    with Calls() as calls:
        module(x, ids, weights).sum().backward()
    hidden, inter = sizes
    assert calls.shapes_of("moe::grouped_gemm_dw") == sorted(
        [
            (NUM_EXPERTS, rank, hidden),
            (NUM_EXPERTS, 2 * inter, rank),
            (NUM_EXPERTS, rank, inter),
            (NUM_EXPERTS, hidden, rank),
        ]
    )
    smallest = module.experts.down_proj.numel()
    largest = max(torch.Size(shape).numel() for _, shape in calls.made)
    assert largest < smallest, "a merged weight, or a gradient of one"
    trained = {name for name, p in module.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in module.named_parameters() if "adapters" in name}
    assert len(trained) == 4
    for name in trained:
        assert module.get_parameter(name).grad.norm() > 0, name


@pytest.mark.parametrize("gated", [False, True])
def test_quantised_experts(gated):
    """The module on FP8 weights is the one on what these are worth, and its base gets no gradient."""
    experts = Experts(NUM_EXPERTS, 150, 130, gated=gated)
    worth = Experts(NUM_EXPERTS, 150, 130, gated=gated)
    assert experts.quantize_fp8_() is experts
    for name, parameter in worth.named_parameters():
        scale = experts.scale(name)
        assert scale is not None
        parameter.data = moe_ops.dequantize_fp8(getattr(experts, name), scale, torch.float32)
    on_fp8 = LoraExperts(experts, rank=3, dtype=torch.float32)
    on_fp32 = LoraExperts(worth, rank=3)
    randomise(on_fp8)
    on_fp32.adapters.load_state_dict(on_fp8.adapters.state_dict())
    x = randn(NUM_TOKENS, 150, dtype=torch.float32).requires_grad_()
    weights = torch.rand(NUM_TOKENS, TOP_K)
    results = [
        gradients_of(lambda h, m=module: m(h, draw_ids(), weights), module, x)
        for module in (on_fp8, on_fp32)
    ]
    assert len(results[0]) == 2 + 4
    for got, want in zip(*results, strict=True):
        assert want.norm() > 0
        assert relative_error(got, want) <= RELATIVE_NORM[torch.float32]
    assert all(p.grad is None and not p.requires_grad for p in experts.parameters())

    output = on_fp8(x, draw_ids(), weights)
    layer = on_fp8.merge()
    assert layer is experts
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert relative_error(layer(x, draw_ids(), weights), output) <= RELATIVE_NORM[torch.float32]


def test_quantised_experts_make_nothing_of_a_weights_size():
    module, x, ids, weights = make_layer(dtype=torch.float32, sizes=(40, 48))
    module = LoraExperts(module.experts.quantize_fp8_(), rank=3, dtype=torch.float32)
    with Calls() as calls:
        module(x, ids, weights).sum().backward()
    assert calls.shapes_of("moe::grouped_gemm_dw") == sorted(
        [(4, 3, 40), (4, 96, 3), (4, 3, 48), (4, 40, 3)]
    )
    num_rows = NUM_TOKENS * TOP_K
    assert calls.shapes_of("moe::grouped_gemm_fp8_dx") == sorted([(NUM_TOKENS, 40), (num_rows, 48)])
    assert max(torch.Size(shape).numel() for _, shape in calls.made) < 4 * 40 * 48


def test_quantised_experts_in_a_state_dict():
    experts = Experts(NUM_EXPERTS, 150, 130).quantize_fp8_()
    state = experts.state_dict()
    assert {name: value.dtype for name, value in state.items()} == {
        "gate_up_proj": torch.float8_e4m3fn,
        "gate_up_proj_scale": torch.float32,
        "down_proj": torch.float8_e4m3fn,
        "down_proj_scale": torch.float32,
    }
    other = Experts(NUM_EXPERTS, 150, 130).quantize_fp8_()
    other.load_state_dict(state)
    for name, value in state.items():
        assert torch.equal(other.state_dict()[name].float(), value.float())
    assert set(Experts(2, 4, 4).state_dict()) == {"gate_up_proj", "down_proj"}


def test_adapters_of_quantised_experts_are_bf16_unless_told():
    experts = Experts(NUM_EXPERTS, 8, 6).quantize_fp8_()
    assert LoraExperts(experts, 2).adapters["down_proj"].lora_A.dtype == torch.bfloat16
    assert LoraExperts(Experts(4, 8, 6), 2).adapters["down_proj"].lora_A.dtype == torch.float32


def test_quantised_experts_alone_are_refused_with_what_to_do():
    experts = Experts(NUM_EXPERTS, 8, 6).quantize_fp8_()
    for rows in (torch.randn(3, 8), torch.randn(3, 8, requires_grad=True)):
        with pytest.raises(
            ValueError, match=r"forward: .*moe_ops\.layers\.lora\.LoraExperts computes"
        ):
            experts(rows, torch.zeros(3, 1).int(), torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"reset_parameters: .* not quantised, got FP8 ones"):
        experts.reset_parameters()
    with pytest.raises(ValueError, match="are not quantised yet, got gate_up_proj_scale"):
        experts.quantize_fp8_()
    biased = Experts(NUM_EXPERTS, 8, 6, bias=True)
    with pytest.raises(ValueError, match="got gate_up_proj_bias"):
        biased.quantize_fp8_()
    assert biased.gate_up_proj.dtype == torch.float32


def test_quantised_experts_keep_their_codes_where_a_model_is_converted():
    experts = Experts(NUM_EXPERTS, 8, 6).quantize_fp8_()
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), experts)
    for convert in (model.bfloat16, model.double, lambda: model.to(torch.float16), model.cpu):
        convert()
        assert model[0].weight.dtype != torch.float32
        for name, tensor in experts.state_dict().items():
            assert tensor.dtype == before[name].dtype, name
            assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
    assert all(tensor.is_meta for tensor in experts.to("meta").state_dict().values())
    assert Experts(NUM_EXPERTS, 8, 6).bfloat16().down_proj.dtype == torch.bfloat16


@pytest.mark.parametrize("strict", [True, False])
def test_states_of_codes_and_of_weights_are_not_mistaken_for_each_other(strict):
    plain, quantised = (Experts(NUM_EXPERTS, 8, 6) for _ in range(2))
    quantised.quantize_fp8_()
    with pytest.raises(RuntimeError, match="expected no FP8 weights in gate_up_proj, got FP8 ones"):
        plain.load_state_dict(quantised.state_dict(), strict=strict)
    with pytest.raises(RuntimeError, match="expected FP8 weights in down_proj, got other ones"):
        quantised.load_state_dict(Experts(NUM_EXPERTS, 8, 6).state_dict(), strict=strict)
    again = Experts(NUM_EXPERTS, 8, 6).quantize_fp8_()
    again.load_state_dict(quantised.state_dict(), strict=strict)
    for name, tensor in quantised.state_dict().items():
        assert torch.equal(again.state_dict()[name].float(), tensor.float()), name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_merged_into_the_dtype_that_is_asked_for(dtype):
    layer = LoraExperts(Experts(NUM_EXPERTS, 8, 6).quantize_fp8_(), 2, dtype=torch.float32)
    merged = layer.merge(dtype)
    expected = dtype or torch.float32
    assert {parameter.dtype for parameter in merged.parameters()} == {expected}
    rows = torch.randn(3, 8, dtype=expected)
    assert merged(rows, torch.zeros(3, 1).int(), torch.ones(3, 1)).dtype == expected


def test_a_dtype_that_is_refused_merges_nothing():
    layer = LoraExperts(Experts(NUM_EXPERTS, 8, 6).quantize_fp8_(), 2)
    with pytest.raises(TypeError, match=r"expected dtype in .*, got int8"):
        layer.merge(torch.int8)
    assert layer.merge(torch.float32).down_proj.dtype == torch.float32


def test_is_of_no_use_once_merged():
    layer = LoraExperts(Experts(NUM_EXPERTS, 8, 6), 2)
    layer.merge()
    with pytest.raises(ValueError, match=r"forward: expected adapters that are not merged"):
        layer(torch.randn(3, 8), torch.zeros(3, 1).int(), torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"merge: expected adapters that are not merged"):
        layer.merge()


def test_stands_in_a_layer_that_is_made_of_parts():
    layer = MoE(Router(8, NUM_EXPERTS, 2), LoraExperts(Experts(NUM_EXPERTS, 8, 6), 2))
    output, _ = layer(torch.randn(5, 8))
    assert output.shape == (5, 8)
    with pytest.raises(
        TypeError, match=r"expected experts to be a moe_ops\.layers\.Experts, got a Lora"
    ):
        LoraExperts(layer.experts, 2)


def test_input_gradient_only_where_needed():
    """The first layer of a frozen model: no dX of the up projection."""
    module, x, ids, weights = make_layer(targets=["gate_up_proj"])
    with Calls() as calls:
        module(x.detach(), ids, weights).sum().backward()
    num_rows = NUM_TOKENS * TOP_K
    assert calls.shapes_of("moe::grouped_gemm_dx") == sorted([(num_rows, 3), (num_rows, INTER)])


def test_module_starts_at_the_base_and_merges():
    experts = Experts(NUM_EXPERTS, HIDDEN, INTER, dtype=torch.float64)
    _, x, ids, weights = make_layer()
    expected = experts(x, ids, weights)
    module = LoraExperts(experts, rank=3, lora_alpha=6)
    assert relative_error(module(x, ids, weights), expected) <= RELATIVE_NORM[torch.float64]

    randomise(module)
    output = module(x, ids, weights)
    assert relative_error(output, expected) > 0.1
    merged_experts = module.merge()
    assert merged_experts is experts
    assert relative_error(experts(x, ids, weights), output) <= RELATIVE_NORM[torch.float64]


def test_scaling():
    assert GroupedLora(2, 3, 4, rank=8, lora_alpha=16).scaling == 2
    assert GroupedLora(2, 3, 4, rank=16, lora_alpha=16, use_rslora=True).scaling == 4


def test_initial_values_are_those_of_linear():
    adapter = GroupedLora(3, 400, 5, rank=50)
    assert adapter.lora_A.abs().max() <= 400**-0.5
    assert float(adapter.lora_A.detach().std()) == pytest.approx((3 * 400) ** -0.5, rel=0.05)
    assert not adapter.lora_B.any()


def test_dropout():
    """On the adapters' input alone, scaled, with the same zeros for every slot of a token."""
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


@pytest.mark.parametrize("target", ["gate_up_proj", "down_proj"])
def test_dropout_is_for_training(target):
    module, x, ids, weights = make_layer(lora_dropout=0.4, targets=[target])
    trained, evaluated = module(x, ids, weights), module.eval()(x, ids, weights)
    assert relative_error(trained, evaluated) > 0.01
    assert torch.equal(module(x, ids, weights), evaluated)


def gradients_of(function, module, x):
    output = function(x)
    tangent = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad(output, [x, *trainable(module)], tangent)]


def trainable(module):
    return [p for p in module.parameters() if p.requires_grad]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_checkpoint(use_reentrant, compiled):
    """Recomputed in the backward: the same bits."""
    module, x, ids, weights = make_layer()

    def layer(hidden):
        return checkpoint(module, hidden, ids, weights, use_reentrant=use_reentrant)

    expected = gradients_of(lambda hidden: module(hidden, ids, weights), module, x)
    if compiled:
        layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for actual, reference in zip(gradients_of_leaves(layer, module, x), expected, strict=True):
        assert torch.equal(actual, reference)


def gradients_of_leaves(function, module, x):
    """As gradients_of, through .backward(), which a reentrant checkpoint insists on."""
    module.zero_grad()
    x.grad = None
    output = function(x)
    output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output))
    return [output, x.grad, *(p.grad for p in trainable(module))]


def test_compile():
    """Five token counts, two graphs, and eager's numbers."""
    module, *_ = make_layer()
    torch._dynamo.utils.counters.clear()
    layer = torch.compile(module, fullgraph=True, backend="aot_eager")
    for num_tokens in (2, 3, 12, 7, 5):
        _, x, ids, weights = make_layer(num_tokens)
        expected = gradients_of(lambda h, i=ids, w=weights: module(h, i, w), module, x)
        actual = gradients_of(lambda h, i=ids, w=weights: layer(h, i, w), module, x)
        for one, other in zip(actual, expected, strict=True):
            assert other.norm() > 0
            assert relative_error(one, other) <= RELATIVE_NORM[torch.float64]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


GEMM = (torch.ones(4, 5), torch.ones(2, 3, 5), torch.tensor([2, 2]))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            LoraWeights(torch.ones(2, 4, 6), torch.ones(2, 3, 4), 1.0),
            r"lora_A of shape \(num_experts, rank, in_features\) = \(2, rank, 5\), got \(2, 4, 6\)",
        ),
        (LoraWeights(torch.ones(2, 0, 5), torch.ones(2, 3, 0), 1.0), r"got \(2, 0, 5\)"),
        (LoraWeights(torch.ones(8, 5), torch.ones(3, 8), 1.0), r"got \(8, 5\)"),
        (
            LoraWeights(torch.ones(2, 4, 5), torch.ones(2, 4, 3), 1.0),
            r"lora_B of shape .* = \(2, 3, 4\), got \(2, 4, 3\)",
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
    with pytest.raises(TypeError, match="grouped_gemm_fp8 takes it, with its scales"):
        lora_grouped_gemm(x, weight.to(torch.float8_e4m3fn), counts, [])


def test_rejects_scales_with_a_bias_or_another_weight():
    x, weight, counts = GEMM
    quantised, scale = moe_ops.quantize_fp8(weight)
    with pytest.raises(
        ValueError, match=r"lora_grouped_gemm: expected bias=None with weight_scale"
    ):
        lora_grouped_gemm(x, quantised, counts, [], bias=torch.ones(2, 3), weight_scale=scale)
    with pytest.raises(TypeError, match=r"grouped_gemm_fp8: expected weight\.dtype .* got int8;"):
        lora_grouped_gemm(x, weight.to(torch.int8), counts, [], weight_scale=scale)


def experts(**flags):
    return Experts(NUM_EXPERTS, HIDDEN, INTER, **flags)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LoraExperts(experts(), 0), "LoraExperts: expected rank >= 1, got 0"),
        (lambda: LoraExperts(experts(), 2, targets=[]), "LoraExperts: expected targets of"),
        (lambda: LoraExperts(experts(), 2, targets=["gate"]), "LoraExperts: expected targets of"),
        (lambda: LoraExperts(experts(), 2, lora_dropout=1.0), "expected 0 <= lora_dropout < 1"),
        (lambda: lora_grouped_gemm(*GEMM, [], dropout_p=-0.1), "expected 0 <= dropout_p < 1"),
        (lambda: run_activation("swish"), "lora_experts: expected activation to be one of silu"),
        (lambda: run_activation("swiglu_oai", gated=False), "expected gated with swiglu_oai"),
        (lambda: run_activation("silu", activation_limit=0.0), "activation_limit > 0, got 0.0"),
    ],
)
def test_rejects_bad_options(call, message):
    with pytest.raises(ValueError, match=r"^moe_ops\.layers\.lora\..*" + message):
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


@pytest.mark.parametrize(
    ("option", "value"),
    [("weights_before", True), ("recompute", "pre_activation"), ("kernel_config", "{}")],
)
def test_rejects_options_of_the_experts_that_it_has_not_got(option, value):
    expected = rf"expected experts with {option}="
    experts = Experts(4, 8, 6, **{option: value})
    with pytest.raises(ValueError, match=expected):
        LoraExperts(experts, 2)
    assert all(parameter.requires_grad for parameter in experts.parameters())
    layer = LoraExperts(Experts(4, 8, 6), 2)
    setattr(layer.experts, option, value)
    with pytest.raises(ValueError, match=expected):
        layer(torch.randn(3, 8), torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1))


def test_a_refused_rank_leaves_the_experts_as_they_were():
    experts = Experts(4, 8, 6)
    with pytest.raises(ValueError, match="rank >= 1, got 0"):
        LoraExperts(experts, 0)
    assert all(parameter.requires_grad for parameter in experts.parameters())

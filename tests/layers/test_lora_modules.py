# SPDX-License-Identifier: Apache-2.0
"""LoRA's modules do no work for a frozen base. They merge, compile and work in checkpoints."""

from collections import Counter
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import moe_ops
from moe_ops.layers import MoE, Router
from moe_ops.layers.experts import Experts
from moe_ops.layers.lora import GroupedLora, LoraExperts
from moe_ops.ops.fused_experts_lora import pytorch
from testing.lora_problem import (
    HIDDEN,
    INTER,
    NUM_EXPERTS,
    NUM_TOKENS,
    TOP_K,
    draw_ids,
    make_layer,
    randn,
    randomise,
)
from testing.recorders import MoeOps, ReturnedShapes
from testing.tolerances import RELATIVE_NORM, relative_error


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


def test_frozen_base_costs_no_gradient():
    """The backward computes gradients of the input and the adapters only, of no weight's size."""
    sizes, rank = (40, 48), 3  # The weights are larger than all rows together.
    module, x, ids, weights = make_layer(sizes=sizes, rank=rank)
    with ReturnedShapes() as calls:
        module(x, ids, weights).sum().backward()
    hidden, inter = sizes
    assert calls.shapes_of("moe::fused_experts_lora_backward") == sorted(
        [
            (NUM_TOKENS, hidden),
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


def test_inside_of_the_op_makes_nothing_of_a_weights_size():
    """Its implementation is called as a function, as the op is opaque from outside."""
    module, x, ids, weights = make_layer(sizes=(40, 48))
    experts: Any = module.experts
    up, down = module.adapters["gate_up_proj"], module.adapters["down_proj"]
    projections = (experts.gate_up_proj, experts.down_proj)
    factors = (up.lora_A, up.lora_B, down.lora_A, down.lora_B)
    with torch.no_grad(), ReturnedShapes() as calls:
        output, z, *low, counts, gather, scatter = pytorch.fused_experts_lora(
            x, *projections, ids, weights, *factors, for_backward=True
        )
        backward: Any = pytorch.fused_experts_lora_backward
        gradients = backward(
            torch.ones_like(output), x, *projections, weights, *factors, None, z, *low, counts, gather,
            scatter, "silu", True, False, None, [True] * 6,
        )  # fmt: skip
    assert all(gradient.norm() > 0 for gradient in gradients)
    # A transposed view of a weight makes nothing.
    made = [shape for name, shape in calls.made if name != "aten::transpose"]
    assert len(made) > 20
    assert max(torch.Size(shape).numel() for shape in made) < experts.down_proj.numel()


def test_a_step_is_two_calls_of_ops():
    """What a call costs the host is most of a small step."""
    module, x, ids, weights = make_layer()
    with MoeOps() as ops:
        module(x, ids, weights).sum().backward()
    assert ops.counts == {"fused_experts_lora_forward": 1, "fused_experts_lora_backward": 1}


def test_without_a_gradient_it_is_one_call():
    module, x, ids, weights = make_layer()
    with torch.no_grad(), MoeOps() as ops:
        module(x, ids, weights)
    assert ops.counts == {"fused_experts_lora": 1}


@pytest.mark.parametrize("gated", [False, True])
def test_quantised_experts(gated):
    """On FP8 weights it equals the module on the dequantised ones. Its base gets no gradient."""
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
    with ReturnedShapes() as calls:
        module(x, ids, weights).sum().backward()
    assert calls.shapes_of("moe::grouped_gemm_dw") == sorted(
        [(4, 3, 40), (4, 96, 3), (4, 3, 48), (4, 40, 3)]
    )
    num_rows = NUM_TOKENS * TOP_K
    assert calls.shapes_of("moe::grouped_gemm_quantized_dx") == sorted(
        [(NUM_TOKENS, 40), (num_rows, 48)]
    )
    # A weight's bytes are seen as such, which makes nothing.
    made = [shape for name, shape in calls.made if name not in ("aten::view", "aten::detach")]
    assert max(torch.Size(shape).numel() for shape in made) < 4 * 40 * 48


def test_adapters_of_quantised_experts_are_bf16_unless_told():
    experts = Experts(NUM_EXPERTS, 8, 6).quantize_fp8_()
    assert LoraExperts(experts, 2).adapters["down_proj"].lora_A.dtype == torch.bfloat16
    assert LoraExperts(Experts(4, 8, 6), 2).adapters["down_proj"].lora_A.dtype == torch.float32


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
        TypeError, match=r"expected experts to be a moe_ops\.layers\.Experts, got Lora"
    ):
        LoraExperts(layer.experts, 2)


def test_input_gradient_only_where_needed():
    """The first layer of a frozen model computes no dX of the up projection."""
    module, x, ids, weights = make_layer(targets=["gate_up_proj"])
    with ReturnedShapes() as calls:
        module(x.detach(), ids, weights).sum().backward()
    assert calls.shapes_of("moe::fused_experts_lora_backward") == sorted(
        [(NUM_EXPERTS, 3, HIDDEN), (NUM_EXPERTS, 2 * INTER, 3)]
    )


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
    """The backward computes the layer again and gets the same bits."""
    module, x, ids, weights = make_layer()

    def layer(hidden):
        return checkpoint(module, hidden, ids, weights, use_reentrant=use_reentrant)

    expected = gradients_of(lambda hidden: module(hidden, ids, weights), module, x)
    if compiled:
        layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for actual, reference in zip(gradients_of_leaves(layer, module, x), expected, strict=True):
        assert torch.equal(actual, reference)


def gradients_of_leaves(function, module, x):
    """Do as gradients_of, but through .backward(), which a reentrant checkpoint needs."""
    module.zero_grad()
    x.grad = None
    output = function(x)
    output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output))
    return [output, x.grad, *(p.grad for p in trainable(module))]


def test_compiles_to_one_op_in_each_direction():
    graphs: dict[str, Counter[str]] = {"forward": Counter(), "backward": Counter()}

    def record(direction):
        def note(graph_module, _):
            targets = [str(node.target) for node in graph_module.graph.nodes]
            graphs[direction].update(name for name in targets if name.startswith("moe."))
            return make_boxed_func(graph_module.forward)

        return note

    backend = aot_autograd(fw_compiler=record("forward"), bw_compiler=record("backward"))
    module, x, ids, weights = make_layer()
    layer = torch.compile(module, fullgraph=True, backend=backend)
    actual, expected = (
        gradients_of(lambda h, f=function: f(h, ids, weights), module, x)
        for function in (layer, module)
    )
    for one, other in zip(actual, expected, strict=True):
        assert relative_error(one, other) <= RELATIVE_NORM[torch.float64]
    assert graphs == {
        "forward": {"moe.fused_experts_lora_forward.default": 1},
        "backward": {"moe.fused_experts_lora_backward.default": 1},
    }


def test_any_scaling_is_one_graph():
    """PEFT sets another for a layer, and changes it. Dynamo makes a graph for the first, and one for all."""
    module, x, ids, weights = make_layer()
    counter = CompileCounterWithBackend("aot_eager")
    layer = torch.compile(module, fullgraph=True, backend=counter)
    for scaling in (2.0, 0.5, 3.0, 1.0, -1.25, 7.0):
        for adapter in module.adapters.values():
            adapter.scaling = scaling
        gradients = []
        for way in (module, layer):
            output = way(x, ids, weights)
            leaves = [x, *module.adapters.parameters()]
            gradients.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
        for actual, expected in zip(*gradients, strict=True):
            assert relative_error(actual, expected) < RELATIVE_NORM[torch.float64]
    assert counter.frame_count <= 2


def test_compile():
    """Five token counts take two graphs and give eager's numbers."""
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


@pytest.mark.parametrize(
    ("option", "value", "advice"),
    [
        ("weights_before", True, "adapters on such experts are not supported"),
        ("recompute", "pre_activation", "set experts.recompute = 'none'"),
        ("kernel_config", "{}", "set experts.kernel_config = None"),
    ],
)
def test_rejects_options_of_the_experts_that_it_has_not_got(option, value, advice):
    """It says to unset those that change no result."""
    expected = rf"expected experts with {option}=.*; {advice}$"
    experts = Experts(4, 8, 6, **{option: value})
    with pytest.raises(ValueError, match=expected):
        LoraExperts(experts, 2)
    assert all(parameter.requires_grad for parameter in experts.parameters())
    layer = LoraExperts(Experts(4, 8, 6), 2)
    setattr(layer.experts, option, value)
    with pytest.raises(ValueError, match=expected):
        layer(torch.randn(3, 8), torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1))


def test_an_intermediate_size_of_zero():
    """The experts have it too: they give zeros."""
    layer = LoraExperts(Experts(4, 8, 0), 2)
    assert layer.adapters["down_proj"].lora_A.shape == (4, 2, 0)
    output = layer(torch.randn(3, 8), torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1))
    assert torch.equal(output, torch.zeros(3, 8))


def test_a_refused_rank_leaves_the_experts_as_they_were():
    experts = Experts(4, 8, 6)
    with pytest.raises(ValueError, match="rank >= 1, got 0"):
        LoraExperts(experts, 0)
    assert all(parameter.requires_grad for parameter in experts.parameters())

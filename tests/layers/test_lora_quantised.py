# SPDX-License-Identifier: Apache-2.0
"""LoRA and layers.Experts on a QuantizedWeight compute as on its values."""

import copy

import pytest
import torch

import moe_ops
from moe_ops import QuantizedWeight, quantize_weight
from moe_ops.layers import Experts
from moe_ops.layers.lora import LoraExperts, LoraWeights, lora_grouped_gemm
from moe_ops.quantization.formats import FORMATS
from testing.quantized_problem import values_of
from testing.tolerances import MODULE_NORM, relative_error

NUM_EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 4, 64, 48, 2
TOLERANCE = MODULE_NORM[torch.float32]


def make_experts(**options):
    torch.manual_seed(0)
    return Experts(NUM_EXPERTS, HIDDEN, INTERMEDIATE, **options)


def draw():
    hidden_states = torch.randn(9, HIDDEN, requires_grad=True)
    topk_weights, topk_ids = moe_ops.topk_routing(torch.randn(9, NUM_EXPERTS), TOP_K)
    return hidden_states, topk_ids, topk_weights.detach().requires_grad_()


def plain(experts):
    """Return a copy of a layer with the values of its weights."""
    experts = copy.deepcopy(experts)
    for name, weight in list(experts.named_children()):
        assert isinstance(weight, QuantizedWeight)
        delattr(experts, name)
        setattr(experts, name, torch.nn.Parameter(weight.dequantize(), requires_grad=False))
    return experts


def gradients(layer, arguments):
    output = layer(*arguments)
    leaves = [arguments[0], arguments[2], *(p for p in layer.parameters() if p.requires_grad)]
    tangent = torch.linspace(-1, 1, output.numel()).view(output.shape)
    return [output, *torch.autograd.grad(output, leaves, tangent)]


def assert_close(actual, expected):
    assert len(actual) == len(expected)
    for got, want in zip(actual, expected, strict=True):
        assert relative_error(got, want) <= TOLERANCE


OPTIONS = [
    {},
    {"bias": True, "activation": "swiglu_oai", "interleaved": True, "activation_limit": 7.0},
    {"gated": False, "activation": "relu_squared"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("format", FORMATS)
def test_layers_compute_as_their_values(format, options):
    """Without adapters, with them, and with them merged."""
    experts = make_experts(**options).quantize_(format)
    assert not any(parameter.requires_grad for parameter in experts.parameters())
    arguments = draw()
    expected = plain(experts)
    assert_close(gradients(experts, arguments), gradients(expected, arguments))
    layers = []
    for one in (experts, expected):
        torch.manual_seed(1)
        layers.append(LoraExperts(one, rank=3))
        for parameter in layers[-1].adapters.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    actual = gradients(layers[0], arguments)
    assert_close(actual, gradients(layers[1], arguments))
    assert len(actual) == 3 + 4
    assert relative_error(actual[0], experts(*arguments)) > 1e-2
    merged = layers[0].merge(torch.float32)
    assert_close([merged(*arguments)], actual[:1])


def test_merging_takes_a_dtype():
    layer = LoraExperts(make_experts(bias=True).quantize_("nf4"), rank=3)
    with pytest.raises(
        ValueError, match=r"expected dtype with quantised experts \(nf4\), got None"
    ):
        layer.merge()
    hidden_states, *routing = draw()
    layer(hidden_states, *routing)
    merged = layer.merge(torch.bfloat16)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    assert merged(hidden_states.bfloat16(), *routing).dtype == torch.bfloat16


def test_compiles_into_one_graph():
    layer = LoraExperts(make_experts().quantize_("nf4"), rank=3)
    arguments = draw()
    expected = gradients(layer, arguments)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(gradients(compiled, arguments), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_projection(dtype):
    """Adapters are multiplied in the dtype of the rows, whatever the weight's own is."""
    weight = quantize_weight(torch.randn(4, 24, HIDDEN, dtype=torch.bfloat16), "int4")
    adapter = LoraWeights(torch.randn(4, 2, HIDDEN), torch.randn(4, 24, 2), 0.5)
    counts = torch.tensor([2, 0, 4, 1])
    rows = torch.randn(7, HIDDEN, dtype=dtype)
    output = lora_grouped_gemm(rows, weight, counts, [adapter])
    values = values_of(weight, dtype)
    assert output.dtype == dtype
    expected = lora_grouped_gemm(rows, values, counts, [adapter])
    assert relative_error(output, expected) <= MODULE_NORM[dtype]


def test_a_layer_says_that_it_is_quantised():
    assert not make_experts().is_quantised
    assert make_experts().quantize_("nf4").is_quantised
    assert make_experts().quantize_fp8_().is_quantised


def test_a_state_fits_a_layer_that_is_quantised_alike():
    experts = make_experts(bias=True).quantize_("nf4")
    other = Experts(NUM_EXPERTS, HIDDEN, INTERMEDIATE, bias=True)
    with pytest.raises(RuntimeError, match=r"got quantised ones; call quantize_\(\) on the layer"):
        other.load_state_dict(experts.state_dict())
    with pytest.raises(RuntimeError, match="quantised weights in down_proj, got plain ones; load"):
        experts.load_state_dict(other.state_dict())
    other.quantize_("nf4").load_state_dict(experts.state_dict())
    arguments = draw()
    assert torch.equal(other(*arguments), experts(*arguments))
    arguments = [argument.detach() for argument in arguments]
    arguments[0] = arguments[0].bfloat16()
    assert other.bfloat16()(*arguments).dtype == torch.bfloat16
    assert isinstance(other.down_proj, QuantizedWeight)
    assert isinstance(experts.down_proj, QuantizedWeight)
    assert torch.equal(other.down_proj.codes, experts.down_proj.codes)


@pytest.mark.parametrize("again", ["quantize_", "quantize_fp8_", "reset_parameters"])
def test_what_takes_plain_weights(again):
    experts = make_experts().quantize_("nf4")
    arguments = ["nf4"] if again == "quantize_" else []
    with pytest.raises(
        ValueError, match=rf"Experts.{again}: expected experts that are not quantised"
    ):
        getattr(experts, again)(*arguments)
    fp8 = make_experts().quantize_fp8_()
    with pytest.raises(ValueError, match="quantize_: expected experts that are not quantised yet"):
        fp8.quantize_("nf4")
    with pytest.raises(ValueError, match="expected format to be one of"):
        make_experts().quantize_("nf5")


@pytest.mark.parametrize("format", FORMATS)
def test_hidden_states_of_another_size(format):
    """The error has the sizes that the caller knows, not those of packed codes."""
    layer = LoraExperts(make_experts().quantize_(format), rank=2)
    hidden_states, *routing = draw()
    text = r"gate_up_proj\.shape\[2\] == hidden_states\.shape\[1\] \(7\), got 64$"
    with pytest.raises(ValueError, match=r"^moe::fused_experts_lora: expected " + text):
        layer(hidden_states[:, :7], *routing)

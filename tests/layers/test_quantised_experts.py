# SPDX-License-Identifier: Apache-2.0
"""Experts after quantize_fp8_() compute, convert, save and load."""

import copy
from typing import Any

import pytest
import torch

import moe_ops
from moe_ops.layers import MoE, Router
from moe_ops.layers.experts import Experts
from testing.lora_problem import NUM_EXPERTS, draw_ids, randn
from testing.tolerances import RELATIVE_NORM, relative_error

# A weight has several scales, the last ones for narrower blocks.
HIDDEN, INTER, NUM_TOKENS, TOP_K = 150, 130, 12, 2
VARIANTS: dict[str, dict[str, Any]] = {
    "silu": {},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "interleaved": {"interleaved": True},
    "gpt_oss": {"activation": "swiglu_oai", "interleaved": True, "activation_limit": 0.4},
    "llama4": {"weights_before": True},
    "ungated": {"gated": False, "activation": "relu_squared"},
    "recomputed": {"recompute": "pre_activation"},
    "recomputed_llama4": {"recompute": "pre_activation", "weights_before": True},
}


def make_experts(name="silu"):
    """Return quantised experts, and plain ones with the dequantised weights."""
    experts, worth = (Experts(NUM_EXPERTS, HIDDEN, INTER, **VARIANTS[name]) for _ in range(2))
    assert experts.quantize_fp8_() is experts
    for parameter_name, parameter in worth.named_parameters():
        scale = experts.scale(parameter_name)
        assert scale is not None
        codes = experts.get_parameter(parameter_name)
        parameter.data = moe_ops.dequantize_fp8(codes, scale, torch.float32)
    return experts, worth


def make_inputs(num_tokens=NUM_TOKENS):
    hidden_states = randn(num_tokens, HIDDEN, dtype=torch.float32).requires_grad_()
    topk_weights = torch.rand(num_tokens, TOP_K).requires_grad_()
    return hidden_states, draw_ids("dropped", num_tokens), topk_weights


def step(layer, hidden_states, topk_ids, topk_weights):
    """Return the output, and the gradients of the input and of the router weights."""
    output = layer(hidden_states, topk_ids, topk_weights)
    tangent = torch.linspace(-1, 1, output.numel()).view_as(output)
    return [output, *torch.autograd.grad(output, [hidden_states, topk_weights], tangent)]


def assert_same(actual, expected):
    for got, want in zip(actual, expected, strict=True):
        assert want.norm() > 0
        assert relative_error(got, want) <= RELATIVE_NORM[torch.float32]


@pytest.mark.parametrize("name", list(VARIANTS))
def test_computes_what_its_weights_are_worth(name):
    experts, worth = make_experts(name)
    inputs = make_inputs()
    assert_same(step(experts, *inputs), step(worth, *inputs))
    assert all(p.grad is None and not p.requires_grad for p in experts.parameters())


def test_weights_that_require_grad_are_refused():
    """requires_grad_() of a whole model leaves them so. They would get no gradient."""
    experts, _ = make_experts()
    experts.requires_grad_()
    text = r"projection: expected weight.requires_grad == False, .*, got True; call"
    with pytest.raises(ValueError, match=text):
        experts(*make_inputs())
    with torch.no_grad():
        assert experts(*make_inputs()).norm() > 0


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(num_tokens):
    experts, worth = make_experts()
    inputs = make_inputs(num_tokens)
    for got, want in zip(step(experts, *inputs), step(worth, *inputs), strict=True):
        assert got.shape == want.shape
        assert relative_error(got, want) <= RELATIVE_NORM[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_computes_in_the_dtype_of_the_hidden_states(dtype):
    experts, worth = make_experts()
    hidden_states, ids, weights = make_inputs()
    output = experts(hidden_states.to(dtype), ids, weights)
    assert output.dtype == dtype
    expected = worth.to(dtype)(hidden_states.to(dtype), ids, weights)
    tolerance = RELATIVE_NORM[min(dtype, torch.float32, key=lambda each: each.itemsize)]
    assert relative_error(output, expected) <= tolerance


@pytest.mark.parametrize("name", ["silu", "recomputed"])
def test_compiles_into_one_graph(name):
    experts, _ = make_experts(name)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    for num_tokens in (3, 12):
        inputs = make_inputs(num_tokens)
        assert_same(step(compiled, *inputs), step(experts, *inputs))


def test_recompute_saves_no_activation():
    saved = {}
    for name in ("silu", "recomputed"):
        sizes: list[int] = []

        def note(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        experts, inputs = make_experts(name)[0], make_inputs()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            experts(*inputs)
        saved[name] = sizes
    num_rows = NUM_TOKENS * TOP_K
    assert saved["silu"].count(num_rows * INTER) >= 2, "gate and up"
    assert max(saved["recomputed"], default=0) <= NUM_TOKENS * HIDDEN


def test_stands_in_a_layer_that_is_made_of_parts():
    experts, worth = make_experts()
    router = Router(HIDDEN, NUM_EXPERTS, TOP_K)
    hidden_states, *_ = make_inputs()
    actual, expected = (MoE(router, each)(hidden_states)[0] for each in (experts, worth))
    assert_same([actual], [expected])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "tanh"}, "expected activation to be one of silu, .*, got 'tanh'"),
        ({"activation": "swiglu_oai", "gated": False}, "expected gated=True with swiglu_oai"),
        ({"activation_limit": -1.0}, "expected activation_limit > 0, got -1.0"),
        ({"recompute": "all"}, "expected recompute to be one of none, pre_activation, got 'all'"),
        ({"kernel_config": "x"}, "grouped_gemm_quantized: expected kernel_config"),
    ],
)
def test_rejects_the_options_that_the_fused_layer_rejects(options, message):
    experts = Experts(NUM_EXPERTS, HIDDEN, INTER, **options)
    with pytest.raises(ValueError, match=r"moe::fused_experts"):
        experts(*make_inputs())
    with pytest.raises(ValueError, match=message):
        experts.quantize_fp8_()(*make_inputs())


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


def test_refusals_say_what_to_do():
    experts = Experts(NUM_EXPERTS, 8, 6).quantize_fp8_()
    with pytest.raises(
        ValueError, match=r"reset_parameters: .* got quantised ones; reset a new layer"
    ):
        experts.reset_parameters()
    with pytest.raises(
        ValueError, match=r"are not quantised yet, got gate_up_proj_scale; call it once"
    ):
        experts.quantize_fp8_()


def test_biases_are_refused_and_the_advice_works():
    """The other form has the values of this one's weights, and adds the biases."""
    biased = Experts(NUM_EXPERTS, HIDDEN, INTER, bias=True)
    plain, inputs = copy.deepcopy(biased), make_inputs()
    with pytest.raises(
        ValueError,
        match=r"got gate_up_proj_bias; use quantize_\('fp8_block'\), which keeps biases$",
    ):
        biased.quantize_fp8_()
    assert biased.gate_up_proj.dtype == torch.float32
    biased.quantize_("fp8_block")
    for name in ("gate_up_proj", "down_proj"):
        weight = plain.get_parameter(name)
        weight.data = moe_ops.dequantize_fp8(*moe_ops.quantize_fp8(weight.data), torch.float32)
    assert_same(step(biased, *inputs), step(plain, *inputs))


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
    with pytest.raises(
        RuntimeError, match="expected plain weights in gate_up_proj, got FP8 ones; call"
    ):
        plain.load_state_dict(quantised.state_dict(), strict=strict)
    with pytest.raises(
        RuntimeError, match="expected FP8 weights in down_proj, got plain ones; load"
    ):
        quantised.load_state_dict(Experts(NUM_EXPERTS, 8, 6).state_dict(), strict=strict)
    again = Experts(NUM_EXPERTS, 8, 6).quantize_fp8_()
    again.load_state_dict(quantised.state_dict(), strict=strict)
    for name, tensor in quantised.state_dict().items():
        assert torch.equal(again.state_dict()[name].float(), tensor.float()), name

# SPDX-License-Identifier: Apache-2.0
"""quantize_experts_ quantises the experts of a model in place, and nothing else."""

import copy
import io
from typing import Any

import pytest
import torch

from moe_ops import QuantizedWeight, quantize_weight
from moe_ops.integrations.transformers import dequantize_experts_, quantize_experts_
from moe_ops.quantization.formats import FORMATS
from testing.largest_floats import LargestFloats
from testing.tiny_models import MODELS, find_experts, make_model, run_step
from testing.tolerances import MODULE_NORM, relative_error


def model_of(name="qwen3_moe", dtype=torch.float32):
    model = make_model(name, dtype)
    model.set_experts_implementation("moe_ops")
    return model


@pytest.fixture
def input_ids():
    return torch.randint(3, 48, (2, 12), generator=torch.Generator().manual_seed(0))


def weights_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedWeight)}


CASES = [(name, "nf4") for name in MODELS]
CASES += [(name, format) for name in ("qwen3_moe", "gpt_oss") for format in FORMATS]


@pytest.mark.parametrize(("name", "format"), sorted(set(CASES)))
def test_computes_as_its_dequantised_weights(name, format, input_ids):
    """Output and every gradient are those of the model with the weights' values."""
    model = model_of(name)
    plain = dict(model.named_parameters())
    (experts_name,) = quantize_experts_(model, format)
    experts = model.get_submodule(experts_name)
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    quantised = {f"{experts_name}.{weight}" for weight in (up_name, "down_proj")}
    assert set(weights_of(model)) == quantised
    for key, weight in weights_of(model).items():
        logical = plain[key].mT if experts.is_transposed else plain[key]
        assert weight.format == format
        assert torch.equal(weight.codes, quantize_weight(logical, format).codes)
    # Everything else is the very same.
    left = {key: p for key, p in model.named_parameters() if p.dtype != torch.uint8}
    assert left.keys() == plain.keys() - quantised
    assert all(parameter is plain[key] for key, parameter in left.items())

    values = copy.deepcopy(model)
    assert dequantize_experts_(values) == [experts_name]
    assert {k: p.shape for k, p in values.named_parameters()} == {
        key: parameter.shape for key, parameter in plain.items()
    }
    output, gradients = run_step(model, input_ids)
    expected, expected_gradients = run_step(values, input_ids)
    assert relative_error(output, expected) <= MODULE_NORM[torch.float32]
    assert relative_error(output, run_step(model_of(name), input_ids)[0]) > 1e-3
    for key in left:
        if expected_gradients[key] is not None:
            error = relative_error(gradients[key], expected_gradients[key])
            assert error <= MODULE_NORM[torch.float32], key


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_dequantised_experts_are_the_class_s_own(name, input_ids):
    """They have the class's layout, and run on transformers' implementations."""
    model = model_of(name)
    shapes = {key: p.shape for key, p in model.named_parameters()}
    quantize_experts_(model, "int4")
    expected = model(input_ids=input_ids).logits
    dequantize_experts_(model)
    assert {key: p.shape for key, p in model.named_parameters()} == shapes
    assert not any(p.requires_grad for p in find_experts(model)[0].parameters() if p.ndim == 3)
    model.set_experts_implementation("eager")
    assert relative_error(model(input_ids=input_ids).logits, expected) <= MODULE_NORM[torch.float32]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_other_implementations_are_refused(implementation, input_ids):
    model = model_of()
    quantize_experts_(model, "nf4")
    model.set_experts_implementation(implementation)
    with pytest.raises(ValueError, match=rf"quantised \(nf4\), got '{implementation}'; call model"):
        model(input_ids=input_ids)
    model.set_experts_implementation("moe_ops")
    model(input_ids=input_ids)


def two_layers():
    tiny = MODELS["qwen3_moe"]
    options = {**tiny.options, "num_hidden_layers": 2}
    model = make_model(type(tiny)(tiny.model_class, tiny.config_class, options))
    model.set_experts_implementation("moe_ops")
    return model


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (None, [0, 1]),
        (["layers.1.mlp.experts"], [1]),
        (["model.layers.0.mlp.experts"], [0]),
        (["layers.*.mlp.experts"], [0, 1]),
        ([], []),
    ],
)
def test_modules_are_chosen_by_name(modules, expected):
    model = two_layers()
    names = quantize_experts_(model, "nf4", modules)
    assert names == [f"model.layers.{layer}.mlp.experts" for layer in expected]
    assert len(weights_of(model)) == 2 * len(expected)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            ("nf5",),
            ValueError,
            "expected format to be one of fp8_block, nf4, mxfp4, int4, got 'nf5'",
        ),
        (("nf4", ["layers.7"]), ValueError, "expected modules to name experts, got 'layers.7'"),
        (
            ("nf4", "experts"),
            TypeError,
            "expected modules to be a sequence of names, got 'experts'",
        ),
        (("nf4", [0]), TypeError, "expected modules to be names, got 0"),
    ],
)
def test_bad_arguments(arguments, error, text):
    model = two_layers()
    with pytest.raises(error, match=text):
        quantize_experts_(model, *arguments)
    assert not weights_of(model)


def test_names_may_come_from_an_iterator():
    model = two_layers()
    names: Any = (name for name in ["layers.0.mlp.experts"])
    assert len(quantize_experts_(model, "nf4", names)) == 1
    assert weights_of(model)


def test_other_sizes_of_blocks():
    model = two_layers()
    quantize_experts_(model, "int4", group_size=128)
    assert {weight.group_size for weight in weights_of(model).values()} == {128}
    with pytest.raises(ValueError, match="expected group_size of int4 to be 32 or 128, got 64"):
        quantize_experts_(two_layers(), "int4", group_size=64)


@pytest.mark.parametrize("model", [None, "a/path", torch.nn.Linear])
def test_what_is_no_model(model):
    got = "None" if model is None else type(model).__name__
    for call in (lambda: quantize_experts_(model, "nf4"), lambda: dequantize_experts_(model)):
        with pytest.raises(
            TypeError,
            match=rf"quantize_experts_: expected model to be a torch.nn.Module, got {got}$",
        ):
            call()


def test_what_has_no_plain_experts():
    model = two_layers()
    quantize_experts_(model, "nf4", ["layers.1.mlp.experts"])
    with pytest.raises(
        ValueError, match=r"not quantised yet, got model.layers.1.* in nf4; call deq"
    ):
        quantize_experts_(model, "int4")
    assert len(weights_of(model)) == 2
    with pytest.raises(ValueError, match=r"expected a model with experts .*, got Linear without"):
        quantize_experts_(torch.nn.Linear(2, 2), "nf4")
    with pytest.raises(
        ValueError, match=r"with quantised experts .*, got Qwen3MoeForCausalLM with"
    ):
        dequantize_experts_(two_layers())
    with pytest.raises(TypeError, match=r"dequantize_experts_: expected dtype in .*, got int8"):
        dequantize_experts_(model, dtype=torch.int8)
    assert len(weights_of(model)) == 2
    experts = find_experts(model)[0]
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), False)
    with pytest.raises(
        TypeError, match=r"down_proj to be a parameter in .*, got torch.float8_e4m3fn"
    ):
        quantize_experts_(model, "nf4", ["layers.0.mlp.experts"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computes_in_the_dtype_of_the_hidden_states(dtype, input_ids):
    """A cast of the model leaves the weights' bytes, and changes what is computed in."""
    model = model_of("gpt_oss", torch.bfloat16)
    quantize_experts_(model, "mxfp4")
    codes = {key: weight.codes.clone() for key, weight in weights_of(model).items()}
    model.to(dtype)
    assert all(torch.equal(w.codes, codes[key]) for key, w in weights_of(model).items())
    values = copy.deepcopy(model)
    dequantize_experts_(values, dtype=dtype)
    output = model(input_ids=input_ids).logits
    assert output.dtype == dtype
    expected = values(input_ids=input_ids).logits
    assert relative_error(output, expected) <= MODULE_NORM[dtype]


def test_autocast(input_ids):
    model = model_of()
    quantize_experts_(model, "nf4")
    values = copy.deepcopy(model)
    dequantize_experts_(values)
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = (m(input_ids=input_ids).logits for m in (model, values))
    assert relative_error(output, expected) <= MODULE_NORM[torch.bfloat16]


def test_it_quantises_expert_by_expert():
    """Beside the model there is at most one expert at a time in floats."""
    model = model_of()
    one = max(p[0].numel() for p in find_experts(model)[0].parameters())
    with LargestFloats(model) as seen:
        quantize_experts_(model, "nf4")
    # Rows of 32 are padded to a block of 64.
    assert one <= seen.largest <= 2 * one


def test_a_model_is_copied_and_pickled(input_ids):
    model = model_of()
    quantize_experts_(model, "nf4")
    expected = model(input_ids=input_ids).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(input_ids=input_ids).logits, expected)
        other.set_experts_implementation("eager")
        with pytest.raises(ValueError, match="quantised"):
            other(input_ids=input_ids)

# SPDX-License-Identifier: Apache-2.0
"""PEFT's target_parameters adapts quantised experts as it adapts plain ones."""

import copy
import subprocess
import sys

import pytest
import torch

from moe_ops import QuantizedWeight
from moe_ops.integrations.transformers import (
    MoeOpsConfig,
    dequantize_experts_,
    quantize_experts_,
)
from moe_ops.quantization.formats import FORMATS
from testing.tiny_models import find_experts, make_model, run_step
from testing.tolerances import MODULE_NORM, relative_error

pytest.importorskip("peft", reason="the peft extra is not installed")

import peft

from moe_ops.integrations import peft as moe_ops_peft
from testing.peft_problem import BOTH, PREFIX, MoeCalls, assert_same_step, config

TARGETS = {
    "nemotron_h": ["mixer.experts.up_proj", "mixer.experts.down_proj"],
}


def quantised_model(name="qwen3_moe", format="nf4", dtype=torch.float32):
    model = make_model(name, dtype)
    model.set_experts_implementation("moe_ops")
    quantize_experts_(model, format)
    return model


def adapted(model, name="qwen3_moe", **options):
    torch.manual_seed(1)
    return peft.get_peft_model(model, config(TARGETS.get(name, BOTH), **options))


@pytest.fixture
def input_ids():
    return torch.randint(3, 48, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True, scope="module")
def _peft_is_as_it_was():
    yield
    moe_ops_peft.support_quantised(False)


@pytest.mark.parametrize(
    ("name", "format", "dtype"),
    [("qwen3_moe", format, torch.float32) for format in FORMATS]
    + [
        ("qwen3_moe", "nf4", torch.bfloat16),
        ("gpt_oss", "mxfp4", torch.float32),
        ("gpt_oss", "mxfp4", torch.bfloat16),
        ("nemotron_h", "int4", torch.float32),
    ],
)
def test_a_step_is_that_of_the_dequantised_model(name, format, dtype, input_ids):
    """Adapters have the same names, shapes and values, and the same gradients."""
    model = quantised_model(name, format, dtype)
    values = copy.deepcopy(model)
    dequantize_experts_(values)
    model, values = adapted(model, name), adapted(values, name)
    (enabled,) = moe_ops_peft.enable(values)
    assert moe_ops_peft.enable(model) == [enabled]
    state, expected = map(peft.get_peft_model_state_dict, (model, values))
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in state.items())
    with MoeCalls() as calls:
        actual = run_step(model, input_ids)
    assert "fused_experts_lora_quantized_backward" in calls.names()
    expected_step = run_step(values, input_ids)
    experts = {
        f"{enabled}.base_layer.base_layer.{n}" for n in ("gate_up_proj", "up_proj", "down_proj")
    }
    for _, gradients in (actual, expected_step):
        for key in [key for key in gradients if key.startswith(tuple(experts))]:
            assert gradients.pop(key) is None
    assert_same_step(actual, expected_step, dtype)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_compiles_into_one_graph(name, input_ids):
    model = adapted(quantised_model(name, "nf4"))
    expected = run_step(model, input_ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output, gradients = run_step(compiled, input_ids)
    gradients = {key.removeprefix("_orig_mod."): value for key, value in gradients.items()}
    assert_same_step((output, gradients), expected)


def test_needs_no_enable_and_no_import(tmp_path):
    """The integration attends to PEFT when PEFT is imported, at the earliest."""
    script = """
import sys
import torch
from moe_ops.integrations.transformers import quantize_experts_, register
register()
from testing.tiny_models import make_model, run_step
model = make_model("qwen3_moe")
model.set_experts_implementation("moe_ops")
quantize_experts_(model, "nf4")
assert "peft" not in sys.modules and "moe_ops.integrations.peft" not in sys.modules
from peft import LoraConfig, get_peft_model
targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
model = get_peft_model(model, LoraConfig(target_parameters=targets, r=4, init_lora_weights=False))
_, gradients = run_step(model, torch.randint(3, 48, (2, 12)))
trained = [name for name, gradient in gradients.items() if gradient is not None]
assert len(trained) == 4 and all("lora_" in name for name in trained), trained
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_adapters_are_saved_and_loaded(tmp_path, input_ids):
    """An adapter of a quantised model fits the plain one, and the other way round."""
    base = quantised_model()
    model = adapted(base)
    expected = model(input_ids=input_ids).logits
    model.save_pretrained(tmp_path)
    base = model.unload()
    assert sum(isinstance(module, QuantizedWeight) for module in base.modules()) == 2
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(again(input_ids=input_ids).logits, expected)
    base = again.unload()
    dequantize_experts_(base)
    plain = peft.PeftModel.from_pretrained(base, tmp_path)
    assert relative_error(plain(input_ids=input_ids).logits, expected) <= MODULE_NORM[torch.float32]


def test_adapters_fit_however_the_base_was_quantised(tmp_path, input_ids):
    """transformers may load down_proj first, but PEFT nests the plain model's up projection first."""
    plain = make_model("qwen3_moe")
    plain.set_experts_implementation("moe_ops")
    plain.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(
        tmp_path,
        quantization_config=MoeOpsConfig("nf4"),
        experts_implementation="moe_ops",
        attn_implementation="eager",
    )
    expected = peft.get_peft_model_state_dict(adapted(plain))
    for base in (loaded, quantised_model()):
        state = peft.get_peft_model_state_dict(adapted(base))
        assert state.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in state.items())


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_is_refused(method, safe_merge, input_ids):
    """It is refused before any other adapter is merged. The error says what to do, which works."""
    model = adapted(quantised_model(), target_modules=["q_proj"])
    expected = model(input_ids=input_ids).logits
    with pytest.raises(ValueError, match=r"in nf4: .*dequantize_experts_\(model\) first"):
        getattr(model, method)(safe_merge=safe_merge)
    for wrapper in (m for m in model.modules() if type(m).__name__ == "ParamWrapper"):
        with pytest.raises(ValueError, match="expected plain weights to merge adapters into, got"):
            wrapper.merge()
    assert torch.equal(model(input_ids=input_ids).logits, expected)
    assert dequantize_experts_(model) == [f"{PREFIX}.base_layer.base_layer"]
    merged = getattr(model, method)(safe_merge=safe_merge) or model
    output = merged(input_ids=input_ids).logits
    assert relative_error(output, expected) <= MODULE_NORM[torch.float32]


def test_several_adapters(input_ids):
    """They are added up, switched, and switched off."""
    model = quantised_model()
    plain_output = model(input_ids=input_ids).logits
    model = adapted(model)
    first = model(input_ids=input_ids).logits
    torch.manual_seed(2)
    model.add_adapter("second", config())
    assert torch.equal(model(input_ids=input_ids).logits, first)
    model.set_adapter("second")
    assert relative_error(model(input_ids=input_ids).logits, first) > 1e-2
    model.base_model.set_adapter(["default", "second"])
    values = copy.deepcopy(model)
    dequantize_experts_(values)
    moe_ops_peft.enable(values)
    steps = [run_step(one, input_ids) for one in (model, values)]
    assert_same_step(*((output, _adapters(gradients)) for output, gradients in steps))
    with model.disable_adapter():
        assert torch.equal(model(input_ids=input_ids).logits, plain_output)


def _adapters(gradients):
    return {name: gradient for name, gradient in gradients.items() if "lora_" in name}


def test_experts_that_are_quantised_after_peft_has_wrapped_them(input_ids):
    model = make_model("qwen3_moe")
    model.set_experts_implementation("moe_ops")
    late = adapted(copy.deepcopy(model))
    quantize_experts_(late, "nf4")
    quantize_experts_(model, "nf4")
    expected = run_step(adapted(model), input_ids)
    assert torch.equal(run_step(late, input_ids)[0], expected[0])


def hooked(model):
    find_experts(model)[0].register_forward_hook(lambda module, args, output: output * 2)


def eager(model):
    model.get_base_model().set_experts_implementation("eager")


def normed(model):
    experts = find_experts(model)[0]
    experts.has_post_expert_norm, experts.post_expert_norm = True, torch.nn.Tanh()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, "Qwen3MoeExperts in Qwen3MoeExperts has hooks or a forward of its own"),
        (eager, 'Qwen3MoeExperts runs with experts_implementation="eager"'),
        (normed, "Qwen3MoeExperts has a norm after each expert"),
    ],
)
def test_what_split_lora_does_not_cover_is_refused(change, reason, input_ids, caplog):
    """PEFT's own path needs plain weights, so there is no other one."""
    model = adapted(quantised_model())
    change(model)
    with pytest.raises(ValueError, match=f"but {reason}. PEFT's own path merges"):
        model(input_ids=input_ids)
    assert moe_ops_peft.enable(model) == []
    assert not caplog.records


def test_disable_leaves_them_ours(input_ids):
    model = adapted(quantised_model())
    expected = model(input_ids=input_ids).logits
    moe_ops_peft.disable(model)
    assert torch.equal(model(input_ids=input_ids).logits, expected)


def test_auto_and_the_support_do_not_undo_each_other(input_ids):
    quantised = quantised_model()
    moe_ops_peft.auto()
    moe_ops_peft.auto(False)
    run_step(adapted(quantised), input_ids)
    plain = make_model("qwen3_moe")
    plain.set_experts_implementation("moe_ops")
    wrappers = [m for m in adapted(plain).modules() if "forward" in vars(m)]
    assert not wrappers

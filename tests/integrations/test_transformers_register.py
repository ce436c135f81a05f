# SPDX-License-Identifier: Apache-2.0
"""register() makes the implementation known. A model chooses it, or says why it cannot."""

import copy
import subprocess
import sys
import types

import pytest
import torch
import transformers
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface

from moe_ops.integrations.transformers import experts_forward, register
from testing.tiny_models import (
    MODELS,
    draw_batch,
    find_experts,
    make_model,
    run_step,
)
from testing.tolerances import MODULE_NORM, relative_error


def test_register_adds_the_name(monkeypatch):
    for interface in (ExpertsInterface, FP8ExpertsInterface):
        monkeypatch.setattr(interface, "_global_mapping", {})
    model = make_model("qwen3_moe")
    with pytest.raises(ValueError, match='experts_implementation="moe_ops"` is not supported'):
        model.set_experts_implementation("moe_ops")
    for _ in range(2):
        register()
        assert list(ExpertsInterface()) == ["moe_ops"]
        assert ExpertsInterface()["moe_ops"] is experts_forward
    model.set_experts_implementation("moe_ops")
    assert find_experts(model)[0].config._experts_implementation == "moe_ops"


def test_importing_the_adapter_does_not_import_transformers():
    code = (
        "import sys, moe_ops, moe_ops.integrations.transformers\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_transformers_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    expected = r"expected transformers >= 5\.17, got none that can be imported \(.*\); pip install 'transformers>=5\.17'$"
    with pytest.raises(ImportError, match=expected):
        register()


@pytest.fixture
def installed_version(monkeypatch, version):
    # transformers replaces its module while it loads, so the name imported above is another one.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    return version


@pytest.mark.parametrize("version", ["4.57.1", "5.9.0", "5.17.0.dev0"])
def test_transformers_too_old(installed_version):
    with pytest.raises(ImportError, match=f"transformers >= 5.17, got {installed_version}"):
        register()


@pytest.mark.parametrize("version", ["5.17.0", "5.23.0", "5.24.0.dev0", "6.0.0rc1", "10.0"])
def test_transformers_new_enough(installed_version):
    register()


def test_transformers_without_the_interface(monkeypatch):
    monkeypatch.setitem(
        sys.modules,
        "transformers.integrations.moe",
        types.ModuleType("transformers.integrations.moe"),
    )
    with pytest.raises(
        ImportError, match=r"with its experts interface, got .* without: .*ExpertsInt"
    ):
        register()


def test_without_the_fp8_interface(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.integrations.finegrained_fp8", None)
    register()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_from_pretrained(name, tmp_path):
    """The implementation is chosen at loading. The checkpoint does not keep it."""
    model = make_model(name)
    input_ids = draw_batch(model, torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(
        tmp_path, experts_implementation="moe_ops", attn_implementation="eager"
    )
    assert find_experts(loaded)[0].config._experts_implementation == "moe_ops"
    expected, _ = run_step(model, input_ids)
    actual, _ = run_step(loaded, input_ids)
    assert relative_error(actual, expected) <= MODULE_NORM[torch.float32]

    loaded.save_pretrained(tmp_path)
    assert "moe_ops" not in (tmp_path / "config.json").read_text(encoding="utf-8")


def test_from_config():
    config = make_model("mixtral").config
    model = transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(config), experts_implementation="moe_ops"
    )
    assert find_experts(model)[0].config._experts_implementation == "moe_ops"


def test_sub_config_of_a_composite_model():
    """It is chosen for the text part of a vision-language model through the whole model."""
    text = make_model("qwen3_vl_moe_text").config.to_dict()
    config = transformers.Qwen3VLMoeConfig(
        text_config=text,
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [],
            "num_position_embeddings": 16,
        },
    )
    model = transformers.Qwen3VLMoeForConditionalGeneration(config)
    model.set_experts_implementation("moe_ops")
    assert {module.config._experts_implementation for module in find_experts(model)} == {"moe_ops"}
    model.set_experts_implementation({"text_config": "eager"})
    assert {module.config._experts_implementation for module in find_experts(model)} == {"eager"}


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_generate(name):
    """Greedy decoding with a cache, one token a step, picks eager's tokens."""
    model = make_model(name).eval()
    input_ids = draw_batch(model, torch.Generator().manual_seed(0))
    arguments = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
    }
    expected = model.generate(**arguments)
    model.set_experts_implementation("moe_ops")
    assert torch.equal(model.generate(**arguments), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    "enable",
    [
        pytest.param(
            "activation_checkpointing_enable",
            marks=pytest.mark.skipif(
                not hasattr(transformers.PreTrainedModel, "activation_checkpointing_enable"),
                reason="transformers has it from 5.23 on",
            ),
        ),
        pytest.param(
            "gradient_checkpointing_enable",
            marks=pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
        ),
    ],
)
def test_activation_checkpointing(enable, use_reentrant):
    """The experts are computed twice, and the gradients are the same bits."""
    model = make_model("qwen3_moe")
    input_ids = draw_batch(model, torch.Generator().manual_seed(0))
    model.set_experts_implementation("moe_ops")
    calls = []
    for experts in find_experts(model):
        experts.register_forward_pre_hook(lambda module, _args: calls.append(module))
    expected = {name: gradient.clone() for name, gradient in run_step(model, input_ids)[1].items()}
    once = len(calls)
    getattr(model, enable)({"use_reentrant": use_reentrant})
    for name, gradient in run_step(model, input_ids)[1].items():
        assert torch.equal(gradient, expected[name]), name
    assert len(calls) == 3 * once


def test_fp8_experts_are_refused():
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    quantization = transformers.FineGrainedFP8Config(weight_block_size=(8, 8))
    model = replace_with_fp8_linear(make_model("qwen3_moe"), quantization_config=quantization)
    model.set_experts_implementation("moe_ops")
    (experts,) = find_experts(model)
    expected = r"does not compute fine-grained FP8 experts \(FP8Experts\); load with FineGrained"
    with pytest.raises(NotImplementedError, match=expected):
        experts(*torch.empty(3, 4, 2, device="meta"))


def test_model_outside_the_interface_is_left_alone():
    """Llama 4 has experts of its own kind. transformers takes the name and changes nothing."""
    config = transformers.Llama4TextConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=24,
        intermediate_size_mlp=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=1,
        pad_token_id=0,
    )
    model = transformers.Llama4ForCausalLM(config)
    before = model.config._experts_implementation
    model.set_experts_implementation("moe_ops")
    assert model.config._experts_implementation == before
    assert find_experts(model) == []


@pytest.mark.parametrize("name", list(MODELS))
def test_experts_are_found_by_what_the_docs_say(name):
    assert len(find_experts(make_model(name))) == 1

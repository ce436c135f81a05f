# SPDX-License-Identifier: Apache-2.0
"""register(default=True) serves models that name no implementation. unregister() undoes it."""

import copy
import itertools
import logging
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import PreTrainedModel
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface

from moe_ops.integrations.transformers import register, unregister
from testing.tiny_models import MODELS, draw_batch, find_experts, make_model, run_step
from testing.tolerances import MODULE_NORM, relative_error


@pytest.fixture(autouse=True)
def _unregistered():
    """Start without a trace of us, and leave what the session's fixture made."""
    unregister()
    yield
    unregister()
    register()


def config_without_a_name(name):
    """Return a tiny model's config that names no experts implementation, as a loaded one."""
    config = copy.deepcopy(make_model(name).config)
    config._experts_implementation = None
    return config


def implementation_of(model):
    (chosen,) = {module.config._experts_implementation for module in find_experts(model)}
    return chosen


def build(name="qwen3_moe"):
    return getattr(transformers, MODELS[name].model_class)(config_without_a_name(name))


@pytest.mark.parametrize("name", list(MODELS))
def test_is_the_default(name):
    assert implementation_of(build(name)) == "grouped_mm"
    register(default=True)
    assert implementation_of(build(name)) == "moe_ops"
    register()
    assert implementation_of(build(name)) == "moe_ops"
    unregister()
    assert implementation_of(build(name)) == "grouped_mm"


def test_loaded_model_computes_with_it(tmp_path):
    model = make_model("qwen3_moe")
    input_ids = draw_batch(model, torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    expected, expected_gradients = run_step(model, input_ids)
    register(default=True)
    for load in (type(model), transformers.AutoModelForCausalLM):
        loaded = load.from_pretrained(tmp_path, attn_implementation="eager")
        assert implementation_of(loaded) == "moe_ops"
        actual, gradients = run_step(loaded, input_ids)
        assert relative_error(actual, expected) <= MODULE_NORM[torch.float32]
        for key, gradient in expected_gradients.items():
            assert relative_error(gradients[key], gradient) <= MODULE_NORM[torch.float32], key
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert implementation_of(transformers.AutoModelForCausalLM.from_config(config)) == "moe_ops"


@pytest.mark.parametrize("named", ["eager", "grouped_mm", "batched_mm"])
def test_a_named_implementation_stays(named):
    register(default=True)
    model = transformers.AutoModelForCausalLM.from_config(
        config_without_a_name("qwen3_moe"), experts_implementation=named
    )
    assert implementation_of(model) == named


def test_models_without_experts_are_left_alone(caplog):
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    before = transformers.LlamaForCausalLM(copy.deepcopy(config)).config._experts_implementation
    register(default=True)
    with caplog.at_level(logging.INFO, logger="moe_ops"):
        model = transformers.LlamaForCausalLM(copy.deepcopy(config))
    assert model.config._experts_implementation == before
    assert not caplog.records


class Derived(transformers.Qwen3MoeForCausalLM):
    """Stands in a file of its own, where transformers' own default finds no experts."""


def test_derived_classes_get_it():
    register(default=True)
    assert implementation_of(Derived(config_without_a_name("qwen3_moe"))) == "moe_ops"


def test_a_class_that_has_a_default_keeps_it():
    """OpenAI's privacy filter asks for eager where nothing is named."""
    config = transformers.OpenAIPrivacyFilterConfig(
        vocab_size=48, hidden_size=32, intermediate_size=24, num_hidden_layers=1, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        pad_token_id=0,
    )  # fmt: skip
    register(default=True)
    model = transformers.OpenAIPrivacyFilterForTokenClassification(config)
    assert implementation_of(model) == "eager"


def composite_config():
    return transformers.Qwen3VLMoeConfig(
        text_config=config_without_a_name("qwen3_vl_moe_text").to_dict(),
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


def test_composite_model(caplog):
    """Its text part gets the default. The log has one line for the whole model."""
    register(default=True)
    with caplog.at_level(logging.INFO, logger="moe_ops"):
        model = transformers.Qwen3VLMoeForConditionalGeneration(composite_config())
    assert implementation_of(model) == "moe_ops"
    assert len(caplog.records) == 1


@pytest.mark.parametrize("default", [False, True])
def test_says_once_what_a_loaded_model_got(default, tmp_path, caplog):
    """A model that ran with moe_ops and was saved is loaded without the argument."""
    register(default=default)
    model = make_model("mixtral")
    model.set_experts_implementation("moe_ops")
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="moe_ops"):
        for _ in range(2):
            transformers.MixtralForCausalLM.from_pretrained(tmp_path)
        make_model("mixtral")
    (record,) = caplog.records
    got = "moe_ops" if default else "grouped_mm"
    expected = f"MixtralForCausalLM names no experts implementation and got '{got}'"
    assert expected in record.getMessage()
    assert record.levelno == (logging.INFO if default else logging.WARNING)
    assert ("register(default=True)" in record.getMessage()) == (not default)
    with caplog.at_level(logging.INFO, logger="moe_ops"):
        build("qwen3_moe")
    assert len(caplog.records) == 2


def state():
    """Return everything of transformers that register() touches."""
    return (
        PreTrainedModel.get_correct_experts_implementation,
        dict(ExpertsInterface._global_mapping),
        dict(FP8ExpertsInterface._global_mapping),
    )


CALLS = {
    "register": register,
    "default": lambda: register(default=True),
    "unregister": unregister,
}


@pytest.mark.parametrize(
    "names", [names for length in (1, 2, 3) for names in itertools.product(CALLS, repeat=length)]
)
def test_any_order_of_calls(names):
    """The last unregister() counts, whatever was called before it, and leaves no trace."""
    untouched = state()
    for name in names:
        CALLS[name]()
    since = (
        names[len(names) - names[::-1].index("unregister") :] if "unregister" in names else names
    )
    assert ("moe_ops" in ExpertsInterface()) == bool(since)
    assert ("moe_ops" in FP8ExpertsInterface()) == bool(since)
    assert implementation_of(build()) == ("moe_ops" if "default" in since else "grouped_mm")
    unregister()
    assert state() == untouched


def test_another_library_wraps_the_same_method(monkeypatch):
    """What was put on top of ours stays after unregister(), and ours under it does nothing."""
    name = "get_correct_experts_implementation"
    asked = []
    # What this first call finds is put back at the end.
    monkeypatch.setattr(PreTrainedModel, name, PreTrainedModel.get_correct_experts_implementation)
    register(default=True)
    ours = PreTrainedModel.get_correct_experts_implementation

    def on_top(self, requested_experts):
        asked.append(requested_experts)
        return ours(self, requested_experts)

    monkeypatch.setattr(PreTrainedModel, name, on_top)
    for _ in range(2):
        assert implementation_of(build()) == "moe_ops"
        unregister()
        assert PreTrainedModel.get_correct_experts_implementation is on_top
        assert implementation_of(build()) == "grouped_mm"
        register(default=True)
        ours_again = PreTrainedModel.get_correct_experts_implementation
        assert ours_again is not ours
        assert implementation_of(build()) == "moe_ops"
        unregister()
        assert PreTrainedModel.get_correct_experts_implementation is on_top
        register(default=True)
    assert None in asked


def test_a_model_that_still_runs_with_it_says_so():
    register()
    model = make_model("qwen3_moe")
    input_ids = draw_batch(model, torch.Generator().manual_seed(0))
    model.set_experts_implementation("moe_ops")
    unregister()
    with pytest.raises(KeyError, match="`moe_ops` is not a valid experts implementation"):
        model(input_ids=input_ids)
    model.set_experts_implementation("grouped_mm")
    model(input_ids=input_ids)


def test_fp8_experts_keep_transformers_own(monkeypatch):
    """A model that did not ask for moe_ops must not fail where it is the default."""
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    calls = []
    monkeypatch.setitem(
        FP8ExpertsInterface._global_mapping, "grouped_mm", lambda *args: calls.append(args)
    )
    register(default=True)
    quantization = transformers.FineGrainedFP8Config(weight_block_size=(8, 8))
    model = replace_with_fp8_linear(build(), quantization_config=quantization)
    (experts,) = find_experts(model)
    assert implementation_of(model) == "moe_ops"
    inputs = torch.empty(3, 4, 2, device="meta").unbind()
    experts(*inputs)
    assert calls == [(experts, *inputs)]


def test_unregister_without_transformers_does_nothing():
    code = (
        "import sys\n"
        "from moe_ops.integrations.transformers import unregister\n"
        "unregister()\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

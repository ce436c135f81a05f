# SPDX-License-Identifier: Apache-2.0
"""What split LoRA does not compute takes PEFT's own path, and the log says why."""

import logging

import pytest
import torch

from testing.tiny_models import NUM_EXPERTS, make_model, run_step
from testing.tolerances import MODULE_NORM, relative_error

pytest.importorskip("peft", reason="the peft extra is not installed")

import peft

from moe_ops.integrations import peft as moe_ops_peft
from testing.peft_problem import (
    BOTH,
    PREFIX,
    MoeCalls,
    assert_same_step,
    config,
    split_model,
    wrapped_model,
)


@pytest.fixture(autouse=True)
def _every_reason_is_logged():
    moe_ops_peft._log_once.cache_clear()


@pytest.fixture
def input_ids():
    return torch.randint(3, 48, (2, 12), generator=torch.Generator().manual_seed(0))


def eager_experts(model):
    model.get_base_model().set_experts_implementation("eager")


def hooked_experts(model):
    experts = model.get_submodule(f"{PREFIX}.base_layer.base_layer")
    experts.register_forward_hook(lambda module, args, output: output * 2)


def hooked_wrapper(model):
    wrapper = model.get_submodule(f"{PREFIX}.base_layer")
    wrapper.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))


def experts_with_a_norm(model):
    experts = model.get_submodule(f"{PREFIX}.base_layer.base_layer")
    experts.has_post_expert_norm, experts.post_expert_norm = True, torch.nn.Tanh()


class Packed(torch.nn.Parameter):
    """Stands for the parameters that quantisers make."""


def packed_weight(model):
    experts = model.get_submodule(f"{PREFIX}.base_layer.base_layer")
    experts.down_proj = Packed(experts.down_proj.data, requires_grad=False)


FALLBACKS = {
    "eager": (eager_experts, 'runs with experts_implementation="eager"'),
    "hooked experts": (hooked_experts, "Qwen3MoeExperts in Qwen3MoeExperts has hooks"),
    "hooked wrapper": (hooked_wrapper, "ParamWrapper in Qwen3MoeExperts has hooks"),
    "norm": (experts_with_a_norm, "Qwen3MoeExperts has a norm after each expert"),
    "packed": (packed_weight, "down_proj of Qwen3MoeExperts is Packed of torch.float32"),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_falls_back_with_a_reason(case, input_ids, caplog):
    """A change after enable() leads to PEFT's path, with its numbers and one line that says why."""
    change, reason = FALLBACKS[case]
    model = split_model()
    unchanged = run_step(model, input_ids)[0]
    change(model)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, logger="moe_ops"), MoeCalls() as calls:
        actual = run_step(model, input_ids)
        run_step(model, input_ids)
    assert not calls.is_split()
    (record,) = caplog.records
    assert "PEFT's own path merges the adapters" in record.getMessage()
    assert reason in record.getMessage()
    moe_ops_peft.disable(model)
    assert_same_step(actual, run_step(model, input_ids))
    assert (relative_error(actual[0], unchanged) > 0.01) == (case not in ("eager", "packed"))


def test_other_arguments_fall_back(input_ids, caplog):
    """Arguments by keyword take PEFT's path, which knows them, with its numbers."""
    wrapper = split_model().get_submodule(PREFIX)
    x, ids, weights = torch.randn(5, 32), torch.randint(NUM_EXPERTS, (5, 2)), torch.rand(5, 2)
    expected = wrapper(x, ids, weights)
    with caplog.at_level(logging.WARNING, logger="moe_ops"), MoeCalls() as calls:
        actual = wrapper(x, ids, top_k_weights=weights)
    assert not calls.is_split()
    assert "other arguments" in caplog.text
    assert relative_error(actual, expected) <= MODULE_NORM[torch.float32]


@pytest.mark.parametrize(
    ("name", "targets", "reason"),
    [
        ("gpt_oss", ["mlp.experts.gate_up_proj_bias"], "gate_up_proj_bias of GptOssExperts"),
        ("gpt_oss", [*BOTH, "mlp.experts.down_proj_bias"], "down_proj_bias of GptOssExperts"),
    ],
)
def test_targeted_biases_fall_back(name, targets, reason, input_ids, caplog):
    model = wrapped_model(name, targets=targets)
    expected = run_step(model, input_ids)
    with caplog.at_level(logging.WARNING, logger="moe_ops"):
        assert moe_ops_peft.enable(model) == []
    assert reason in caplog.text
    assert_same_step(run_step(model, input_ids), expected)


OTHER_TARGETS = peft.LoraConfig(target_modules=["q_proj"])


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_peft_refuses(options):
    """PEFT itself refuses what split LoRA does not compute."""
    with pytest.raises(ValueError, match="ParamWrapper does not work"):
        wrapped_model(**options)


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_4", "olora", "orthogonal", "corda"])
def test_peft_refuses_initialisations_that_read_a_weight(how):
    """They look for the base layer's `weight`, which experts do not have."""
    with pytest.raises(AttributeError, match="Experts' object has no attribute 'weight'"):
        wrapped_model(init_lora_weights=how)


@pytest.mark.parametrize("how", [True, "gaussian"])
def test_other_initialisations_are_computed(how, input_ids):
    model = wrapped_model(init_lora_weights=how)
    expected = run_step(model, input_ids)[0]
    assert moe_ops_peft.enable(model) == [PREFIX]
    assert relative_error(run_step(model, input_ids)[0], expected) <= MODULE_NORM[torch.float32]


class OtherExperts(torch.nn.Module):
    """Has stacked weights outside of transformers' experts interface, as Llama 4 does."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(NUM_EXPERTS, 5, 6))

    def forward(self, x):
        return torch.einsum("ebi,eoi->ebo", x, self.weight)


def test_experts_outside_of_the_interface_fall_back(caplog):
    module = torch.nn.Sequential(OtherExperts())
    model = peft.get_peft_model(module, config(["0.weight"]))
    x = torch.randn(NUM_EXPERTS, 3, 6)
    expected = model(x)
    with caplog.at_level(logging.WARNING, logger="moe_ops"):
        assert moe_ops_peft.enable(model) == []
    assert "OtherExperts does not go through transformers' experts interface" in caplog.text
    assert torch.equal(model(x), expected)


def test_forward_of_another_library_stays(input_ids, caplog):
    """accelerate puts such a forward on a module that it moves between devices."""
    model = wrapped_model()
    wrapper = model.get_submodule(PREFIX)
    wrapper.forward = lambda *args: type(wrapper).forward(wrapper, *args) * 0
    expected = run_step(model, input_ids)[0]
    with caplog.at_level(logging.WARNING, logger="moe_ops"):
        assert moe_ops_peft.enable(model) == []
    assert f"the wrapper of {PREFIX} has a forward of its own" in caplog.text
    moe_ops_peft.disable(model)
    assert torch.equal(run_step(model, input_ids)[0], expected)


def test_says_once_that_there_is_nothing_to_do(caplog):
    """A model without adapters on its experts is left as it is."""
    models = [peft.get_peft_model(make_model("qwen3_moe"), OTHER_TARGETS) for _ in range(2)]
    with caplog.at_level(logging.WARNING, logger="moe_ops"):
        assert [moe_ops_peft.enable(model) for model in models] == [[], []]
        assert moe_ops_peft.enable(make_model("qwen3_moe")) == []
    texts = [record.getMessage() for record in caplog.records]
    expected = (
        "moe_ops.integrations.peft: enable: expected a model with LoRA adapters on its experts, got "
        "{} without: nothing to do; pass peft LoraConfig(target_parameters=[...])"
    )
    assert texts == [expected.format("PeftModel"), expected.format("Qwen3MoeForCausalLM")]
    assert not any("forward" in vars(module) for model in models for module in model.modules())

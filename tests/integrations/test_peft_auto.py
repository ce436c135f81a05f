# SPDX-License-Identifier: Apache-2.0
"""auto() enables split LoRA wherever PEFT adds an adapter. auto(False) leaves PEFT as it was."""

import itertools
import logging

import pytest
import torch

from testing.tiny_models import make_model, run_step

pytest.importorskip("peft", reason="the peft extra is not installed")

import peft
from packaging.version import Version
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner
from transformers.integrations import peft as transformers_peft

from moe_ops.integrations import peft as moe_ops_peft
from testing.peft_problem import MoeCalls, assert_same_step, config, wrapped_model


@pytest.fixture(autouse=True)
def _undone():
    moe_ops_peft._log_once.cache_clear()
    yield
    moe_ops_peft.auto(False)


@pytest.fixture
def input_ids():
    return torch.randint(3, 48, (2, 12), generator=torch.Generator().manual_seed(0))


def base_model(implementation="moe_ops"):
    model = make_model("qwen3_moe")
    model.set_experts_implementation(implementation)
    return model


def is_split(model, input_ids):
    with MoeCalls() as calls:
        run_step(model, input_ids)
    return calls.is_split()


def by_get_peft_model(model, folder):
    return get_peft_model(model, config())


def by_from_pretrained(model, folder):
    return PeftModel.from_pretrained(model, folder, is_trainable=True)


def by_a_second_adapter(model, folder):
    wrapped = get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]), "other")
    wrapped.add_adapter("default", config())
    wrapped.set_adapter("default")
    return wrapped


def by_load_adapter(model, folder):
    wrapped = get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]), "other")
    wrapped.load_adapter(folder, "default", is_trainable=True)
    wrapped.set_adapter("default")
    return wrapped


def by_injection(model, folder):
    return inject_adapter_in_model(config(), model)


def by_transformers(model, folder):
    minimum = transformers_peft.MIN_PEFT_VERSION
    if Version(peft.__version__) < Version(minimum):
        pytest.skip(f"model.add_adapter of this transformers refuses PEFT before {minimum}")
    model.add_adapter(config())
    return model


WAYS = [
    by_get_peft_model,
    by_from_pretrained,
    by_a_second_adapter,
    by_load_adapter,
    by_injection,
    by_transformers,
]


@pytest.mark.parametrize("wrap", WAYS)
def test_every_way_to_add_an_adapter(wrap, input_ids, tmp_path):
    """The names that this file imported before auto() are reached, and the numbers stay PEFT's."""
    wrapped_model().save_pretrained(tmp_path)
    assert not is_split(wrap(base_model(), tmp_path), input_ids)
    moe_ops_peft.auto()
    model = wrap(base_model(), tmp_path)
    with MoeCalls() as calls:
        actual = run_step(model, input_ids)
    assert calls.is_split()
    moe_ops_peft.disable(model)
    assert not is_split(model, input_ids)
    assert_same_step(actual, run_step(model, input_ids))


def test_enable_after_it_gives_the_names(input_ids):
    moe_ops_peft.auto()
    model = wrapped_model()
    assert len(moe_ops_peft.enable(model)) == 1
    assert is_split(model, input_ids)


def test_says_why_experts_take_another_path(caplog):
    moe_ops_peft.auto()
    with caplog.at_level(logging.WARNING, logger="moe_ops"):
        for _ in range(2):
            get_peft_model(base_model("eager"), config())
    (record,) = caplog.records
    assert 'runs with experts_implementation="eager"' in record.getMessage()


def test_adapters_elsewhere_are_left_without_a_word(caplog):
    moe_ops_peft.auto()
    with caplog.at_level(logging.INFO, logger="moe_ops"):
        model = get_peft_model(base_model(), peft.LoraConfig(target_modules=["q_proj"]))
    assert not caplog.records
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    "calls", [calls for n in (1, 2, 3) for calls in itertools.product([True, False], repeat=n)]
)
def test_any_order_of_calls(calls, input_ids):
    """The last call counts, and auto(False) leaves no trace."""
    untouched = BaseTuner.inject_adapter
    for on in calls:
        moe_ops_peft.auto(on)
    model = wrapped_model()
    assert is_split(model, input_ids) == calls[-1]
    moe_ops_peft.auto(False)
    assert BaseTuner.inject_adapter is untouched
    assert "inject_adapter" not in vars(LoraModel)
    assert is_split(model, input_ids) == calls[-1]
    assert not is_split(wrapped_model(), input_ids)

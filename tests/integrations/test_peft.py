# SPDX-License-Identifier: Apache-2.0
"""Split LoRA gives the numbers of PEFT's LoRA on experts, and makes no merged weights."""

import copy
import dataclasses
import logging
import pickle

import pytest
import torch

from testing import dropped_slots
from testing.pages import DOCS, has_only_python_blocks, run_python_blocks
from testing.recorders import ReturnedShapes
from testing.tiny_models import MODELS as TINY_MODELS
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

MODELS = ["qwen3_moe", "mixtral", "olmoe", "gpt_oss"]
PAGE = DOCS / "lora.md"


@pytest.fixture(autouse=True)
def _every_reason_is_logged():
    moe_ops_peft._log_once.cache_clear()


@pytest.fixture
def input_ids():
    return torch.randint(3, 48, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "up", "down"])
def test_equals_peft(name, targets, input_ids):
    """Outputs and gradients equal those of PEFT's merged weights. Frozen parameters get none."""
    model = wrapped_model(name, targets=targets)
    expected = run_step(model, input_ids)
    assert moe_ops_peft.enable(model) == [PREFIX]
    with MoeCalls() as calls:
        actual = run_step(model, input_ids)
    assert calls.is_split()
    assert "fused_experts_forward" not in calls.names()
    assert_same_step(actual, expected)
    trained = {key for key, gradient in actual[1].items() if gradient is not None}
    assert trained == {key for key in actual[1] if "lora_" in key}
    assert len(trained) == 2 * len(targets)


@pytest.mark.parametrize("rank", [1, 3, 64])
def test_ranks(rank, input_ids):
    model = wrapped_model(r=rank, use_rslora=True)
    expected = run_step(model, input_ids)
    moe_ops_peft.enable(model)
    assert_same_step(run_step(model, input_ids), expected)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_packing_gives_peft_delta_weight(name):
    """lora_A has experts slowest, lora_B fastest. gpt-oss stores its weights transposed."""
    model = wrapped_model(name)
    for wrapper in wrappers(model):
        lora_a, lora_b, scaling = moe_ops_peft.adapter_weights(wrapper, "default")
        assert lora_a.shape[:2] == (NUM_EXPERTS, 8)
        assert lora_b.shape[::2] == (NUM_EXPERTS, 8)
        assert scaling == 2
        # The two packings differ, so taking one for the other shows.
        assert not torch.equal(lora_b, lora_b.reshape(NUM_EXPERTS, 8, -1).mT)
        delta = scaling * (lora_b @ lora_a)
        expected = wrapper.get_delta_weight("default")
        transposed = wrapper.get_base_layer().is_transposed
        assert transposed == (name == "gpt_oss")
        assert relative_error(delta.mT if transposed else delta, expected) <= 1e-6
        for view, packed in ((lora_a, wrapper.lora_A), (lora_b, wrapper.lora_B)):
            assert view.data_ptr() == packed["default"].weight.data_ptr()


def wrappers(model):
    found = [m for m in model.modules() if type(m).__name__ == "ParamWrapper"]
    assert found
    return found


def test_no_merged_weight_and_no_base_gradient(input_ids):
    """The backward returns the adapters' gradients alone: nothing before the layer is trained."""
    model = split_model()
    hidden, inter, rank = 32, 24, 8
    with MoeCalls() as calls, ReturnedShapes() as returned:
        run_step(model, input_ids[:1, :4])
    backward = [
        name for name in calls.names() if name.startswith("fused_experts") and "back" in name
    ]
    assert backward == ["fused_experts_lora_backward"]
    assert "grouped_gemm_dw" not in calls.names()
    assert returned.shapes_of("moe::fused_experts_lora_backward") == sorted(
        [
            (NUM_EXPERTS, rank, hidden),
            (NUM_EXPERTS, 2 * inter, rank),
            (NUM_EXPERTS, rank, inter),
            (NUM_EXPERTS, hidden, rank),
        ]
    )
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
    assert calls.largest < model.get_parameter(f"{PREFIX}.base_layer.base_layer.down_proj").numel()


def test_bf16_model(input_ids):
    """PEFT keeps adapters of a bf16 model in fp32. Their gradients are fp32 too."""
    model = wrapped_model(dtype=torch.bfloat16)
    reference = copy.deepcopy(model).float()
    expected, peft_own = run_step(reference, input_ids), run_step(model, input_ids)
    moe_ops_peft.enable(model)
    actual = run_step(model, input_ids)
    assert actual[0].dtype == torch.bfloat16
    for name, gradient in expected[1].items():
        if gradient is not None:
            assert actual[1][name].dtype == torch.float32
            # We round twice on the way. PEFT rounds the merged weight once.
            allowed = (
                1.5 * relative_error(peft_own[1][name], gradient) + MODULE_NORM[torch.bfloat16]
            )
            assert relative_error(actual[1][name], gradient) <= allowed, name


@pytest.mark.parametrize(("name", "which"), [("qwen3_moe", "peft"), ("gpt_oss", "inner")])
def test_compiled_step(name, which, input_ids):
    """PeftModel and the model in it compile to one graph. PEFT's own forward does not."""
    model = split_model(name)
    model = model if which == "peft" else model.get_base_model()
    expected = run_step(model, input_ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output, gradients = run_step(compiled, input_ids)
    gradients = {key.removeprefix("_orig_mod."): value for key, value in gradients.items()}
    assert_same_step((output, gradients), expected)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_dropped_slots_are_not_read(name):
    """A slot of another rank's expert adds nothing, whatever its weight is."""
    wrapper = split_model(name).get_submodule(PREFIX)
    trained = [parameter for key, parameter in wrapper.named_parameters() if "lora_" in key]
    assert len(trained) == 4
    with MoeCalls() as calls:
        dropped_slots.assert_not_read(wrapper, torch.randn(17, 32), NUM_EXPERTS, trained)
    assert calls.is_split()


def test_save_and_load(tmp_path, input_ids):
    model = split_model()
    expected = run_step(model, input_ids)
    model.save_pretrained(tmp_path)
    saved = peft.PeftModel.from_pretrained(fresh_base(), tmp_path, is_trainable=True)
    assert_same_step(run_step(saved, input_ids), expected)
    moe_ops_peft.enable(saved)
    assert_same_step(run_step(saved, input_ids), expected)


def fresh_base():
    base = make_model("qwen3_moe")
    base.set_experts_implementation("moe_ops")
    return base


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_merge_and_unload(name, input_ids):
    """PEFT's own merging works: merged, unmerged and unloaded, the numbers stay the same."""
    model = split_model(name)
    expected = run_step(model, input_ids)[0]
    model.merge_adapter()
    with MoeCalls() as calls:
        merged = model(input_ids=input_ids, use_cache=False)[0]
    assert "fused_experts_forward" in calls.names() or "fused_experts" in calls.names()
    assert relative_error(merged, expected) <= MODULE_NORM[torch.float32]
    model.unmerge_adapter()
    assert relative_error(run_step(model, input_ids)[0], expected) <= MODULE_NORM[torch.float32]
    unloaded = model.merge_and_unload()
    assert not [n for n, _ in unloaded.named_parameters() if "lora_" in n]
    output = unloaded(input_ids=input_ids, use_cache=False)[0]
    assert relative_error(output, expected) <= MODULE_NORM[torch.float32]


def test_disabled_adapters_give_the_base(input_ids):
    model = split_model()
    adapted = run_step(model, input_ids)[0]
    base = fresh_base()(input_ids=input_ids, use_cache=False)[0]
    with model.disable_adapter():
        output = model(input_ids=input_ids, use_cache=False)[0]
    assert relative_error(output, base) <= MODULE_NORM[torch.float32]
    assert relative_error(adapted, base) > 0.05


def test_several_adapters(input_ids):
    """An adapter is added after enable(). Each works alone, and both work together."""
    model = split_model()
    model.add_adapter("second", config(r=3, lora_alpha=9))
    split = moe_ops_peft.enable(model)
    assert split == [PREFIX]
    outputs = []
    for active in ("default", "second", ["default", "second"]):
        model.base_model.set_adapter(active)
        moe_ops_peft.enable(model)
        with MoeCalls() as calls:
            actual = run_step(model, input_ids)
        assert calls.is_split()
        moe_ops_peft.disable(model)
        with MoeCalls() as calls:
            expected = run_step(model, input_ids)
        assert not calls.is_split(), "disable() did nothing"
        assert_same_step(actual, expected)
        outputs.append(actual[0])
    assert relative_error(outputs[0], outputs[1]) > 0.05
    assert relative_error(outputs[0], outputs[2]) > 0.05


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_split_and_its_own(copied, input_ids):
    model = split_model()
    expected = run_step(model, input_ids)
    twin = copied(model)
    assert moe_ops_peft.enable(twin) == moe_ops_peft.enable(model)
    with torch.no_grad():
        for wrapper in wrappers(model):
            wrapper.lora_B["default"].weight.zero_()
    with MoeCalls() as calls:
        actual = run_step(twin, input_ids)
    assert calls.is_split()
    assert_same_step(actual, expected)


def test_other_modules_keep_their_adapters(input_ids, caplog):
    """Linear layers and other parameters stay PEFT's, and the log says nothing about them."""
    targets = [*BOTH, "self_attn.q_proj.weight"]
    model = wrapped_model(targets=targets, target_modules=["v_proj"])
    expected = run_step(model, input_ids)
    with caplog.at_level(logging.WARNING, logger="moe_ops"):
        assert moe_ops_peft.enable(model) == [PREFIX]
    assert not caplog.records
    assert_same_step(run_step(model, input_ids), expected)


def test_one_expert(input_ids, monkeypatch):
    tiny = TINY_MODELS["qwen3_moe"]
    options = {**tiny.options, "num_experts": 1, "num_experts_per_tok": 1}
    monkeypatch.setitem(TINY_MODELS, "one", dataclasses.replace(tiny, options=options))
    model = wrapped_model("one")
    expected = run_step(model, input_ids)
    assert moe_ops_peft.enable(model) == [PREFIX]
    assert_same_step(run_step(model, input_ids), expected)


def test_every_code_block_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert has_only_python_blocks(PAGE)
    run_python_blocks(PAGE)

# SPDX-License-Identifier: Apache-2.0
"""The callbacks count what each layer's router chose, and Trainer logs it and learns from it."""

import math
from collections import Counter

import pytest
import torch
from transformers import Trainer, TrainingArguments

from moe_ops.integrations.load_balance import (
    LoadBalanceCallback,
    SelectionBiasCallback,
    TokenCounts,
)
from moe_ops.layers import Experts, MoE, Router
from moe_ops.layers.lora import LoraExperts
from testing.tiny_models import (
    BATCH,
    LENGTH,
    NUM_EXPERTS,
    TOP_K,
    VOCAB_SIZE,
    find_experts,
    make_model,
)


def make_input_ids(batch=BATCH):
    return torch.randint(3, VOCAB_SIZE, (batch, LENGTH))


def spied_ids(model):
    """Return a list that gets the ids of every call of the model's one experts module."""
    seen: list[list[int]] = []
    (experts,) = find_experts(model)
    experts.register_forward_pre_hook(lambda _, args: seen.append(args[1].flatten().tolist()))
    return seen


def counts_by_loops(calls):
    counts = Counter(expert for ids in calls for expert in ids)
    return [counts[expert] for expert in range(NUM_EXPERTS)]


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h"])
def test_counts_equal_loops(name):
    model = make_model(name)
    calls, token_counts = spied_ids(model), TokenCounts(model)
    ((module_name, counts),) = token_counts.counts.items()
    assert find_experts(model) == [model.get_submodule(module_name)]
    for _ in range(2):
        model(input_ids=make_input_ids(), use_cache=False)
    expected = counts_by_loops(calls)
    assert counts.tolist() == expected
    assert sum(expected) == 2 * BATCH * LENGTH * TOP_K
    model.eval()(input_ids=make_input_ids(), use_cache=False)
    assert counts.tolist() == expected, "evaluation was counted"
    token_counts.reset()
    token_counts.remove()
    model.train()(input_ids=make_input_ids(), use_cache=False)
    assert counts.tolist() == [0] * NUM_EXPERTS


@pytest.mark.parametrize("has_lora", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_counts_of_own_layers(by_name, has_lora):
    """Dropped ids are not counted. Arguments may be given by name."""
    experts = Experts(4, 8, 8)
    layer = MoE(Router(8, 4, 2), LoraExperts(experts, 2) if has_lora else experts)
    token_counts = TokenCounts(layer)
    ids, weights = torch.tensor([[0, -1], [4, 2], [2, 7]]), torch.ones(3, 2)
    if by_name:
        layer.experts(torch.zeros(3, 8), topk_weights=weights, topk_ids=ids)
    else:
        layer.experts(torch.zeros(3, 8), ids, weights)
    found = {name: counts.tolist() for name, counts in token_counts.counts.items()}
    assert found == {"experts": [1, 0, 2, 0]}


def test_counts_through_peft():
    """PEFT's wrappers may compute without calling the module inside, as moe_ops' own way does."""
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    from moe_ops.integrations.peft import enable

    model = make_model("qwen3_moe")
    model.set_experts_implementation("moe_ops")
    plain = TokenCounts(model)
    input_ids = make_input_ids()
    model(input_ids=input_ids, use_cache=False)
    (expected,) = (counts.tolist() for counts in plain.counts.values())
    plain.remove()
    config = peft.LoraConfig(
        r=2, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    wrapped = peft.get_peft_model(model, config).train()
    for enables in (False, True):
        if enables:
            assert enable(wrapped)
        token_counts = TokenCounts(wrapped)
        wrapped(input_ids=input_ids, use_cache=False)
        token_counts.remove()
        assert [counts.tolist() for counts in token_counts.counts.values()] == [expected]


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_counts_under_compile(is_checkpointed):
    model = make_model("qwen3_moe")
    model.set_experts_implementation("moe_ops")
    token_counts, input_ids = TokenCounts(model), make_input_ids()
    (counts,) = token_counts.counts.values()
    model(input_ids=input_ids, use_cache=False)
    expected = counts.tolist()
    token_counts.reset()
    if is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(input_ids=input_ids, use_cache=False).logits.sum().backward()
    times = sum(counts.tolist()) // sum(expected)
    assert counts.tolist() == [times * count for count in expected]
    assert times == 1 or is_checkpointed


def make_trainer(model, tmp_path, **options):
    """Train on batches of 2, whose routings differ, and report to nothing."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    rows = [{"input_ids": ids, "labels": ids} for ids in make_input_ids(16)]
    arguments = TrainingArguments(
        tmp_path,
        per_device_train_batch_size=2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2])


@pytest.mark.parametrize("experts_implementation", ["eager", "moe_ops"])
def test_trainer_logs_each_layer(tmp_path, experts_implementation):
    """Two optimizer steps of two batches each stand in each record. Evaluations do not."""
    model = make_model("qwen3_moe")
    model.set_experts_implementation(experts_implementation)
    trainer = make_trainer(
        model,
        tmp_path,
        max_steps=4,
        logging_steps=2,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=0.05,
    )
    calls = spied_ids(model)
    trainer.add_callback(LoadBalanceCallback(trainer))
    trainer.train()

    # Each optimizer step is two batches of training and one of evaluation.
    training = [ids for index, ids in enumerate(calls) if index % 3 < 2]
    history = trainer.state.log_history
    found = [record for record in history if any(key.startswith("moe_") for key in record)]
    assert len(found) == 2
    experts = "model.layers.0.mlp.experts"
    for index, record in enumerate(found):
        counts = counts_by_loops(training[4 * index : 4 * index + 4])
        assert sum(counts) == 4 * 2 * LENGTH * TOP_K
        shares = [count / sum(counts) for count in counts]
        expected = {
            f"moe_max_over_mean/{experts}": max(shares) * NUM_EXPERTS,
            f"moe_dead_experts/{experts}": shares.count(0),
            f"moe_entropy/{experts}": -sum(p * math.log(p) for p in shares if p),
        }
        assert {key: record[key] for key in record if "/" in key} == pytest.approx(expected)
        before = history[history.index(record) - 1]
        assert "loss" in before
        assert before["step"] == record["step"] == 2 * (index + 1)
    assert found[0] != found[1]
    number = len(find_experts(model)[0]._forward_pre_hooks)
    assert number == 1, "the callback's hook is still there"


def test_trainer_moves_the_selection_bias(tmp_path):
    """Each step moves each bias by the rate, away from what the step's two batches chose."""
    model = make_model("deepseek_v3")
    bias = model.model.layers[0].mlp.gate.e_score_correction_bias
    expected = bias.double().tolist()
    trainer = make_trainer(model, tmp_path, max_steps=3, gradient_accumulation_steps=2)
    calls = spied_ids(model)
    trainer.add_callback(SelectionBiasCallback(rate=0.25))
    trainer.train()
    assert len(calls) == 6
    for step in range(3):
        counts = counts_by_loops(calls[2 * step : 2 * step + 2])
        mean = sum(counts) / NUM_EXPERTS
        for expert, count in enumerate(counts):
            expected[expert] += 0.25 * ((count < mean) - (count > mean))
    assert bias.tolist() == pytest.approx(expected)
    assert model.model.layers[0].mlp.gate.e_score_correction_bias is bias


@pytest.mark.parametrize("kind", [LoadBalanceCallback, SelectionBiasCallback])
def test_a_training_after_one_that_an_exception_ended(kind, tmp_path):
    """transformers calls no on_train_end then; the next training ends both."""
    model = make_model("glm4_moe")
    trainer = make_trainer(model, tmp_path, max_steps=1)
    callback = kind(trainer) if kind is LoadBalanceCallback else kind(rate=1e-3)
    trainer.add_callback(callback)
    given = trainer.args, trainer.state, trainer.control
    (experts,) = find_experts(model)
    for _ in range(2):
        callback.on_train_begin(*given, model=model)
        assert len(experts._forward_pre_hooks) == 1
    callback.on_train_end(*given)
    assert not experts._forward_pre_hooks


def test_models_without_what_is_needed(tmp_path):
    with pytest.raises(ValueError, match="expected a model with experts modules, got none in Lin"):
        TokenCounts(torch.nn.Linear(2, 2))
    model = make_model("qwen3_moe")
    trainer = make_trainer(model, tmp_path, max_steps=1)
    trainer.add_callback(SelectionBiasCallback(rate=1e-3))
    with pytest.raises(ValueError, match="e_score_correction_bias, got none in Qwen3MoeForC"):
        trainer.train()
    assert not find_experts(model)[0]._forward_pre_hooks

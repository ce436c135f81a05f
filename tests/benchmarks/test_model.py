# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a whole model: its flow on a CPU, and what it does with wrong gradients."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("transformers")

import moe_ops.integrations.transformers
from benchmarks.cuda import model
from benchmarks.cuda.experts import MIB
from benchmarks.cuda.model import GROUPED_MM, First
from benchmarks.cuda.timing import OURS, Bench

BATCH = model.TINY_BATCHES[0]


class Bf16Bench(Bench):
    """torch compiles grouped_mm in bf16 alone."""

    dtype = torch.bfloat16


def bench(kind=Bench, device="cpu"):
    return kind(torch.device(device), tiny=True, seconds=0.0, least_turns=2)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_both_models_are_right(checkpoints):
    torch.manual_seed(0)
    (record,) = model.run_model(bench(), BATCH, checkpoints)
    json.dumps(record, allow_nan=False)
    assert "wrong" not in record, record
    assert "failed" not in record, record
    assert record["checkpoints"] is checkpoints
    assert record["tokens"] == 16
    assert record["length"] == 8
    for key in ("errors", "loss_errors", "milliseconds", "tokens_per_second", "first_step_seconds"):
        assert set(record[key]) == {OURS, GROUPED_MM}
    assert set(record["ratio"]) == {GROUPED_MM}
    assert record["peak_mib"] == {OURS: None, GROUPED_MM: None}


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [False, True])
def test_both_models_compile_in_one_graph(checkpoints):
    torch.manual_seed(0)
    (record,) = model.run_model(bench(Bf16Bench), BATCH, checkpoints, "aot_eager")
    assert "wrong" not in record, record
    assert "failed" not in record, record


def implementation_of(made: Any) -> str:
    name: str = made.config._experts_implementation
    return name


def test_variants_share_their_parameters_and_nothing_else():
    made = model.make_model(bench())
    ours = model.variant(made, "moe_ops", checkpoints=True)
    assert list(map(id, ours.parameters())) == list(map(id, made.parameters()))
    assert implementation_of(ours) == "moe_ops"
    assert implementation_of(made) == GROUPED_MM
    assert ours.is_gradient_checkpointing
    assert not made.is_gradient_checkpointing
    experts = [type(m) for m in ours.modules() if hasattr(m, "gate_up_proj")]
    assert len(experts) == 2


def test_the_reference_leaves_the_model_as_it_is():
    made = model.make_model(bench())
    tokens = torch.randint(model.TINY_VOCABULARY, BATCH)
    _, gradients = model.in_fp32(made, tokens)
    assert {name for name, _ in made.named_parameters()} == gradients.keys()
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float16}
    assert all(parameter.grad is None for parameter in made.parameters())
    assert implementation_of(made) == GROUPED_MM


def test_distance():
    expected = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    assert model.distance(expected, expected) == 0
    assert model.distance({**expected, "b": torch.tensor([3.0])}, expected) == pytest.approx(0.2)
    assert model.distance({"a": expected["a"]}, expected) == math.inf
    assert math.isnan(model.distance({**expected, "b": torch.tensor([math.nan])}, expected))


RIGHT = First(seconds=1.0, error=0.1, loss=1e-4)


@pytest.mark.parametrize(
    ("ours", "theirs", "wrong"),
    [
        (RIGHT, RIGHT, set()),
        (replace(RIGHT, error=0.12), RIGHT, set()),
        (replace(RIGHT, error=0.13), RIGHT, {OURS}),
        (replace(RIGHT, error=math.nan), RIGHT, {OURS}),
        (replace(RIGHT, loss=0.01), RIGHT, {OURS}),
        (replace(RIGHT, loss=math.nan), RIGHT, {OURS}),
        (RIGHT, replace(RIGHT, error=math.inf), {GROUPED_MM}),
        (replace(RIGHT, error=0.55), replace(RIGHT, error=0.45), {OURS}),
        (RIGHT, replace(RIGHT, error=math.nan), {OURS, GROUPED_MM}),
    ],
)
def test_what_is_right(ours, theirs, wrong):
    found = model.verdicts({GROUPED_MM: theirs, OURS: ours})
    assert {who for who, error in found.items() if not error <= 0.01} == wrong


def test_wrong_gradients_are_not_timed(monkeypatch):
    original = moe_ops.fused_experts

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    monkeypatch.setattr(
        moe_ops.integrations.transformers,
        "fused_experts",
        lambda hidden_states, up, *args, **kwargs: original(
            hidden_states, Spoil.apply(up), *args, **kwargs
        ),
    )
    torch.manual_seed(0)
    (record,) = model.run_model(bench(), BATCH, checkpoints=False)
    assert record["wrong"] == [OURS]
    assert set(record["milliseconds"]) == {GROUPED_MM}
    assert record["ratio"] == {}


def test_a_failure_is_told_and_the_other_is_timed(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(moe_ops.integrations.transformers, "fused_experts", fail)
    (record,) = model.run_model(bench(), BATCH, checkpoints=False)
    json.dumps(record, allow_nan=False)
    assert record["failed"] == {OURS: "RuntimeError: no such kernel"}
    assert set(record["milliseconds"]) == {GROUPED_MM}
    assert record["ratio"] == {}


def test_the_peak_has_the_parameters_and_not_what_else_is_there(monkeypatch):
    """Against an allocator that holds 100 MiB before the step and 130 at most."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100 * MIB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 130 * MIB)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    layer = torch.nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16)
    step = model.Step(layer, layer, torch.zeros(1))
    monkeypatch.setattr(model.Step, "__call__", lambda self: None)
    assert model.peak_memory(bench(device="cuda"), step) == 32


def test_without_transformers_there_is_nothing_to_measure(monkeypatch):
    monkeypatch.setattr(model, "HAS_TRANSFORMERS", False)
    assert list(model.cases(bench(), [])) == []
    assert "not installed" in model.facts()["model"]

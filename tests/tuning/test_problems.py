# SPDX-License-Identifier: Apache-2.0
"""The experts of a model are found, and so are the problems of their GEMMs."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from moe_ops import layers
from moe_ops.configs.problem import fused_operands
from moe_ops.layers.lora import LoraExperts
from moe_ops.tuning import Experts, find_experts, tasks_of
from testing.problem_keys import make_problem
from testing.tuning_fakes import HOPPER


class Layer(nn.Module):
    """Has experts as transformers does, beside their router."""

    def __init__(self, up, down, up_name="gate_up_proj", top_k=None, dtype=torch.bfloat16, **says):
        super().__init__()
        self.experts = nn.Module()
        self.experts.register_parameter(up_name, nn.Parameter(torch.empty(up, dtype=dtype)))
        self.experts.down_proj = nn.Parameter(torch.empty(down, dtype=dtype))
        for name, value in says.items():
            setattr(self.experts, name, value)
        self.router = nn.Module()
        if top_k is not None:
            self.router.top_k = top_k


UP, DOWN = (4, 48, 16), (4, 16, 24)
UP_T, DOWN_T = (4, 16, 48), (4, 24, 16)
EXPERTS = Experts(4, 2, (48, 16), (16, 24), torch.bfloat16)


def test_equal_layers_once():
    model = nn.ModuleList([Layer(UP, DOWN, top_k=2), Layer(UP, DOWN, top_k=2), nn.Linear(2, 2)])
    assert find_experts(model) == [EXPERTS]
    model.append(Layer(UP, DOWN, top_k=1))
    assert [layer.top_k for layer in find_experts(model)] == [2, 1]


@pytest.mark.parametrize("says", [{"is_transposed": True}, {}], ids=str)
def test_transposed(says):
    bias = torch.zeros(4, 16)
    (layer,) = find_experts(Layer(UP_T, DOWN_T, top_k=2, down_proj_bias=bias, **says))
    assert layer == Experts(4, 2, (48, 16), (16, 24), torch.bfloat16, True, True)


def test_what_it_says_is_believed():
    """The shape of a square weight does not tell whether it is transposed."""
    square = (4, 16, 16)
    for transposed in (True, False):
        (layer,) = find_experts(Layer(square, square, top_k=2, is_transposed=transposed))
        assert layer.transposed is transposed


def test_ungated():
    (layer,) = find_experts(Layer((4, 24, 16), DOWN, up_name="up_proj", top_k=2))
    assert layer.up == (24, 16)


def test_given_dtype_and_top_k():
    (layer,) = find_experts(Layer(UP, DOWN), dtype=torch.float16, top_k=3)
    assert (layer.dtype, layer.top_k) == (torch.float16, 3)


def test_top_k_of_the_config():
    model = Layer(UP, DOWN)
    model.config = type("Config", (), {"num_experts_per_tok": 5})()
    assert find_experts(model)[0].top_k == 5


def test_rejects_a_model_without_experts():
    with pytest.raises(ValueError, match=r"expected a model with experts .*, got Linear without"):
        find_experts(nn.Linear(2, 2))


def test_rejects_a_model_without_top_k():
    with pytest.raises(ValueError, match="expected top_k to be given"):
        find_experts(Layer(UP, DOWN))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_rejects_dtypes(dtype):
    layer = Experts(4, 2, (48, 16), (16, 24), dtype)
    with pytest.raises(ValueError, match=f"expected a dtype of bfloat16, .*, got {dtype}"):
        tasks_of([layer], [1])


def test_rejects_no_tokens():
    with pytest.raises(ValueError, match="expected num_tokens >= 1, got 0"):
        tasks_of([EXPERTS], [4, 0])


def test_problems():
    found = {task.problem: task for task in tasks_of([EXPERTS], [40])}
    expected = [
        ("forward", (48, 16), ("gather", "gated")), ("forward", (16, 24), ()),
        ("backward_dX", (16, 24), ()), ("backward_dX", (48, 16), ()),
        ("backward_dW", (16, 24), ()), ("backward_dW", (48, 16), ()),
    ]  # fmt: skip
    # 4 experts have 80 rows, 20 each, which counts as 32.
    assert set(found) == {
        make_problem(kind, "bfloat16", 4, *sizes, 32, flags) for kind, sizes, flags in expected
    }
    assert {(task.num_rows, task.top_k) for task in found.values()} == {(80, 2)}


def test_problems_of_hopper_alone():
    """Its kernel does the activation's backward after dX, for gated experts in 16 bits."""
    plain = {task.problem for task in tasks_of([EXPERTS], [40])}
    more = {task.problem for task in tasks_of([EXPERTS], [40], device=HOPPER)} - plain
    assert more == {make_problem("backward_dX", "bfloat16", 4, 16, 24, 32, ("gated",))}
    ungated = replace(EXPERTS, up=(24, 16))
    blackwell = replace(HOPPER, capability=(10, 0))
    for layer, device in (
        (replace(EXPERTS, dtype=torch.float32), HOPPER), (ungated, HOPPER), (EXPERTS, blackwell),
    ):  # fmt: skip
        assert tasks_of([layer], [40], device=device) == tasks_of([layer], [40])


def test_a_bucket_once():
    tasks = tasks_of([EXPERTS, EXPERTS], [40, 64, 33])
    assert len(tasks) == len(tasks_of([EXPERTS], [40])) == 6
    assert {task.num_rows for task in tasks} == {128}


# These run in a process of their own, as the interpreter is chosen before Triton is imported.
RECORDER = """
import sys, torch
from moe_ops._triton import gemm, plan as planning, weight_gradient
from moe_ops.tuning import find_experts, tasks_of

launched = set()
plan = planning.plan
planning.plan = lambda problem, *rest: launched.add(problem.key) or plan(problem, *rest)
gemm.plan_once = weight_gradient.plan_once = planning.plan_once.__wrapped__  # asked each time

def compare(name, model, num_tokens):
    expected = {task.problem.key for task in tasks_of(find_experts(model), [num_tokens])}
    assert launched == expected, (name, launched ^ expected)
    print(name, len(launched))
    launched.clear()
"""
OF_MODELS = """
import moe_ops.integrations.transformers
from moe_ops.integrations.llama4 import replace_llama4_moe_
from testing import tiny_models

moe_ops.integrations.transformers.register()
# Its experts do not go through the interface.
sizes = {"num_local_experts": 4, "intermediate_size": 24, "interleave_moe_layer_step": 1}
llama4 = tiny_models.TinyModel("Llama4ForCausalLM", "Llama4TextConfig", sizes)
for name in sys.argv[1:]:
    model = tiny_models.make_model(llama4 if name == "llama4" else name)
    if name == "llama4":
        replace_llama4_moe_(model)
    else:
        model.set_experts_implementation("moe_ops")
    tiny_models.run_step(model, torch.randint(3, 48, (1, 5)))
    compare(name, model, 5)
"""
OF_LAYERS = """
from moe_ops.layers import Experts, MoE, Router

options = {
    "plain": {}, "bias": {"bias": True}, "ungated": {"gated": False},
    "weights_before": {"weights_before": True},
}
for name in sys.argv[1:]:
    model = MoE(Router(16, 4, 2), Experts(4, 16, 24, **options[name]))
    model(torch.randn(5, 16, requires_grad=True))[0].square().mean().backward()
    compare(name, model, 5)
"""


def run_recorded(script, *names):
    """Run it on Triton's interpreter, and see that it came to the end of each name."""
    done = subprocess.run(
        [sys.executable, "-c", RECORDER + script, *names],
        env={**os.environ, "TRITON_INTERPRET": "1", "MOE_OPS_IMPLEMENTATION": "triton"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(names)


@pytest.mark.slow
def test_problems_are_those_of_the_launches():
    """A step of a real model looks up just these keys."""
    pytest.importorskip("triton")
    pytest.importorskip("transformers")
    run_recorded(OF_MODELS, "qwen3_moe", "gpt_oss", "nemotron_h", "llama4")


def test_problems_of_layers_are_those_of_the_launches():
    pytest.importorskip("triton")
    run_recorded(OF_LAYERS, "plain", "bias", "ungated", "weights_before")


def test_of_two_layers_the_larger_number_of_rows_counts():
    # 33 and 44 rows an expert count as 64.
    layers = [replace(EXPERTS, top_k=4), replace(EXPERTS, top_k=3)]
    for given in (layers, layers[::-1]):
        tasks = tasks_of(given, iter([44]))
        assert {task.num_rows for task in tasks} == {176}


def test_problems_of_an_ungated_layer():
    layer = Experts(4, 2, (24, 16), (16, 24), torch.bfloat16, has_bias=True, transposed=True)
    problem = tasks_of([layer], [40])[0].problem
    assert problem.flags == ("gather", "bias", "transposed", "activated")


@pytest.mark.parametrize("moved", [False, True])
def test_rows_that_are_moved_lie_where_tma_can_load_them(moved):
    layer = replace(EXPERTS, up=(48, 15), down=(15, 24), weights_before=moved)
    problem = tasks_of([layer], [40])[0].problem
    assert fused_operands("up", problem).x is moved


def test_router_of_experts_with_adapters():
    """The adapters' module stands between the experts and the one that holds their router."""
    experts = LoraExperts(layers.Experts(4, 16, 24), rank=2)
    (layer,) = find_experts(layers.MoE(layers.Router(16, 4, 3), experts))
    assert layer == Experts(4, 3, (48, 16), (16, 24), torch.float32)


def test_problems_of_separate_ops():
    plain = {task.problem for task in tasks_of([EXPERTS], [40])}
    more = {task.problem for task in tasks_of([EXPERTS], [40], separate_ops=True)} - plain
    assert {(p.kind, p.out_features, p.flags) for p in more} == {
        ("forward", 48, ("gather",)),
        ("backward_dX", 48, ("scatter",)),
        ("forward", 16, ("scatter", "scale")),
        ("backward_dX", 16, ("gather", "scale", "dots")),
    }

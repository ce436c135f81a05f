# SPDX-License-Identifier: Apache-2.0
"""A kernel that somebody else registers over ours is called. When it is gone, ours is."""

import ast
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moe_ops
from moe_ops._core.library import SCHEMAS
from testing.strategies import seeded_sample

# For each op, the argument whose gradient the tests take.
DIFFERENTIABLE = {
    "permute": "input", "unpermute": "input", "grouped_gemm": "input", "topk_routing": "logits",
}  # fmt: skip
WAYS = {
    "torch.ops.moe": lambda name: getattr(torch.ops.moe, name),
    "the overload": lambda name: getattr(torch.ops.moe, name).default,
    "moe_ops": lambda name: getattr(moe_ops, name),
}
pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")


@contextlib.contextmanager
def registered_over(name: str, key: str = "CPU") -> Iterator[list[str]]:
    """Register a kernel that gives what ours gives plus one, and yield the names of its calls."""
    calls: list[str] = []
    ours = torch.library.get_kernel(f"moe::{name}", key)
    keyset = torch.DispatchKeySet(getattr(torch.DispatchKey, key))

    def foreign(*args):
        calls.append(name)
        outputs = ours.call_boxed(keyset, *args)
        if isinstance(outputs, (list, tuple)):
            first, *others = outputs
            return (first + 1, *others)
        return outputs + 1

    with torch.library._scoped_library("moe", "IMPL") as library:
        library.impl(name, foreign, key, allow_override=True)
        yield calls


def sample_of(name, **changes):
    sample = seeded_sample(SCHEMAS[name], 0, T=5, dtype=torch.float32)
    return {**sample.arguments, **changes}


def first(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["grad mode", "no_grad", "inference_mode"])
@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "routing_indices", "fused_experts"])
def test_is_called_without_a_gradient(name, mode, way):
    call, args = WAYS[way](name), sample_of(name).values()
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with modes.get(mode, contextlib.nullcontext)():
        before = first(call(*args))
        with registered_over(name) as calls:
            assert torch.equal(first(call(*args)), before + 1)
        assert calls == [name]
        assert torch.equal(first(call(*args)), before), "ours serves again"
    assert calls == [name]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_is_called_with_a_gradient(name, way):
    """The gradient is still computed by our formula."""
    call, arguments = WAYS[way](name), sample_of(name)
    leaf = arguments[DIFFERENTIABLE[name]].detach().requires_grad_()
    arguments[DIFFERENTIABLE[name]] = leaf
    before = first(call(*arguments.values()))
    tangent = torch.randn_like(before)
    (want,) = torch.autograd.grad(before, leaf, tangent)
    with registered_over(name) as calls:
        output = first(call(*arguments.values()))
        assert calls == [name]
        assert torch.equal(output, before + 1)
        (grad,) = torch.autograd.grad(output, leaf, tangent)
    assert torch.equal(grad, want)
    assert torch.equal(first(call(*arguments.values())), before), "ours serves again"
    assert calls == [name]


@pytest.mark.parametrize("way", WAYS)
def test_fused_experts_forward_runs_where_a_gradient_is_recorded(way):
    """So register over it too: fused_experts has no output for what the backward needs."""
    call, arguments = WAYS[way]("fused_experts"), sample_of("fused_experts")
    without = call(*arguments.values())
    arguments["hidden_states"].requires_grad_()
    before = call(*arguments.values())
    with registered_over("fused_experts_forward") as calls:
        output = call(*arguments.values())
        assert torch.equal(output, before + 1)
        assert calls == ["fused_experts_forward"]
        output.sum().backward()
        with torch.no_grad():
            assert torch.equal(call(*arguments.values()), without)
    assert calls == ["fused_experts_forward"]
    with registered_over("fused_experts") as calls:
        assert torch.equal(call(*arguments.values()), before)
        assert calls == []
        with torch.no_grad():
            assert torch.equal(call(*arguments.values()), without + 1)
    assert calls == ["fused_experts"]


def test_a_backward_op_is_called_in_the_backward():
    arguments = sample_of("grouped_gemm")
    leaf = arguments["input"].detach().requires_grad_()
    output = moe_ops.grouped_gemm(leaf, *list(arguments.values())[1:])
    (want,) = torch.autograd.grad(output.sum(), leaf, retain_graph=True)
    with registered_over("grouped_gemm_dx") as calls:
        (grad,) = torch.autograd.grad(output.sum(), leaf)
    assert calls == ["grouped_gemm_dx"]
    assert torch.equal(grad, want + 1)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("grad_mode", [False, True])
def test_it_runs_below_autograd(grad_mode, requires_grad):
    """As with any device's kernel, what it computes with tensors of its own records nothing."""
    x, gather, top_k, *_ = sample_of("permute").values()
    x = x.detach().requires_grad_(requires_grad)
    scale = torch.ones((), requires_grad=True)

    def foreign(input, gather_indices, top_k, scatter_indices=None):
        return input.new_ones(gather_indices.shape[0], input.shape[1]) * scale

    with torch.library._scoped_library("moe", "IMPL") as library:
        library.impl("permute", foreign, "CPU", allow_override=True)
        with torch.set_grad_enabled(grad_mode):
            output = moe_ops.permute(x, gather, top_k)
    assert torch.equal(output, torch.ones_like(output))
    assert output.requires_grad == (grad_mode and requires_grad)


def test_it_is_called_below_a_mode():
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    args = sample_of("permute").values()
    before = moe_ops.permute(*args)
    with registered_over("permute") as calls, Seen():
        output = moe_ops.permute(*args)
    assert names.count("moe::permute") == 1
    assert calls == ["permute"]
    assert torch.equal(output, before + 1)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_it_is_called_by_compiled_code(requires_grad):
    """The graph names the op, not our kernel."""
    x, gather, top_k, *_ = sample_of("permute").values()
    x = x.detach().requires_grad_(requires_grad)
    compiled = torch.compile(moe_ops.permute, fullgraph=True, backend="aot_eager")
    before = compiled(x, gather, top_k)
    with registered_over("permute") as calls:
        assert torch.equal(compiled(x, gather, top_k), before + 1)
    assert calls == ["permute"]


def test_it_is_called_under_autocast():
    arguments = sample_of("grouped_gemm")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = moe_ops.grouped_gemm(*arguments.values())
        with registered_over("grouped_gemm") as calls:
            output = moe_ops.grouped_gemm(*arguments.values())
    assert calls == ["grouped_gemm"]
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, before + 1)


def test_private_torch_names_stand_in_one_file():
    core = Path(moe_ops.__file__).parent / "_core"
    found = set()
    for file in core.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                text = ast.unparse(node)
                if re.match(r"(torch|forward_ad)\b.*\._", text):
                    found.add(file.name)
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            if any(re.match(r"torch\b.*\._", name) for name in names):
                found.add(file.name)
    assert found == {"torch_private.py"}

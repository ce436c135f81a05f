# SPDX-License-Identifier: Apache-2.0
"""Configurations with Unsloth's names and fields reach the ops."""

import copy
import dataclasses
import inspect
import pickle
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import moe_ops
from moe_ops.compat import grouped_gemm, kernel_string
from moe_ops.compat.kernels import tuning
from moe_ops.compat.kernels.tuning import KernelConfigBackward_dX, KernelConfigForward
from testing.compat_problem import problem
from testing.recorders import MoeOps

CONFIGS: dict[str, Any] = {
    "kernel_config_fwd": KernelConfigForward(BLOCK_M=128, BLOCK_N=64, BLOCK_K=32),
    "kernel_config_bwd_dX": KernelConfigBackward_dX(
        BLOCK_SIZE_N=32, flatten=False, tail_tiles=True, permute_y=True, fuse_mul_post=True
    ),
    # This class is moe_ops' own. The others have Unsloth's names.
    "kernel_config_bwd_dW": moe_ops.KernelConfigBackward_dW(
        BLOCK_K=16, group_m=3, use_tma_load_x=True
    ),
}
PASSES = {
    "kernel_config_fwd": "forward",
    "kernel_config_bwd_dX": "backward_dX",
    "kernel_config_bwd_dW": "backward_dW",
}
over_given = pytest.mark.parametrize(
    "given", [list(CONFIGS), *([name] for name in CONFIGS), list(CONFIGS)[1:], []], ids=" ".join
)


def expected_string(given: dict[str, Any]) -> str | None:
    named = {PASSES[name]: config for name, config in given.items()}
    return moe_ops.kernel_config(**named) if named else None


def string_of(args) -> str | None:
    """Return an op's last argument. The dispatcher leaves it out where it is None, its default."""
    return args[-1] if isinstance(args[-1], str) else None


def leaves():
    call = problem().call(permute_x=False, permute_y=True, weighted=True)
    for name in ("X", "W", "topk_weights"):
        call[name].requires_grad_()
    return call


NAMES = ("KernelConfigForward", "KernelConfigBackward_dX", "KernelConfigBackward_dW")
DEAD = {"permute_x": True, "permute_y": False, "fuse_mul_post": True}
over_names = pytest.mark.parametrize("name", NAMES)


@over_names
def test_each_is_the_one_of_moe_ops_with_more_fields(name):
    kind, core = getattr(tuning, name), getattr(moe_ops, name)
    assert isinstance(kind(), core)
    mine, expected = (inspect.signature(c).parameters.values() for c in (kind, core))
    positional = [p for p in mine if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == list(expected)
    assert [p.name for p in mine if p.kind is p.KEYWORD_ONLY] == list(DEAD)
    assert kind().to_dict() == {**core().to_dict(), **dict.fromkeys(DEAD, False)}


@over_names
def test_aliases(name):
    kind: Any = getattr(tuning, name)
    sizes = {"BLOCK_SIZE_M": 32, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 16}
    assert kind.from_dict(sizes) == kind(BLOCK_M=32, BLOCK_N=64, BLOCK_K=16)
    with pytest.raises(ValueError, match=f"^{name}: BLOCK_M is given twice, once as BLOCK_SIZE_M$"):
        kind.from_dict({"BLOCK_M": 32, "BLOCK_SIZE_M": 32})
    with pytest.raises(ValueError, match=f"^{name}: unknown field 'BLOCK_SIZE'$"):
        kind.from_dict({"BLOCK_SIZE": 32})
    with pytest.raises(TypeError, match=f"^{name}: expected a dict of fields, got 3"):
        kind.from_dict(3)


@over_names
def test_aliases_of_the_constructor(name):
    kind: Any = getattr(tuning, name)
    config = kind(BLOCK_SIZE_M=32, BLOCK_N=64, BLOCK_SIZE_K=16)
    assert config == kind(BLOCK_M=32, BLOCK_N=64, BLOCK_K=16)
    assert (config.BLOCK_SIZE_M, config.BLOCK_SIZE_N, config.BLOCK_SIZE_K) == (32, 64, 16)
    assert repr(config) == repr(kind(32, 64, 16))
    assert kind.from_dict(config.to_dict()) == config
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config
    smaller = dataclasses.replace(config, BLOCK_M=16)
    assert (smaller.BLOCK_SIZE_M, config.BLOCK_SIZE_M) == (16, 32)
    # It does not matter which values: BLOCK_M's default counts as given too.
    for args, other in (((), {"BLOCK_M": 128}), ((32,), {}), ((), {"BLOCK_M": 32})):
        expected = rf"^{kind.__name__}: BLOCK_M is given twice, once as BLOCK_SIZE_M$"
        with pytest.raises(ValueError, match=expected):
            kind(*args, **other, BLOCK_SIZE_M=32)
    with pytest.raises(ValueError, match=r"BLOCK_K to be a power of two .* got 24"):
        kind(BLOCK_SIZE_K=24)
    with pytest.raises(TypeError, match=r"BLOCK_N of type int, got 64\.0 \(float\)"):
        kind(BLOCK_SIZE_N=64.0)


@over_names
def test_dead_fields_are_kept_and_change_nothing(name):
    kind: Any = getattr(tuning, name)
    core: Any = getattr(moe_ops, name)
    config = kind(**DEAD, num_stages=2)
    assert {field: getattr(config, field) for field in DEAD} == DEAD
    assert config != kind(num_stages=2)
    assert kind.from_dict(config.to_dict()) == config
    argument = dict(zip(NAMES, PASSES.values(), strict=True))[name]
    expected = moe_ops.kernel_config(**{argument: core(num_stages=2)})
    assert moe_ops.kernel_config(**{argument: config}) == expected
    with pytest.raises(TypeError, match=f"^{name}: expected permute_x of type bool, got 1"):
        kind(permute_x=1)


@over_given
def test_they_reach_every_op(given):
    configs = {name: CONFIGS[name] for name in given}
    with MoeOps() as ops:
        grouped_gemm(**leaves(), **configs).sum().backward()
    found = {name: string_of(args) for name, args in ops.calls}
    text = expected_string(configs)
    assert found == {"grouped_gemm": text, "grouped_gemm_dx": text, "grouped_gemm_dw": text}


def test_the_string_is_made_once(monkeypatch):
    made = []

    def counting(*configs):
        made.append(configs)
        return moe_ops.kernel_config(*configs)

    monkeypatch.setattr(kernel_string, "kernel_config", counting)
    kernel_string._cached_string.cache_clear()
    call = leaves()
    for _ in range(3):
        # It is equal, and another object each time.
        grouped_gemm(**call, kernel_config_fwd=KernelConfigForward(BLOCK_M=32))
    assert made == [(moe_ops.KernelConfigForward(BLOCK_M=32), None, None)]


class Graphs:
    """Compiles nothing, and keeps the kernel_config of each moe op in the graphs it gets."""

    def __init__(self) -> None:
        self.found: list[dict[str, str | None]] = []
        self.backend = aot_autograd(fw_compiler=self._record, bw_compiler=self._record)

    def _record(self, module: torch.fx.GraphModule, example_inputs: Any) -> Any:
        arguments = {
            str(node.target).removeprefix("moe.").removesuffix(".default"): string_of(node.args)
            for node in module.graph.nodes
            if str(node.target).startswith("moe.")
        }
        self.found.append(arguments)
        return make_boxed_func(module)


@over_given
def test_they_compile_and_reach_every_op_of_the_graphs(given):
    configs = {name: CONFIGS[name] for name in given}
    graphs, call = Graphs(), leaves()
    eager = torch.autograd.grad(grouped_gemm(**call, **configs).sum(), [call["X"], call["W"]])
    compiled = torch.compile(grouped_gemm, fullgraph=True, backend=graphs.backend)
    found = torch.autograd.grad(compiled(**call, **configs).sum(), [call["X"], call["W"]])
    for got, want in zip(found, eager, strict=True):
        assert torch.equal(got, want)
    text = expected_string(configs)
    forward, backward = graphs.found
    assert forward == {"grouped_gemm": text}
    assert backward == {"grouped_gemm_dx": text, "grouped_gemm_dw": text}


def test_compiled_code_follows_the_configuration():
    """Another value compiles again, with that value. An equal configuration does not."""
    graphs, call = Graphs(), problem().call(False, permute_y=False, weighted=False)
    compiled = torch.compile(grouped_gemm, fullgraph=True, backend=graphs.backend)
    # Integers change and come back: Dynamo must not make a symbol of one that changes.
    for block in (64, 64, 32, 16, 128, 16):
        compiled(**call, kernel_config_fwd=KernelConfigForward(BLOCK_M=block))
    texts = [
        expected_string({"kernel_config_fwd": KernelConfigForward(BLOCK_M=block)})
        for block in (64, 32, 16, 128)
    ]
    assert graphs.found == [{"grouped_gemm": text} for text in texts]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (moe_ops.KernelConfigForward, {"BLOCK_M": 16}),
        (KernelConfigForward, {"BLOCK_M": 16}),
        (KernelConfigForward, {"BLOCK_SIZE_M": 16, "permute_x": True}),
    ],
    ids=["moe_ops", "compat", "aliases"],
)
def test_a_configuration_made_in_compiled_code(kind, fields):
    graphs, call = Graphs(), problem().call(False, permute_y=False, weighted=False)

    @torch.compile(fullgraph=True, backend=graphs.backend)
    def function(call):
        config = kind(num_stages=2, use_tma_load_w=True, **fields)
        return grouped_gemm(**call, kernel_config_fwd=config)

    function(call)
    config = moe_ops.KernelConfigForward(BLOCK_M=16, num_stages=2, use_tma_load_w=True)
    assert graphs.found == [{"grouped_gemm": expected_string({"kernel_config_fwd": config})}]


def test_an_exported_program_keeps_the_configuration():
    call = problem().call(permute_x=False, permute_y=True, weighted=True)

    class Projection(torch.nn.Module):
        def forward(self, X, W):
            return grouped_gemm(**{**call, "X": X, "W": W}, **CONFIGS)

    exported = torch.export.export(Projection(), (call["X"], call["W"]))
    (text,) = (
        node.args[-1] for node in exported.graph.nodes if str(node.target).startswith("moe.")
    )
    assert text == expected_string(CONFIGS)
    assert torch.equal(exported.module()(call["X"], call["W"]), grouped_gemm(**call))

# SPDX-License-Identifier: Apache-2.0
"""Configurations are checked, written as one string, and read from it by the ops."""

import dataclasses
import json
import re
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moe_ops
from moe_ops.configs.kernel_config import (
    PASSES,
    KernelConfig,
    KernelConfigBackward_dW,
    KernelConfigBackward_dX,
    KernelConfigForward,
)
from moe_ops.configs.kernel_string import kernel_config, parse
from testing import checks

moe = torch.ops.moe
FORWARD = KernelConfigForward(BLOCK_M=64, BLOCK_N=32, num_stages=2, use_tma_load_x=True)
BACKWARD_DX = KernelConfigBackward_dX(flatten=False, tail_tiles=True)
BACKWARD_DW = KernelConfigBackward_dW(group_m=3, use_tma_store=True, epilogue_subtile=2)
TEXT = kernel_config(FORWARD, BACKWARD_DX, BACKWARD_DW)

passes = pytest.mark.parametrize("name", PASSES)


def test_round_trip():
    expected = {"forward": FORWARD, "backward_dX": BACKWARD_DX, "backward_dW": BACKWARD_DW}
    assert parse(TEXT) == expected
    assert parse(kernel_config(backward_dW=BACKWARD_DW)) == {"backward_dW": BACKWARD_DW}
    assert parse(kernel_config()) == {}
    for config in expected.values():
        assert type(config).from_dict(config.to_dict()) == config
        assert type(config).from_dict({}) == type(config)()


def configs(name: str) -> st.SearchStrategy[KernelConfig]:
    block = st.sampled_from([16, 32, 64, 128, 256])
    drawn: dict[str, st.SearchStrategy[Any]] = {
        "num_warps": st.sampled_from([1, 2, 4, 8, 16]),
        "num_stages": st.integers(1, 8),
        "group_m": st.integers(1, 2**31),
        "epilogue_subtile": st.sampled_from([1, 2]),
        "launch_pdl": st.booleans(),
        "programs_per_sm": st.integers(1, 32),
        **{f"BLOCK_{letter}": block for letter in "MNK"},
    }
    specialized: dict[str, Any] = {
        "num_warps": 8, "num_stages": 2, "programs_per_sm": 1, "launch_pdl": False,
        "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128,
    }  # fmt: skip
    declared = {f.name: drawn.get(f.name, st.booleans()) for f in fields(PASSES[name])}

    def is_valid(values: dict[str, Any]) -> bool:
        return not values.get("tail_tiles") or (not values["flatten"] and values["BLOCK_M"] >= 32)

    def made(values: dict[str, Any]) -> KernelConfig:
        if values["warp_specialize"]:
            values = values | specialized | dict.fromkeys(use_tma, True)
            values |= {"tail_tiles": False} if "tail_tiles" in values else {}
        return PASSES[name](**values)

    use_tma = [field for field in declared if field.startswith("use_tma_")]
    return st.fixed_dictionaries(declared).filter(is_valid).map(made)


@given(st.fixed_dictionaries({}, optional={name: configs(name) for name in PASSES}))
def test_any_configuration_survives_the_string(given_configs):
    assert parse(kernel_config(**given_configs)) == given_configs


RETIRED = dict.fromkeys(("permute_x", "permute_y", "fuse_mul_post"), True)


@passes
def test_a_string_may_hold_retired_flags(name):
    """Old exported programs have strings from when configurations had these flags."""
    values = {"num_stages": 2, **RETIRED}
    assert parse(json.dumps({name: values})) == {name: PASSES[name](num_stages=2)}
    assert RETIRED.keys().isdisjoint(PASSES[name]().to_dict())
    with pytest.raises(ValueError, match=f"{PASSES[name].__name__}: unknown field 'permute_x'"):
        parse(json.dumps({name: {"permute_x": 1}}))


@passes
@pytest.mark.parametrize("field", ["BLOCK_SIZE_M", *RETIRED])
def test_has_no_field_of_unsloth(name, field):
    """Unsloth's fields are in moe_ops.compat.kernels.tuning."""
    kind: Any = PASSES[name]
    with pytest.raises(TypeError, match=field):
        kind(**{field: True})
    with pytest.raises(ValueError, match=f"{kind.__name__}: unknown field '{field}'"):
        kind.from_dict({field: True})
    assert not hasattr(kind(), field)


INVALID = [
    *[
        ({f"BLOCK_{letter}": size}, ValueError, f"BLOCK_{letter} to be a power of two from 16 to 256")
        for letter, size in zip("MNKMN", [8, 24, 512, 0, -16], strict=True)
    ],
    ({"num_warps": 3}, ValueError, "num_warps in (1, 2, 4, 8, 16), got 3"),
    ({"num_warps": 32}, ValueError, "num_warps in (1, 2, 4, 8, 16), got 32"),
    ({"num_stages": 0}, ValueError, "num_stages from 1 to 8, got 0"),
    ({"num_stages": 9}, ValueError, "num_stages from 1 to 8, got 9"),
    ({"group_m": 0}, ValueError, "group_m >= 1, got 0"),
    ({"programs_per_sm": 0}, ValueError, "programs_per_sm >= 1, got 0"),
    ({"BLOCK_M": 64.0}, TypeError, "BLOCK_M of type int, got 64.0 (float)"),
    ({"BLOCK_M": "64"}, TypeError, "BLOCK_M of type int, got '64' (str)"),
    ({"num_warps": True}, TypeError, "num_warps of type int, got True (bool)"),
    ({"flatten": 1}, TypeError, "flatten of type bool, got 1 (int)"),
    ({"epilogue_subtile": 3}, ValueError, "epilogue_subtile in (1, 2), got 3"),
    ({"use_tma_store": None}, TypeError, "use_tma_store of type bool, got None (NoneType)"),
]  # fmt: skip
SPECIALIZED: dict[str, Any] = {
    "warp_specialize": True, "num_warps": 8, "use_tma_load_x": True, "use_tma_load_w": True,
    "use_tma_store": True,
}  # fmt: skip
NOT_SPECIALIZED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_warps": 4}, ValueError, "num_warps=8 with warp_specialize, got 4"),
    ({"programs_per_sm": 2}, ValueError, "programs_per_sm=1 with warp_specialize, got 2"),
    ({"num_stages": 1}, ValueError, "num_stages >= 2 with warp_specialize, got 1"),
    (
        {"epilogue_subtile": 2, "BLOCK_N": 256},
        ValueError,
        "epilogue_subtile=1 with warp_specialize, got 2",
    ),
    ({"launch_pdl": True}, ValueError, "launch_pdl=False with warp_specialize, got True"),
    ({"use_tma_load_x": False}, ValueError, "use_tma_load_x=True with warp_specialize, got False"),
    ({"use_tma_store": False}, ValueError, "use_tma_store=True with warp_specialize, got False"),
    ({"BLOCK_M": 64}, ValueError, "with warp_specialize, got 64x128 and 64"),
    ({"BLOCK_M": 256, "BLOCK_N": 256}, ValueError, "with warp_specialize, got 256x256 and 64"),
    ({"BLOCK_K": 16}, ValueError, "with warp_specialize, got 128x128 and 16"),
    ({"tail_tiles": True, "flatten": False}, ValueError, "not (tail_tiles and warp_specialize)"),
]
TAIL_TILES = [
    ({"tail_tiles": True}, ValueError, "not (tail_tiles and flatten)"),
    ({"tail_tiles": True, "flatten": False, "BLOCK_M": 16}, ValueError, "BLOCK_M >= 32"),
]


@pytest.mark.parametrize(
    ("name", "tile"),
    [
        ("forward", "BLOCK_M x BLOCK_N to be 128x128, 128x256, 192x256"),
        ("backward_dX", "BLOCK_M x BLOCK_K to be 128x128, 128x256, 192x256"),
        ("backward_dW", "BLOCK_N x BLOCK_K to be 128x128, 128x256"),
    ],
)
def test_an_error_names_the_fields_of_the_tile(name, tile):
    with pytest.raises(ValueError, match=f"expected {tile} or 256x128, and"):
        PASSES[name](warp_specialize=True, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64)


def test_a_tall_tile_is_for_forward_and_dx_on_hopper():
    tall = KernelConfigForward(**{**SPECIALIZED, "BLOCK_M": 192, "BLOCK_N": 256})
    assert tall.is_tall
    assert not tall.is_pingpong
    assert KernelConfigForward.from_dict(tall.to_dict()) == tall
    of_dx = {"use_tma_load_dy": True, "use_tma_load_w": True, "use_tma_store": True}
    dx = PASSES["backward_dX"](BLOCK_M=192, BLOCK_K=256, num_warps=8, warp_specialize=True, **of_dx)
    assert dx.is_tall
    for wrong in ({"warp_specialize": False}, {"BLOCK_N": 128}, {"BLOCK_M": 256}, {"BLOCK_M": 160}):
        with pytest.raises(ValueError, match="BLOCK_M"):
            dataclasses.replace(tall, **wrong)
    with pytest.raises(ValueError, match="BLOCK_N to be a power of two"):
        PASSES["backward_dW"](BLOCK_N=192, BLOCK_K=256, num_warps=8, warp_specialize=True)


def test_is_pingpong():
    """The output's tile tells, which dX and dW have in other fields. It must be asked for."""
    turns, dw = KernelConfigForward(**SPECIALIZED), KernelConfigBackward_dW
    assert turns.is_pingpong
    assert not dataclasses.replace(turns, warp_specialize=False).is_pingpong
    assert not dataclasses.replace(turns, BLOCK_N=256).is_pingpong
    values = {**SPECIALIZED, "use_tma_load_dy": True}
    del values["use_tma_load_w"]
    assert dw(**values, BLOCK_M=64, BLOCK_K=128).is_pingpong
    assert not dw(**values, BLOCK_M=128, BLOCK_K=256).is_pingpong


@pytest.mark.parametrize(
    ("name", "values", "error", "reason"),
    [
        *[(name, *case) for name in PASSES for case in INVALID],
        *[(name, *case) for name in ("forward", "backward_dX") for case in TAIL_TILES],
        *[("forward", {**SPECIALIZED, **values}, *told) for values, *told in NOT_SPECIALIZED],
    ],
)
def test_refuses_a_value_with_the_reason(name, values, error, reason):
    with pytest.raises(error) as raised:
        PASSES[name](**values)
    text = str(raised.value)
    assert text.startswith(f"{PASSES[name].__name__}: expected ")
    assert reason in text
    with pytest.raises(ValueError) as parsed:  # noqa: PT011
        parse(json.dumps({name: values}))
    assert str(parsed.value) == text


@pytest.mark.parametrize(
    ("name", "field"),
    [
        *[(name, "BLOCK_SIZE") for name in PASSES],
        ("forward", "use_tma_load_dy"),
        ("backward_dX", "use_tma_load_x"),
        ("backward_dW", "use_tma_load_w"),
        ("backward_dW", "tail_tiles"),
    ],
)
def test_refuses_an_unknown_field(name, field):
    with pytest.raises(ValueError, match=f"{PASSES[name].__name__}: unknown field '{field}'"):
        PASSES[name].from_dict({field: True})


def test_refuses_the_configuration_of_another_pass():
    with pytest.raises(TypeError, match="expected forward to be a KernelConfigForward, got"):
        kernel_config(forward=BACKWARD_DX)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected backward_dW to be a KernelConfigBackward_dW"):
        kernel_config(backward_dW=FORWARD.to_dict())  # type: ignore[arg-type]


WRONG = {
    "": "not JSON",
    "{": "not JSON",
    "[]": "expected a JSON object with keys of",
    "3": "expected a JSON object with keys of",
    '{"dX": {}}': "expected a JSON object with keys of",
    '{"forward": 3}': "expected forward to be a JSON object of fields, got 3",
    '{"forward": null}': "expected forward to be a JSON object of fields, got null",
    '{"backward_dW": ["BLOCK_M"]}': 'to be a JSON object of fields, got ["BLOCK_M"]',
    '{"forward": {"num_stages": null}}': "expected num_stages of type int, got None",
    '{"forward": {}, "forward": {}}': "the key 'forward' stands twice",
    '{"forward": {"BLOCK_M": 32, "BLOCK_M": 64}}': "the key 'BLOCK_M' stands twice",
    '{"forward": {"BLOCK_SIZE_M": 32}}': "unknown field 'BLOCK_SIZE_M'",
    '{"forward": {"group_m": 1%s}}' % ("0" * 5000): "at most 19 digits, got one of 5001",
    # How deep Python itself can go depends on who calls.
    "[" * 100_000: "expected JSON nested at most 8 deep, got more",
    '{"forward": ' * 900: "expected JSON nested at most 8 deep, got more",
    '{"forward": {"BLOCK_M": 24}}': "KernelConfigForward: expected BLOCK_M to be a power of two",
    '{"backward_dW": {"a": 1}}': "KernelConfigBackward_dW: unknown field 'a'",
}  # fmt: skip
wrong = pytest.mark.parametrize(
    ("text", "reason"), WRONG.items(), ids=[text[:40] for text in WRONG]
)


@wrong
def test_refuses_a_string_with_the_reason(text, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        parse(text)


def test_brackets_in_a_string_do_not_nest():
    """An escaped quote does not end a string. A string without an end is not JSON."""
    name = "[" * 20 + '"' + "{" * 20
    with pytest.raises(ValueError, match="unknown field"):
        parse(json.dumps({"forward": {name: 1}}))
    with pytest.raises(ValueError, match="not JSON"):
        parse('{"' + "[" * 20)
    assert parse(" {\n} ") == {}


@pytest.mark.parametrize("values", [None, 3, [("BLOCK_M", 64)]])
def test_from_dict_refuses_what_is_no_dict(values):
    with pytest.raises(TypeError, match="KernelConfigForward: expected a dict of fields, got"):
        KernelConfigForward.from_dict(values)


def call(requires_grad: bool = False) -> dict[str, Any]:
    """Return a call with T = 6, K = 2, E = 4, D = 8 and N = 10. One row is dropped."""
    generator = torch.Generator().manual_seed(0)
    return {
        "input": torch.randn(6, 8, generator=generator).requires_grad_(requires_grad),
        "weight": torch.randn(4, 10, 8, generator=generator).requires_grad_(requires_grad),
        "token_counts": torch.tensor([5, 0, 3, 3]),
        "gather_indices": torch.randperm(12, generator=generator),
        "topk_weights": torch.rand(6, 2, generator=generator).requires_grad_(requires_grad),
        "bias": torch.randn(4, 10, generator=generator).requires_grad_(requires_grad),
        "top_k": 2,
        "permute_x": True,
    }


def backward_call(name: str) -> dict[str, Any]:
    arguments = call()
    shared = ("token_counts", "gather_indices", "topk_weights", "top_k", "permute_x")
    own = {"grouped_gemm_dx": ("weight", "input", "bias"), "grouped_gemm_dw": ("input",)}[name]
    kept = {key: arguments[key] for key in (*shared, *own)}
    more = {"transposed": False} if name == "grouped_gemm_dw" else {}
    grad = torch.randn(12, 10)
    return {"grad_output": grad, **kept, "permute_y": False, "needs": [True, True], **more}


@wrong
@pytest.mark.parametrize("name", ["grouped_gemm", "grouped_gemm_dx", "grouped_gemm_dw"])
def test_an_op_refuses_a_wrong_string_everywhere_alike(name, text, reason):
    arguments = call() if name == "grouped_gemm" else backward_call(name)
    expected = (
        f"moe::{name}: expected kernel_config to be the string that moe_ops.kernel_config() makes",
        f"got {text!r}",
        reason,
    )
    op = getattr(moe, name)
    checks.assert_rejects(ValueError, expected, op, {**arguments, "kernel_config": text})


def gradients(function, arguments: dict[str, Any]) -> list[torch.Tensor]:
    leaves = [v for v in arguments.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    output = function(**arguments)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]


def test_a_valid_string_changes_nothing_on_cpu():
    arguments = call(requires_grad=True)
    expected = gradients(moe_ops.grouped_gemm, arguments)
    found = gradients(moe_ops.grouped_gemm, {**arguments, "kernel_config": TEXT})
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


def test_the_string_reaches_every_op_of_a_compiled_graph():
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph)

    arguments = {**call(requires_grad=True), "kernel_config": TEXT}
    compiled = torch.compile(
        moe_ops.grouped_gemm, fullgraph=True, backend=aot_autograd(fw_compiler=keep)
    )
    found, expected = (gradients(f, arguments) for f in (compiled, moe_ops.grouped_gemm))
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    calls = [node for node in nodes if str(node.target).startswith("moe.")]
    assert {str(node.target) for node in calls} == {
        f"moe.{name}.default" for name in ("grouped_gemm", "grouped_gemm_dx", "grouped_gemm_dw")
    }
    assert all(TEXT in (*node.args, *node.kwargs.values()) for node in calls)


def test_accepted_under_aot_eager():
    arguments = {**call(requires_grad=True), "kernel_config": TEXT}
    compiled = torch.compile(moe_ops.grouped_gemm, fullgraph=True, backend="aot_eager")
    found, expected = (gradients(f, arguments) for f in (compiled, moe_ops.grouped_gemm))
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)

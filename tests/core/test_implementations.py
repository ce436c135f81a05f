# SPDX-License-Identifier: Apache-2.0
"""The table chooses the implementation of an op, a variable forces one, and `env` tells which."""

import ast
import contextlib
import copy
import importlib.util
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from moe_ops import cli
from moe_ops._core import library
from moe_ops._core.library import ENVIRONMENT_VARIABLE, IMPLEMENTATIONS, OPS
from moe_ops._core.schema import REQUIRED, Argument
from moe_ops.cli.env import configurations
from moe_ops.configs import cache
from moe_ops.configs.choose import shipped
from moe_ops.configs.kernel_config import KernelConfigForward
from testing.every_op import ALL, WITH_TRITON


@pytest.fixture
def scratch_op(monkeypatch):
    """Return an Op that is not registered with torch. A test may choose its implementations."""
    op = object.__new__(library.Op)
    op.name = "scratch"
    op.schema = replace(OPS["permute"].schema, name="scratch")
    op.implementations, op.flags = {}, {}
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return op


def test_every_op_has_a_cpu_implementation(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    assert {op.choose("cpu").name for op in OPS.values()} == {"pytorch"}


def test_best_available_is_chosen_and_says_why(scratch_op):
    scratch_op.implement("pytorch", torch.neg)
    choice = scratch_op.choose("cuda")
    assert choice == library.Choice("pytorch", "this op has no triton implementation")
    scratch_op.implement("triton", torch.abs)
    assert scratch_op.choose("cuda") == library.Choice("triton", "the default")
    assert scratch_op.choose("cpu") == library.Choice("pytorch", "the default")


def test_forced_implementation(scratch_op, monkeypatch):
    scratch_op.implement("pytorch", torch.neg)
    scratch_op.implement("triton", torch.abs)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "pytorch")
    assert scratch_op.choose("cuda").name == "pytorch"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    with pytest.raises(RuntimeError, match=r"moe::scratch: .*=triton: .*TRITON_INTERPRET=1"):
        scratch_op.choose("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert scratch_op.choose("cpu").name == "triton"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cutlass")
    text = "=cutlass: cpu tensors have no such implementation; expected pytorch or triton"
    with pytest.raises(RuntimeError, match=text):
        scratch_op.choose("cpu")


def test_errors_name_the_op_that_was_called(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cutlass")
    for name in ("fused_experts", "fused_experts_forward"):
        with pytest.raises(RuntimeError, match=f"^moe::fused_experts: {ENVIRONMENT_VARIABLE}=cutl"):
            OPS[name].choose("cpu")


def test_without_triton(scratch_op, monkeypatch):
    scratch_op.implement("triton", "a.module:never_imported")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="moe::scratch: triton is not installed"):
        scratch_op.choose("cuda")
    scratch_op.implement("pytorch", torch.neg)
    assert scratch_op.choose("cuda") == library.Choice("pytorch", "triton is not installed")


def check_parameters(op, implementation):
    """Compare by the source: Triton may be missing. A default may be left out, but not changed."""
    function = op.implementations[implementation]
    if not isinstance(function, str):
        function = f"{function.__module__}:{function.__name__}"
    module, _, attribute = function.partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None
    tree = ast.parse(Path(str(spec.origin)).read_text(encoding="utf-8"))
    (node,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == attribute)
    # The one decorator hands on all arguments as they are.
    assert [ast.unparse(each) for each in node.decorator_list] in ([], ["compiled_together"])
    parameters = node.args
    assert (*parameters.posonlyargs, parameters.vararg, parameters.kwarg) == (None, None)
    arguments = op.schema.arguments
    assert [parameter.arg for parameter in parameters.args] == [a.name for a in arguments]
    given = [ast.literal_eval(default) for default in parameters.defaults]
    assert given == [a.default for a in arguments[len(arguments) - len(given) :]]
    # Each flag is taken, and each keyword is set: else its default would do.
    assert {parameter.arg for parameter in parameters.kwonlyargs} == set(op.flags[implementation])


@pytest.mark.parametrize(
    ("implementation", "name"),
    [*(("pytorch", name) for name in ALL), *(("triton", name) for name in WITH_TRITON)],
)
def test_parameters_are_the_schema_s(name, implementation):
    check_parameters(OPS[name], implementation)


def test_every_other_op_has_a_triton_implementation():
    assert {name for name, op in OPS.items() if "triton" in op.implementations} == set(WITH_TRITON)


@pytest.mark.parametrize(
    ("parameters", "flags", "is_right"),
    [
        ("rows, factor=1", {}, True),
        ("rows, factor=1, *, for_backward", {"for_backward": True}, True),
        ("rows, factor=1, *, for_backward=False", {"for_backward": True}, True),
        ("rows, factor=1, *, for_backward, sign", {"sign": 1, "for_backward": True}, True),
        ("rows, factor=1, *, for_backward=False", {}, False),
        ("rows, factor=1", {"for_backward": True}, False),
        ("rows, factor=1, *, backward", {"for_backward": True}, False),
        ("rows, factor=1, for_backward=False", {"for_backward": True}, False),
        ("rows, factor=1, **flags", {"for_backward": True}, False),
        ("rows, factor=2, *, for_backward", {"for_backward": True}, False),
    ],
)
def test_keyword_only_parameters_are_the_flags(
    scratch_op, tmp_path, monkeypatch, parameters, flags, is_right
):
    module = f"scratch_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(f"def scale({parameters}):\n    return rows\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = (Argument("rows", "Tensor", REQUIRED, ""), Argument("factor", "SymInt", 1, ""))
    scratch_op.schema = SimpleNamespace(arguments=arguments)
    scratch_op.implement("triton", f"{module}:scale", **flags)
    with contextlib.nullcontext() if is_right else pytest.raises(AssertionError):
        check_parameters(scratch_op, "triton")


def test_flags_let_two_ops_share_a_function(scratch_op):
    def added(input, gather_indices, top_k, scatter_indices, *, more, sign=1):
        return input + sign * more

    rows, order, results = torch.ones(3, 2), torch.arange(3), []
    scratch_op.generated = OPS["permute"].generated
    for flags in ({"more": 2}, {"more": 3, "sign": -1}):
        op = copy.copy(scratch_op)
        op.implementations, op.flags = {}, {}
        op.implement("pytorch", added, **flags)
        kernel = library._device_kernel(op, "cpu")
        results.append([cast(torch.Tensor, kernel(rows, order, 1)) for _ in range(2)])
    assert [[r.unique().tolist() for r in calls] for calls in results] == [[[3], [3]], [[-2], [-2]]]


def test_flags_of_an_implementation_that_is_imported_when_called(scratch_op):
    scratch_op.implement("triton", "builtins:max", key=abs)
    scratch_op.implement("pytorch", "builtins:max")
    assert scratch_op._load("triton")(-3, 2) == -3
    assert scratch_op._load("pytorch")(-3, 2) == 2


def test_named_implementation_is_imported_when_called(scratch_op):
    scratch_op.implement("triton", "operator:neg")
    assert scratch_op.implementations["triton"] == "operator:neg"
    assert scratch_op._load("triton")(3) == -3


def test_serving_with_less_than_the_best_is_logged_once(scratch_op, monkeypatch, caplog):
    rows = torch.ones(3, 2)
    scratch_op.implement("pytorch", lambda input, *_: input + 1)
    scratch_op.generated = OPS["permute"].generated
    kernel = library._device_kernel(scratch_op, "cuda")
    with caplog.at_level(logging.WARNING, logger="moe_ops"):
        for _ in range(2):
            assert torch.equal(cast(torch.Tensor, kernel(rows, torch.arange(3), 1)), rows + 1)
    (record,) = caplog.records
    assert record.name == "moe_ops"
    assert "moe::scratch on cuda: the pytorch implementation" in record.getMessage()


def test_env_lists_every_op_with_its_reason(capsys, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    assert cli.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, op in OPS.items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        for device_type in IMPLEMENTATIONS:
            choice = op.choose(device_type)
            assert f"{choice.name} ({choice.reason})" in line
    assert any(line.startswith("torch ") and torch.__version__ in line for line in lines)


def test_env_counts_the_kernel_configurations(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_OPS_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("MOE_OPS_AUTOTUNE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    cache.store("NVIDIA H200", {"forward of a test": KernelConfigForward()})
    number = len(shipped((9, 0)))
    assert number > 0
    assert list(configurations()) == [
        f"NVIDIA H200: {number} shipped, 1 tuned",
        f"tuned in    {tmp_path / 'configs'}",
    ]
    monkeypatch.setenv("MOE_OPS_AUTOTUNE", "0")
    assert list(configurations())[-1].endswith("(not read: MOE_OPS_AUTOTUNE=0)")


def test_env_tells_what_a_forced_implementation_lacks(capsys, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cutlass")
    assert cli.main(["env"]) == 0
    assert "cpu tensors have no such implementation" in capsys.readouterr().out


def test_show_prints_the_generated_code(capsys):
    assert cli.main(["show", "permute"]) == 0
    shown = capsys.readouterr().out
    assert OPS["permute"].generated.source.rstrip() in shown
    assert "torch.ops.moe.permute" + OPS["permute"].schema.schema in shown


def test_unknown_op_is_one_clear_line(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["show", "nothing"])
    assert error.value.code == 2
    assert "invalid choice: 'nothing'" in capsys.readouterr().err

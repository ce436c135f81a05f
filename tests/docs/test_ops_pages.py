# SPDX-License-Identifier: Apache-2.0
"""What the ops' pages say of autocast, torch.func, vmap, changes in place and packages is so."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from moe_ops._core import reference
from moe_ops._core.library import SCHEMAS
from testing.strategies import PRESENT, Sample, seeded_sample

# Every op whose gradient a caller may ask for.
DIFFERENTIABLE = sorted(
    name for name, schema in SCHEMAS.items() if any(a.grad for a in schema.arguments)
)
SIZES = {"T": 5, "H": 3, "I": 4, "D": 3, "N": 8, "G": 4}
differentiable = pytest.mark.parametrize("name", DIFFERENTIABLE)
every_op = pytest.mark.parametrize("name", sorted(SCHEMAS))


def sample_of(name: str, dtype: torch.dtype = torch.float32) -> Sample:
    schema = SCHEMAS[name]
    fixed: dict[str, Any] = {key: size for key, size in SIZES.items() if key in schema.dims}
    fixed |= {a.name: PRESENT for a in schema.tensors if a.is_optional}
    return seeded_sample(schema, 0, dtype=dtype, layout="contiguous", routing="uniform", **fixed)


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def page(name: str) -> str:
    return reference.page(SCHEMAS[name])


@differentiable
def test_a_change_in_place_raises_and_what_the_page_says_does_not(name):
    saved = reference.saved(SCHEMAS[name])
    assert f"Write `{saved} = {saved} + 1`" in page(name)

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        sample = sample_of(name)
        arguments = sample.requiring_grad()
        if saved in arguments and arguments[saved].requires_grad:
            arguments[saved] = arguments[saved] * 1  # a leaf would raise where it is changed
        output = sample(**arguments)
        names = [output.name for output in SCHEMAS[name].outputs]
        kept = output[names.index(saved)] if saved in names else arguments[saved]
        return first(output).sum(), kept

    loss, kept = forward()
    kept += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss, kept = forward()
    kept = kept + 1
    loss.backward()


@differentiable
def test_functional_transforms(name):
    sample = sample_of(name)
    argument = sample.differentiable()[0]
    value = sample.arguments[argument]

    def scalar(x: torch.Tensor) -> torch.Tensor:
        return first(sample(**{argument: x})).sum()

    assert "torch.func.grad, vjp and jacrev raise RuntimeError" in page(name)
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(RuntimeError, match="functorch transforms"):
            transform(scalar)(value)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.vjp(scalar, value)[1](torch.ones(()))
    with pytest.raises(NotImplementedError, match="forward-mode AD"):
        torch.func.jvp(scalar, (value,), (value,))
    with pytest.raises(NotImplementedError, match="forward-mode AD"):
        torch.func.jacfwd(scalar)(value)


@every_op
def test_vmap_calls_the_op_for_each_element(name):
    """A tensor that the op only reads is batched, twice the same with other numbers."""
    sample = sample_of(name)
    floating = [
        a.name
        for a in SCHEMAS[name].tensors
        if sample.arguments[a.name] is not None and sample.arguments[a.name].is_floating_point()
    ]
    batched = floating[0] if floating else SCHEMAS[name].tensors[0].name
    value = sample.arguments[batched]
    if value.dtype == torch.float8_e4m3fn:
        pytest.skip("torch stacks no float8")
    stack = torch.stack([value, value.flip(0)])
    found = torch.vmap(lambda x: first(sample(**{batched: x})))(stack)
    for result, element in zip(found, stack, strict=True):
        expected = first(sample(**{batched: element.contiguous()}))
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


@every_op
def test_autocast_casts_what_the_page_says(name):
    schema = SCHEMAS[name]
    cast = [argument.name for argument in schema.arguments if argument.autocast]
    if not cast:
        assert "Autocast casts nothing." in page(name)
    sample = sample_of(name)
    with torch.autocast("cpu", torch.bfloat16):
        found = first(sample())
    low = {key: sample.arguments[key].to(torch.bfloat16) for key in cast}
    assert torch.equal(found, first(sample(**low)))
    for key in cast:
        assert key in page(name).partition("Autocast casts ")[2].partition(" to its dtype")[0]


class Permutation(torch.nn.Module):
    def forward(self, rows, slots):
        return torch.ops.moe.permute(rows, slots, 2)


LOAD = """
import sys, torch
program, package = sys.argv[1:]
for load in (torch.export.load, torch._inductor.aoti_load_package):
    try:
        load(program if load is torch.export.load else package)(torch.ones(3, 4), torch.arange(6))
    except Exception as error:
        print(error)
"""


@pytest.mark.slow
def test_a_program_that_is_loaded_needs_the_import(tmp_path):
    """tests/core/test_export.py loads with it."""
    exported = torch.export.export(Permutation(), (torch.ones(3, 4), torch.arange(6)))
    program, package = str(tmp_path / "program.pt2"), str(tmp_path / "package.pt2")
    torch.export.save(exported, program)
    torch._inductor.aoti_compile_and_package(exported, package_path=package)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, program, package],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    of_program, of_package = done.stdout.splitlines()
    assert "error when deserializing" in of_program
    assert of_package == "Could not find schema for moe::permute."

# SPDX-License-Identifier: Apache-2.0
"""What holds for every op, on arguments drawn from its schema: a new YAML file is covered here
without a line of test code, but for its oracle."""

import dataclasses
import itertools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from moe_ops._core.library import SCHEMAS
from tests import checks, strategies
from tests.strategies import Sample, samples, seeded_sample

ALL = sorted(SCHEMAS)
DIFFERENTIABLE = sorted(name for name, s in SCHEMAS.items() if any(a.grad for a in s.tensors))
FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INDEX = (torch.int32, torch.int64)
FAST_OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")

schemas = pytest.mark.parametrize("name", ALL)
differentiable_schemas = pytest.mark.parametrize("name", DIFFERENTIABLE)


def opcheck(sample: Sample, tests: str | tuple[str, ...] = "ALL") -> None:
    """torch.library.opcheck, with grad where the op has one."""
    # opcheck copies its inputs with their strides, and miscounts the storage of empty ones.
    arguments = {
        name: torch.empty(value.shape, dtype=value.dtype)
        if isinstance(value, Tensor) and value.numel() == 0
        else value
        for name, value in sample.arguments.items()
    }
    sample = dataclasses.replace(sample, arguments=arguments)
    torch.library.opcheck(
        sample.overload, tuple(sample.requiring_grad().values()), test_utils=tests
    )


@schemas
@hypothesis.given(data=st.data())
def test_matches_reference(name, data):
    sample = data.draw(samples(SCHEMAS[name]))
    opcheck(sample, FAST_OPCHECKS)
    with checks.poisoned_memory():
        outputs = sample()
    checks.assert_matches_oracle(sample, outputs)


@differentiable_schemas
@hypothesis.given(data=st.data())
def test_gradients_match_reference(name, data):
    sample = data.draw(samples(SCHEMAS[name]))
    arguments = sample.requiring_grad()
    names = data.draw(
        st.lists(st.sampled_from(sample.differentiable()), min_size=1, unique=True), "needed"
    )
    for unneeded in set(sample.differentiable()) - set(names):
        arguments[unneeded].requires_grad_(False)
    output = sample(**arguments)
    output = output[0] if isinstance(output, tuple) else output
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000), "seed"))
    tangent = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    layout = data.draw(st.sampled_from(strategies.LAYOUTS), "layout of grad_output")
    tangent = strategies.lay_out(tangent, layout)
    with checks.poisoned_memory():
        found = torch.autograd.grad(output, [arguments[n] for n in names], tangent)
    expected = checks.oracle_gradients(sample, tangent)
    scales = checks.gradient_scales(sample, tangent)
    for argument, got in zip(names, found, strict=True):
        dtype = checks.coarser(got.dtype, output.dtype)
        what = f"{sample}: gradient of {argument}"
        assert got.dtype == arguments[argument].dtype, what
        checks.assert_close(got, expected[argument], dtype=dtype, scale=scales[argument], what=what)


def opcheck_samples(name: str) -> list[Sample]:
    """Every combination of flags, the dtypes and layouts in turn; then each dtype at T = 0."""
    schema = SCHEMAS[name]
    cycle = itertools.cycle(itertools.product(FLOATING, strategies.LAYOUTS, INDEX))
    chosen = [
        {**variant, "dtype": dtype, "layout": layout, "index_dtype": index}
        for variant, (dtype, layout, index) in zip(strategies.variants(schema), cycle, strict=False)
    ]
    if len(chosen) < 16:
        chosen += [
            {"dtype": dtype, "layout": layout, "index_dtype": index}
            for dtype, layout, index in itertools.islice(cycle, 16)
        ]
    empty = [{"T": 0, "dtype": dtype} for dtype in FLOATING]
    return [seeded_sample(schema, seed, **fixed) for seed, fixed in enumerate(chosen + empty)]


@schemas
def test_opcheck(name):
    for sample in opcheck_samples(name):
        opcheck(sample)

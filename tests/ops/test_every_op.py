# SPDX-License-Identifier: Apache-2.0
"""Every op does this, on arguments drawn from its schema.

A new YAML file needs an oracle and no line of test code here.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from moe_ops._core.library import SCHEMAS
from testing import checks, layouts, strategies
from testing.every_op import (
    ALL,
    DIFFERENTIABLE,
    FAST_OPCHECKS,
    FLOATING,
    INDEX,
    INDEX_OPS,
    opcheck,
    run_corrupt_calls,
)
from testing.strategies import Sample, samples, seeded_sample

schemas = pytest.mark.parametrize("name", ALL)
differentiable_schemas = pytest.mark.parametrize("name", DIFFERENTIABLE)


@schemas
@hypothesis.given(data=st.data())
def test_matches_reference(name, data):
    sample = data.draw(samples(SCHEMAS[name]))
    opcheck(sample, FAST_OPCHECKS)
    hypothesis.assume(checks.is_decided(sample))
    with checks.poisoned_memory():
        outputs = sample()
    checks.assert_matches_oracle(sample, outputs)


# More tokens than an implementation takes at a time, and several experts of many rows.
LARGE = {
    "T": 300,
    "H": 70,
    "I": 50,
    "U": 100,
    "D": 70,
    "N": 130,
    "E": 6,
    "G": 8,
    "K": 3,
    "A": 16,
    "B": 8,
}


@schemas
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_matches_reference_at_a_larger_size(name, dtype):
    sizes = {letter: size for letter, size in LARGE.items() if letter in SCHEMAS[name].dims}
    samples = (seeded_sample(SCHEMAS[name], n, **sizes, dtype=dtype) for n in itertools.count())
    # A square times another number may leave fp16's range at this size, whoever computes it.
    fitting = samples if dtype != torch.float16 else filter(checks.fits_fp16, samples)
    for sample in itertools.islice(fitting, 3):
        with checks.poisoned_memory():
            outputs = sample()
        checks.assert_matches_oracle(sample, outputs)


# These calls failed once. They run whatever hypothesis draws.
FOUND: dict[str, tuple[str, dict[str, Any], dict[str, torch.dtype]]] = {
    "two outputs that share one empty tensor": ("grouped_gemm_dx", {"needs": [False, False]}, {}),
    "fp64 weights on fp32 rows": (
        "grouped_gemm_dw",
        {"needs": [True, True], "dtype": torch.float32, "topk_weights": strategies.PRESENT},
        {"topk_weights": torch.float64},
    ),
    "ids in the strides of transposed logits": (
        "topk_routing",
        {"T": 5, "G": 4, "num_groups": 2, "top_k": 2, "layout": "transposed"},
        {},
    ),
}


@pytest.mark.parametrize("found", FOUND)
def test_found_earlier(found):
    name, fixed, other_dtypes = FOUND[found]
    for seed in range(10):
        sample = seeded_sample(SCHEMAS[name], seed, **fixed)
        for argument, dtype in other_dtypes.items():
            sample.arguments[argument] = sample.arguments[argument].to(dtype)
        opcheck(sample, FAST_OPCHECKS)
        checks.assert_matches_oracle(sample, sample())


@differentiable_schemas
@hypothesis.given(data=st.data())
def test_gradients_match_reference(name, data):
    sample = data.draw(samples(SCHEMAS[name]))
    hypothesis.assume(checks.is_decided(sample))
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
    layout = data.draw(st.sampled_from(layouts.LAYOUTS), "layout of grad_output")
    tangent = layouts.lay_out(tangent, layout)
    with checks.poisoned_memory():
        found = torch.autograd.grad(output, [arguments[n] for n in names], tangent)
    expected = checks.oracle_gradients(sample, tangent)
    scales = checks.gradient_scales(sample, tangent)
    for argument, got in zip(names, found, strict=True):
        dtype = checks.coarser(got.dtype, output.dtype)
        what = f"{sample}: gradient of {argument}"
        assert got.dtype == arguments[argument].dtype, what
        own = checks.specified_gradient(sample, argument, got)
        checks.assert_close(own, expected[argument], dtype=dtype, scale=scales[argument], what=what)


def opcheck_samples(name: str) -> list[Sample]:
    """Yield all combinations of flags, dtypes and layouts in turn, then each dtype at T = 0."""
    schema = SCHEMAS[name]
    cycle = itertools.cycle(itertools.product(FLOATING, layouts.LAYOUTS, INDEX))
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


@pytest.mark.slow
@schemas
def test_opcheck(name):
    for sample in opcheck_samples(name):
        opcheck(sample)


index_schemas = pytest.mark.parametrize("name", INDEX_OPS)


@index_schemas
def test_index_dtypes_give_the_same(name):
    for seed in range(20):
        sample = seeded_sample(SCHEMAS[name], seed, index_dtype=torch.int32)
        wide = {a.name: sample.arguments[a.name] for a in sample.schema.tensors if a.is_index}
        wide = {name: value.long() for name, value in wide.items() if value is not None}
        assert_same_bits(sample(), sample(**wide))


@schemas
def test_bitwise_repeatable(name):
    for seed in range(20):
        sample = seeded_sample(SCHEMAS[name], seed, T=9)
        first = sample()
        for _ in range(3):
            assert_same_bits(sample(), first)


def assert_same_bits(got, want):
    for one, two in zip(checks.as_tuple(got), checks.as_tuple(want), strict=True):
        assert one.dtype == two.dtype
        assert one.stride() == two.stride()
        assert torch.equal(one, two)


@schemas
def test_results_are_new_memory(name):
    """No output shares memory with an argument or another output, so callers may write to it."""
    for seed, variant in enumerate(strategies.variants(SCHEMAS[name])):
        sample = seeded_sample(SCHEMAS[name], seed, T=3, **variant)
        tensors = [v for v in sample.arguments.values() if isinstance(v, Tensor)]
        seen = {tensor.untyped_storage()._cdata for tensor in tensors}
        for output in checks.as_tuple(sample()):
            storage = output.untyped_storage()._cdata
            assert storage not in seen, sample
            seen.add(storage)


@pytest.mark.slow
@index_schemas
def test_corrupt_indices_stay_in_bounds(name):
    assert run_corrupt_calls(name) > 0


@pytest.mark.slow
def test_corrupt_indices_do_not_crash_a_process():
    """An access out of bounds may kill the process. That must fail one test, not the run."""
    script = f"""
from testing import every_op
for name in {INDEX_OPS!r}:
    every_op.run_corrupt_calls(name)
print("done")
"""
    root = Path(__file__).parents[2]
    # glibc then fills freed memory with garbage, which shows if it is read.
    environment = {**os.environ, "MALLOC_PERTURB_": "165", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=root, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "done\n"

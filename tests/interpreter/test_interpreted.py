# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels equal the oracle on tiny shapes in Triton's interpreter.

`make test-interpreter` runs this. It sets TRITON_INTERPRET=1 before anything imports Triton.
"""

import itertools

import pytest
import torch

import moe_ops
from moe_ops._core.library import OPS, SCHEMAS
from testing import checks, layouts, masked_routing, strategies
from testing.every_op import FAST_OPCHECKS, TRITON_INDEX_OPS, WITH_TRITON, opcheck
from testing.interpreted import pytestmark  # noqa: F401
from testing.on_device import (
    DIFFERENTIABLE,
    WIDTHS,
    assert_same_bits,
    decided_sample,
    differentiable_output,
    mix_dtypes,
    some_variants,
    tangents,
)
from testing.strategies import Sample, seeded_sample

# The interpreter's bf16 products are wrong. Only the CPU implementation takes fp64.
DTYPES = (torch.float32, torch.float16)
FP32 = {"dtype": torch.float32}
GEMMS = [name for name in WITH_TRITON if name.startswith(("grouped_gemm", "fused_experts"))]

schemas = pytest.mark.parametrize("name", WITH_TRITON)


def dtypes_of(name, seed):
    """Return the dtypes of one variant. Those of quantised ops are many, and take them in turn."""
    return DTYPES[seed // 2 % 2 :][:1] if "quantize" in name else DTYPES


def variants(names):
    return pytest.mark.parametrize(
        ("name", "seed", "variant", "dtype"),
        [
            pytest.param(name, seed, variant, dtype, id=f"{name}-{seed}-{dtype}")
            for name in names
            for seed, variant in enumerate(strategies.variants(SCHEMAS[name]))
            for dtype in dtypes_of(name, seed)
        ],
    )


def test_every_op_is_served_by_triton():
    assert {OPS[name].choose("cpu").name for name in WITH_TRITON} == {"triton"}


def check_forward(sample: Sample) -> None:
    with checks.poisoned_memory():
        outputs = sample()
    checks.assert_matches_oracle(sample, outputs)


def check_gradients(sample: Sample, seed: int) -> None:
    names = sample.differentiable()
    arguments = sample.requiring_grad()
    output = differentiable_output(sample(**arguments))
    (tangent,) = tangents(output, seed, layouts.LAYOUTS[seed % 4])
    with checks.poisoned_memory():
        found = torch.autograd.grad(output, [arguments[n] for n in names], tangent)
    expected = checks.oracle_gradients(sample, tangent)
    scales = checks.gradient_scales(sample, tangent)
    for argument, got in zip(names, found, strict=True):
        what = f"{sample}: gradient of {argument}"
        dtype = checks.coarser(got.dtype, output.dtype)
        own = checks.specified_gradient(sample, argument, got)
        checks.assert_close(own, expected[argument], dtype=dtype, scale=scales[argument], what=what)


@variants(WITH_TRITON)
def test_matches_reference(name, seed, variant, dtype):
    sample = decided_sample(SCHEMAS[name], seed, dtype=dtype, **variant)
    # Router weights are fp32 on rows in fp16. The interpreter cannot do bf16.
    check_forward(mix_dtypes(sample, 1) if seed % 2 else sample)


@variants([name for name in DIFFERENTIABLE if name in WITH_TRITON])
def test_gradients_match_reference(name, seed, variant, dtype):
    check_gradients(decided_sample(SCHEMAS[name], seed + 100, dtype=dtype, **variant), seed)


@schemas
def test_no_tokens(name):
    for seed, dtype in enumerate(DTYPES):
        sample = seeded_sample(SCHEMAS[name], seed, T=0, dtype=dtype)
        check_forward(sample)
        if name in DIFFERENTIABLE:
            check_gradients(sample, seed)


@pytest.mark.parametrize(
    ("name", "width"), [(name, width) for name, width in WIDTHS if name in WITH_TRITON]
)
def test_widths_of_zero(name, width):
    for seed, variant in enumerate(some_variants(name)):
        check_forward(seeded_sample(SCHEMAS[name], seed, **{**variant, width: 0, "T": 3, **FP32}))


@schemas
def test_layouts_and_index_dtypes(name):
    index_dtypes = (torch.int32, torch.int64)
    for seed, (layout, index) in enumerate(itertools.product(layouts.LAYOUTS, index_dtypes)):
        fixed = {"layout": layout, "index_dtype": index, "dtype": DTYPES[seed % 2], "T": 5}
        check_forward(decided_sample(SCHEMAS[name], seed, **fixed))


@pytest.mark.parametrize("name", TRITON_INDEX_OPS)
def test_index_dtypes_give_the_same(name):
    for seed in range(6):
        sample = seeded_sample(SCHEMAS[name], seed, index_dtype=torch.int32, dtype=DTYPES[seed % 2])
        wide = {a.name: sample.arguments[a.name] for a in sample.schema.tensors if a.is_index}
        wide = {n: value.long() for n, value in wide.items() if value is not None}
        assert_same_bits(sample(**wide), sample(), sample)


@schemas
def test_opcheck(name):
    """Outputs have the strides of the fakes, and share memory with nothing."""
    for seed, variant in enumerate(some_variants(name, at_most=6)):
        fixed = {**variant, "dtype": DTYPES[seed % 2], "layout": layouts.LAYOUTS[seed % 4]}
        opcheck(seeded_sample(SCHEMAS[name], seed, **fixed), FAST_OPCHECKS)


@pytest.mark.parametrize("name", GEMMS)
def test_bf16_products_are_refused_with_the_reason(name):
    for seed in range(5):
        scalars = dict(_scalars(name))
        needs = {"needs": [True] * int(scalars["needs"].type[5:-1])} if "needs" in scalars else {}
        sample = seeded_sample(SCHEMAS[name], seed, dtype=torch.bfloat16, **needs)
        with pytest.raises(NotImplementedError, match="bf16 in Triton's interpreter"):
            sample()


def _scalars(name):
    return [(a.name, a) for a in SCHEMAS[name].scalars]


@pytest.mark.parametrize("case", masked_routing.CASES)
def test_masked_experts(case):
    logits, top_k, bias, flags, expected = masked_routing.CASES[case]
    selection_bias = None if bias is None else torch.tensor(bias)
    _, topk_ids = moe_ops.topk_routing(torch.tensor([logits]), top_k, selection_bias, *flags)
    assert topk_ids.tolist() == [expected]

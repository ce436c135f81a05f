# SPDX-License-Identifier: Apache-2.0
"""The generator draws the arguments that the other tests rely on."""

import itertools
from collections import Counter

import pytest
import torch

from moe_ops._core.library import SCHEMAS
from moe_ops._core.schema import DTYPES
from testing import layouts, oracle, strategies
from testing.strategies import seeded_sample, variants

schemas = pytest.mark.parametrize("name", sorted(SCHEMAS))


@schemas
def test_draws_every_dtype_layout_size_and_routing(name):
    schema = SCHEMAS[name]
    seen: Counter[object] = Counter()
    for seed in range(400):
        sample = seeded_sample(schema, seed)
        seen[sample.routing] += 1
        for argument in schema.arguments:
            value = sample.arguments[argument.name]
            if isinstance(value, torch.Tensor):
                seen[argument.name, value.dtype] += 1
                seen[argument.name, sample.layouts[argument.name]] += 1
                seen[argument.name, "empty"] += value.numel() == 0
            else:
                seen[argument.name, str(value)] += 1
    for argument in schema.arguments:
        if argument.is_tensor:
            dtypes = DTYPES.get(argument.dtype, ())
            expected = [getattr(torch, dtype) for dtype in dtypes]
            expected += layouts.INDEX_LAYOUTS if argument.values else layouts.LAYOUTS
            if argument.is_optional:
                expected.append(str(None))
        elif argument.type == "bool":
            expected = ["False", "True"]
        elif argument.num_flags == 2:
            expected = [str(flags) for flags in strategies.all_flags(2)]
        elif argument.type == "float?":
            expected = [str(value) for value in (None, *strategies.FLOATS)]
        elif argument.type == "ScalarType":
            expected = [str(getattr(torch, dtype)) for dtype in argument.choices]
        else:
            expected = [str(choice) for choice in argument.choices]
        for value in expected:
            assert seen[argument.name, value] >= 5, f"{argument.name}: {value}"
    first = schema.arguments[0].name
    assert seen[first, "empty"] >= 5
    kinds = " ".join(argument.values for argument in schema.tensors if argument.is_index)
    if kinds.strip() and "distinct" not in kinds:
        for routing in oracle.ROUTINGS:
            assert seen[routing] >= 5, routing


@schemas
def test_the_same_seed_draws_the_same(name):
    one, two = (seeded_sample(SCHEMAS[name], 7) for _ in range(2))
    assert repr(one) == repr(two)
    for got, want in zip(one.arguments.values(), two.arguments.values(), strict=True):
        if isinstance(got, torch.Tensor):
            assert torch.equal(got, want)
            assert got.stride() == want.stride()
        else:
            assert got == want


@schemas
def test_variants_are_drawn_as_asked(name):
    for variant in variants(SCHEMAS[name]):
        sample = seeded_sample(SCHEMAS[name], 0, **variant)
        for argument, value in variant.items():
            got = sample.arguments[argument]
            assert (got is not None) if value is strategies.PRESENT else got == value


def test_variants_of_grouped_gemm():
    """No variant has both permutations, and none has one without gather_indices."""
    found = list(variants(SCHEMAS["grouped_gemm"]))
    # Two optional tensors give 2 * 2 variants without gather_indices. With them 3 pairs of flags
    # multiply that.
    assert len(found) == 4 + 4 * 3


def test_where_variants_are_many_any_two_options_occur_together():
    """Each valid pair occurs, and no pair that `where` forbids."""
    found = list(variants(SCHEMAS["fused_experts_down_backward"]))
    assert len(found) < 100
    for i, j in itertools.combinations(range(4), 2):
        flags = {(variant["needs"][i], variant["needs"][j]) for variant in found}
        assert len(flags) == 4
    gated = {(variant["activation"], variant["gated"]) for variant in found}
    assert len(gated) == 2 * 6 - 1
    assert ("swiglu_oai", False) not in gated
    weights = {(variant["weights_before"], variant["needs"][2]) for variant in found}
    assert weights == {(False, False), (False, True), (True, False)}
    given = {(v["hidden_states"], v["pre_activation"]) for v in found}
    assert len(given) == 4


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5)], ids=str)
def test_layouts(layout, shape):
    content = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
    tensor = layouts.lay_out(content, layout)
    assert tensor.shape == shape
    assert tensor.is_contiguous() == (layout == "contiguous")
    if layout == "expanded":
        assert 0 in tensor.stride()
    else:
        assert torch.equal(tensor, content)
    if layout == "sliced":
        assert tensor.storage_offset() > 0
        assert tensor._base is not None
        assert tensor._base.isnan().sum() == tensor._base.numel() - content.numel()

# SPDX-License-Identifier: Apache-2.0
"""Every op does this on CUDA, on arguments drawn from its schema.

tests/ops/test_every_op.py has the same on the CPU.
"""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_ops._core.library import SCHEMAS
from testing import checks, layouts, oracle, strategies
from testing.on_device import (
    ALL,
    DEVICE,
    DIFFERENTIABLE,
    DTYPES,
    WIDTHS,
    alike,
    assert_same_bits,
    decided_sample,
    differentiable_output,
    medium_sample,
    mix_dtypes,
    move,
    move_sample,
    schema_has_floats,
    some_variants,
    tangents,
    to_cpu,
)
from testing.strategies import Sample, seeded_sample

pytestmark = pytest.mark.gpu

INDEX = (torch.int32, torch.int64)
INDEX_OPS = [name for name in ALL if any(a.is_index for a in SCHEMAS[name].tensors)]
ROUTED_OPS = [
    name
    for name in INDEX_OPS
    if not any("distinct" in (a.values or "") for a in SCHEMAS[name].tensors)
]

# No op has as many.
ALL_VARIANTS = 1000

# The first call with some sizes is launched by Triton, the second is recorded as well, and the
# others are replayed. A process does not count the first call of an op.
CALLS = 4

schemas = pytest.mark.parametrize("name", ALL)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def variants(names):
    return pytest.mark.parametrize(
        ("name", "seed", "variant"),
        [
            pytest.param(name, seed, variant, id=f"{name}-{seed}")
            for name in names
            for seed, variant in enumerate(strategies.variants(SCHEMAS[name]))
        ],
    )


def check_forward(sample: Sample) -> None:
    with checks.poisoned_memory():
        outputs = move_sample(sample)()
    for output in checks.as_tuple(outputs):
        assert output.device == DEVICE
    checks.assert_matches_oracle(sample, to_cpu(outputs))


def check_gradients(sample: Sample, seed: int, layout: str) -> None:
    names = sample.differentiable()
    arguments = move_sample(sample).requiring_grad()
    output = differentiable_output(sample(**arguments))
    (tangent,) = tangents(output, seed, layout)
    with checks.poisoned_memory():
        found = torch.autograd.grad(output, [arguments[n] for n in names], move(tangent))
    expected = checks.oracle_gradients(sample, tangent)
    scales = checks.gradient_scales(sample, tangent)
    for argument, got in zip(names, found, strict=True):
        what = f"{sample}: gradient of {argument}"
        dtype = checks.coarser(got.dtype, output.dtype)
        assert got.dtype == arguments[argument].dtype, what
        assert got.device == DEVICE, what
        own = checks.specified_gradient(sample, argument, got.cpu())
        checks.assert_close(own, expected[argument], dtype=dtype, scale=scales[argument], what=what)


@variants(ALL)
@dtypes
def test_matches_reference(name, seed, variant, dtype):
    sample = decided_sample(SCHEMAS[name], seed, dtype=dtype, **variant)
    check_forward(mix_dtypes(sample, seed))


@variants(DIFFERENTIABLE)
@dtypes
def test_gradients_match_reference(name, seed, variant, dtype):
    sample = decided_sample(SCHEMAS[name], seed + 100, dtype=dtype, **variant)
    sample = mix_dtypes(sample, seed)
    layout = layouts.LAYOUTS[seed % len(layouts.LAYOUTS)]
    check_gradients(sample, seed, layout)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@schemas
def test_layouts(name, layout):
    for seed, dtype in enumerate(DTYPES):
        for index_dtype in INDEX:
            sample = decided_sample(
                SCHEMAS[name], seed, layout=layout, dtype=dtype, index_dtype=index_dtype, T=9
            )
            check_forward(sample)


@pytest.mark.parametrize("routing", oracle.ROUTINGS)
@pytest.mark.parametrize("name", ROUTED_OPS)
def test_routings(name, routing):
    sizes = {"T": 40, "D": 24, "N": 40, "H": 24, "E": 4, "num_experts": 4}
    top_k = 4 if routing == "every_expert" else 2
    options = {"dtype": torch.float16, "routing": routing, "top_k": top_k, "K": top_k}
    for seed in range(3):
        sample = decided_sample(SCHEMAS[name], seed, **sizes, **options)
        assert sample.routing == routing
        check_forward(sample)
        if name in DIFFERENTIABLE:
            check_gradients(sample, seed, "contiguous")


@pytest.mark.parametrize("name", INDEX_OPS)
def test_index_dtypes_give_the_same(name):
    for seed, variant in enumerate(some_variants(name)):
        fixed = {"index_dtype": torch.int32, "dtype": DTYPES[seed % 3]}
        sample = move_sample(medium_sample(name, seed, variant, **fixed))
        wide = {a.name: sample.arguments[a.name] for a in sample.schema.tensors if a.is_index}
        wide = {n: value.long() for n, value in wide.items() if value is not None}
        assert_same_bits(sample(**wide), sample(), sample)


@schemas
def test_no_tokens(name):
    for seed, dtype in enumerate(DTYPES):
        sample = seeded_sample(SCHEMAS[name], seed, T=0, dtype=dtype)
        check_forward(sample)
        if name in DIFFERENTIABLE:
            check_gradients(sample, seed, "contiguous")


@pytest.mark.parametrize(("name", "width"), WIDTHS)
def test_widths_of_zero(name, width):
    for seed, variant in enumerate(some_variants(name)):
        fixed = {**variant, width: 0, "T": 3, "dtype": DTYPES[seed % 3]}
        check_forward(seeded_sample(SCHEMAS[name], seed, **fixed))


def opcheck(sample: Sample) -> None:
    # opcheck copies its inputs with their strides, and counts the storage of empty ones wrongly.
    arguments = {
        name: torch.empty(value.shape, dtype=value.dtype, device=value.device)
        if isinstance(value, Tensor) and value.numel() == 0
        else value
        for name, value in sample.arguments.items()
    }
    sample = dataclasses.replace(sample, arguments=arguments)
    with checks.fp8_can_be_compared():
        torch.library.opcheck(sample.overload, tuple(sample.requiring_grad().values()))


OPCHECKS_PER_OP = 16


def opcheck_cases(name: str) -> list[dict[str, Any]]:
    found = some_variants(name, OPCHECKS_PER_OP)
    cases = [
        {
            **found[i % len(found)],
            "dtype": DTYPES[i % 3],
            "layout": layouts.LAYOUTS[i % 4],
            "index_dtype": INDEX[i // 4 % 2],
        }
        for i in range(max(len(found), 8))
    ]
    return [*cases, *({"T": 0, "dtype": dtype} for dtype in DTYPES)]


@pytest.mark.parametrize(
    ("name", "seed", "fixed"),
    [
        pytest.param(name, seed, fixed, id=f"{name}-{seed}")
        for name in ALL
        for seed, fixed in enumerate(opcheck_cases(name))
    ],
)
def test_opcheck(name, seed, fixed):
    # opcheck compares whole outputs of two calls.
    samples = (seeded_sample(SCHEMAS[name], seed + 1000 * i, **fixed) for i in range(200))
    opcheck(move_sample(next(each for each in samples if not checks.has_gaps(each))))


@schemas
def test_results_are_new_memory(name):
    """No output shares memory with an argument or another output, so callers may write to it.

    Nor with an output of another call, nor with what a replay needs beside.
    """
    for seed, variant in enumerate(some_variants(name, at_most=ALL_VARIANTS)):
        sample = medium_sample(name, seed, variant, dtype=DTYPES[seed % 3])
        on_device = move_sample(sample)
        calls = [checks.as_tuple(on_device())]
        want = [output.clone() for output in calls[0]]
        for _ in range(CALLS):
            # A caller writes to what it got.
            for output in calls[-1]:
                output.zero_()
            calls.append(checks.as_tuple(on_device()))
            assert_same_bits(calls[-1], want, sample)
        for outputs in calls:
            for output, first in zip(outputs, calls[0], strict=True):
                assert output.untyped_storage().nbytes() <= first.untyped_storage().nbytes(), sample
        assert_apart([*tensors_of(on_device), *(output for outputs in calls for output in outputs)])


def assert_apart(tensors: list[Tensor]) -> None:
    """Check that each tensor has a storage of its own, and that no two storages overlap."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    assert len({storage._cdata for storage in storages}) == len(storages)
    taken = sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages if s.nbytes())
    for (_, end), (begin, _) in itertools.pairwise(taken):
        assert end <= begin


@pytest.mark.parametrize(
    "name", [name for name in ALL if any(a.name == "needs" for a in SCHEMAS[name].scalars)]
)
def test_outputs_that_are_not_needed_hold_no_memory(name):
    for seed, variant in enumerate(some_variants(name, at_most=ALL_VARIANTS)):
        sample = medium_sample(name, seed, variant, dtype=DTYPES[seed % 3])
        outputs = checks.as_tuple(move_sample(sample)())
        for needed, output in zip(sample.arguments["needs"], outputs, strict=True):
            assert (output.untyped_storage().nbytes() > 0) == needed, sample


def forward_and_backward(sample: Sample, grads: list[Tensor]) -> list[Tensor]:
    """Return all outputs and, if the op has gradients, the gradient of every argument."""
    names = sample.differentiable()
    if not names:
        return list(checks.as_tuple(sample()))
    arguments = sample.requiring_grad()
    outputs = checks.as_tuple(sample(**arguments))
    found = torch.autograd.grad(outputs[0], [arguments[n] for n in names], grads[0])
    return [*(o.detach() for o in outputs), *found]


def medium_grads(sample: Sample) -> list[Tensor]:
    return [move(tangent) for tangent in tangents(sample())]


@schemas
def test_never_synchronizes(name):
    """Neither forward nor backward waits for the device, not even in a kernel's first call.

    Nor in a call that is recorded or replayed.
    """
    for seed, variant in enumerate(some_variants(name)):
        sample = move_sample(medium_sample(name, seed, variant, dtype=DTYPES[seed % 3]))
        grads = medium_grads(sample)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(CALLS):
                forward_and_backward(sample, grads)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_check_for_synchronization_finds_one():
    count = torch.ones(1, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            count.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@schemas
def test_twenty_runs_are_bitwise_equal(name):
    for seed, variant in enumerate(some_variants(name, at_most=6)):
        sample = move_sample(medium_sample(name, seed, variant, dtype=DTYPES[seed % 3]))
        grads = medium_grads(sample)
        first = forward_and_backward(sample, grads)
        for _ in range(19):
            assert_same_bits(forward_and_backward(sample, grads), first, sample)


@schemas
def test_graph_replays_with_other_contents(name):
    """A graph is replayed on another routing, so nothing of the first may be baked in."""
    for seed, variant in enumerate(some_variants(name, at_most=12)):
        fixed = {"dtype": DTYPES[seed % 3], "index_dtype": INDEX[seed % 2]}
        on_cpu = medium_sample(name, seed, variant, **fixed)
        static = move_sample(on_cpu)
        other = move_sample(alike(on_cpu, name, seed, variant, **fixed))
        grads = medium_grads(static)
        forward_and_backward(static, grads)  # compiles the kernels
        want = forward_and_backward(other, grads)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            got = forward_and_backward(static, grads)
        for argument, value in static.arguments.items():
            if isinstance(value, Tensor):
                value.copy_(other.arguments[argument])
        for _ in range(2):
            graph.replay()
        assert_same_bits(got, want, static)


@schemas
def test_refuses_fp64(name):
    schema = SCHEMAS[name]
    if not schema_has_floats(schema):
        assert all(a.dtype != "floating" for a in schema.tensors)
        return
    floating = [a.name for a in schema.tensors if a.dtype == "floating"]
    for seed, variant in enumerate(strategies.variants(schema)):
        sample = seeded_sample(schema, seed, dtype=torch.float32, **variant)
        on_device = move_sample(sample)
        for argument in floating:
            given = on_device.arguments[argument]
            if given is None:
                continue
            with pytest.raises(TypeError, match=rf"moe::{schema.called}: .*float64"):
                on_device(**{argument: given.double()})


@schemas
def test_refuses_a_tensor_of_another_device(name):
    schema = SCHEMAS[name]
    sample = seeded_sample(schema, 0, dtype=torch.float32)
    on_device = move_sample(sample)
    first, *others = [a for a in schema.tensors if sample.arguments[a.name] is not None]
    for argument in others:
        expected = rf"{argument.called}.device == {first.called}.device \(cuda:0\)"
        with pytest.raises(ValueError, match=expected):
            on_device(**{argument.name: sample.arguments[argument.name]})


@pytest.mark.multi_gpu
@schemas
def test_second_device_while_the_first_is_current(name):
    second = torch.device("cuda", 1)
    for seed, variant in enumerate(some_variants(name, at_most=12)):
        sample = medium_sample(name, seed, variant, dtype=DTYPES[seed % 3])
        first = move_sample(sample)
        grads = medium_grads(first)
        want = forward_and_backward(first, grads)
        assert torch.cuda.current_device() == 0
        with checks.poisoned_memory():
            got = forward_and_backward(move_sample(sample, second), [g.to(second) for g in grads])
        assert torch.cuda.current_device() == 0
        assert all(tensor.device == second for tensor in got)
        torch.cuda.synchronize(second)
        assert_same_bits([tensor.to(DEVICE) for tensor in got], want, sample)


def tensors_of(sample: Sample) -> list[Tensor]:
    return [value for value in sample.arguments.values() if isinstance(value, Tensor)]

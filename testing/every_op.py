# SPDX-License-Identifier: Apache-2.0
"""Tests every op in the same ways: by opcheck, and by calls with corrupt indices."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from moe_ops._core.library import SCHEMAS
from testing import checks, layouts, strategies
from testing.strategies import Sample, seeded_sample

ALL = sorted(SCHEMAS)
WITH_TRITON = ALL
DIFFERENTIABLE = sorted(name for name, s in SCHEMAS.items() if any(a.grad for a in s.tensors))
FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INDEX = (torch.int32, torch.int64)
FAST_OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
INDEX_OPS = sorted(name for name, s in SCHEMAS.items() if any(a.is_index for a in s.tensors))
TRITON_INDEX_OPS = [name for name in INDEX_OPS if name in WITH_TRITON]


def opcheck(sample: Sample, tests: str | tuple[str, ...] = "ALL") -> None:
    """Run torch.library.opcheck, with grad where the op has one."""
    # opcheck copies its inputs with their strides, and miscounts the storage of empty ones.
    arguments = {
        name: torch.empty(value.shape, dtype=value.dtype)
        if isinstance(value, Tensor) and value.numel() == 0
        else value
        for name, value in sample.arguments.items()
    }
    sample = dataclasses.replace(sample, arguments=arguments)
    with checks.fp8_can_be_compared():
        torch.library.opcheck(
            sample.overload, tuple(sample.requiring_grad().values()), test_utils=tests
        )


def corruptions(sample: Sample) -> Iterator[dict[str, Tensor]]:
    """Yield the index arguments of a call with values that their contract excludes."""
    names = [a.name for a in sample.schema.tensors if a.is_index]
    given = {n: sample.arguments[n] for n in names if sample.arguments[n] is not None}
    largest = {n: torch.iinfo(t.dtype).max for n, t in given.items()}
    for fill in (
        lambda n, t: torch.full_like(t, -7),
        lambda n, t: torch.full_like(t, largest[n]),
        lambda n, t: torch.full_like(t, -largest[n] - 1),
        lambda n, t: torch.zeros_like(t),
        lambda n, t: torch.full_like(t, max(t.numel() - 1, 0)),
        lambda n, t: torch.arange(t.numel()).to(t.dtype).reshape(t.shape) * 1000 - 500,
        lambda n, t: torch.where(torch.arange(t.numel()).reshape(t.shape) % 2 == 0, largest[n], -1)
        .to(t.dtype),
    ):  # fmt: skip
        corrupted = {n: layouts.lay_out(fill(n, t), "sliced") for n, t in given.items()}
        yield corrupted
        for alone, value in corrupted.items():
            yield {alone: value}


def run_corrupt_calls(name: str) -> int:
    """Call an op with every corruption of samples whose neighbouring memory is NaN.

    Nothing may raise, and no output may be read from there or left unwritten. Return how many calls
    there were.
    """
    count = 0
    for seed, variant in enumerate(strategies.variants(SCHEMAS[name])):
        for index in INDEX:
            sample = seeded_sample(
                SCHEMAS[name], seed, **variant, T=3,
                dtype=torch.float32, index_dtype=index, layout="sliced",
            )  # fmt: skip
            expected = [output.shape for output in checks.as_tuple(sample())]
            for corrupted in corruptions(sample):
                with checks.poisoned_memory():
                    outputs = checks.as_tuple(sample(**corrupted))
                assert [output.shape for output in outputs] == expected, sample
                for output in outputs:
                    if output.is_floating_point():
                        assert output.isfinite().all(), (sample, corrupted)
                    else:
                        assert (output.abs() < 2**30).all(), (sample, corrupted)
                count += 1
    return count

# SPDX-License-Identifier: Apache-2.0
"""Moves samples to a GPU, makes others like them, and shares its memory among tests."""

import contextlib
import dataclasses
import fcntl
import gc
import os
import random
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_ops._core.library import SCHEMAS
from moe_ops._core.schema import OpSchema
from testing import checks, layouts, strategies
from testing.every_op import corruptions
from testing.strategies import Sample, seeded_sample

DEVICE = torch.device("cuda", 0)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALL = sorted(SCHEMAS)
DIFFERENTIABLE = sorted(name for name, s in SCHEMAS.items() if any(a.grad for a in s.tensors))

# The dimensions of rows, by op: hidden_size, in_features, out_features, intermediate_size.
WIDTHS = [(name, letter) for name in ALL for letter in SCHEMAS[name].dims if letter in "HDNIU"]

# Several tiles of every kernel, sizes that descriptors can read: 16-byte rows.
MEDIUM: Mapping[str, Any] = {
    "T": 300, "E": 8, "G": 4, "K": 4, "D": 192, "N": 320, "H": 320, "I": 192, "U": 384, "A": 16, "B": 8,
    "in_features": 192, "hidden_size": 320, "num_experts": 8, "top_k": 4, "num_groups": 2, "top_groups": 1, "scaling_factor": 2.5,
}  # fmt: skip


def move(tensor: Tensor, device: torch.device | str = DEVICE) -> Tensor:
    """Return the same values in the same strides, at the same offset of a copy of the storage."""
    tensor = tensor.detach()
    storage = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    storage.set_(tensor.untyped_storage())
    return storage.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def move_sample(sample: Sample, device: torch.device | str = DEVICE) -> Sample:
    arguments = {
        name: move(value, device) if isinstance(value, Tensor) else value
        for name, value in sample.arguments.items()
    }
    return dataclasses.replace(sample, arguments=arguments)


def mix_dtypes(sample: Sample, seed: int) -> Sample:
    """Give router weights and biases fp32 or another dtype than the rows', two times in three."""
    dtype = (None, torch.float32, DTYPES[seed % 2])[seed % 3]
    others = [a.name for a in sample.schema.tensors if a.dtype == "floating"][1:]
    arguments = dict(sample.arguments)
    for name in others:
        if dtype is not None and arguments[name] is not None:
            layout = sample.layouts[name]
            arguments[name] = layouts.lay_out(arguments[name].to(dtype), layout)
    return dataclasses.replace(sample, arguments=arguments)


def to_cpu(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(output.detach().cpu() for output in checks.as_tuple(outputs))


def decided_sample(schema: OpSchema, seed: int, **fixed: Any) -> Sample:
    """Return the first sample from this seed on whose activations rounding moves over no kink."""
    samples = (seeded_sample(schema, seed + 1000 * i, **fixed) for i in range(200))
    return next(sample for sample in samples if checks.is_decided(sample))


def some_variants(name: str, at_most: int = 24) -> list[dict[str, Any]]:
    """Draw some of all combinations of flags, always in one order.

    Tests that draw medium samples of them, and give each its dtype by its place, so share kernels,
    whose compiling is most of what the GPU suite takes.
    """
    found = list(strategies.variants(SCHEMAS[name]))
    return random.Random(name).sample(found, len(found))[:at_most]


def medium_sample(name: str, seed: int, variant: Mapping[str, Any], **fixed: Any) -> Sample:
    chosen = {"layout": "contiguous", **MEDIUM, **variant, **fixed}
    return seeded_sample(SCHEMAS[name], seed, **chosen)


def alike(sample: Sample, name: str, seed: int, variant: Mapping[str, Any], **fixed: Any) -> Sample:
    """Return another medium sample whose tensors have the same shapes, strides and dtypes."""
    for other in range(seed + 1, seed + 200):
        candidate = medium_sample(name, other, variant, **fixed)
        if shapes(candidate) == shapes(sample):
            return candidate
    raise AssertionError(f"no sample like {sample}")


def shapes(sample: Sample) -> list[Any]:
    return [
        (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value
        for value in sample.arguments.values()
    ]


def corrupt_indices(sample: Sample) -> Iterator[dict[str, Tensor]]:
    """Yield index arguments with values that their contract excludes, also ones just outside it."""
    yield from corruptions(sample)
    for a in sample.schema.tensors:
        given = sample.arguments[a.name]
        if a.is_index and given is not None:
            for value in (-1, given.numel(), given.numel() - 1):
                yield {a.name: torch.full_like(given, value)}


def assert_same_bits(got: Any, want: Any, what: Any = "") -> None:
    """Check that results are the same bits; of a sample's, what its op's contract specifies."""
    if isinstance(what, Sample):
        got, want = checks.specified(what, got), checks.specified(what, want)
    for one, two in zip(checks.as_tuple(got), checks.as_tuple(want), strict=True):
        assert one.dtype == two.dtype, what
        assert one.shape == two.shape, what
        # Not torch.equal: a NaN is to be the same NaN.
        assert torch.equal(_bits(one), _bits(two)), what


def _bits(tensor: Tensor) -> Tensor:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(integers[tensor.element_size()])


def tangents(outputs: Any, seed: int = 0, layout: str = "contiguous") -> list[Tensor]:
    """Return a fixed random gradient, made on the CPU, for each floating output."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for output in checks.as_tuple(outputs):
        if output.is_floating_point():
            values = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            made.append(layouts.lay_out(values.to(output.dtype), layout))
    return made


def differentiable_output(outputs: Any) -> Tensor:
    first: Tensor = checks.as_tuple(outputs)[0]
    return first


def schema_has_floats(schema: OpSchema) -> bool:
    return any(a.dtype == "floating" for a in schema.tensors)


# Tests that hold tens of GiB: no more than this many at a time on a GPU, over all its workers.
LARGE_AT_A_TIME = 4


@contextlib.contextmanager
def memory_slot(all_of_them: bool = False) -> Iterator[None]:
    """Wait for one of the GPU's slots for tests that need much memory, or for all of them."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", "alone")
    # tests/gpu/conftest.py gives each worker its GPU, the first of these.
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    folder = Path(tempfile.gettempdir()) / f"moe_ops_memory_slots_{run}_{gpu}"
    folder.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((folder / str(i)).open("w")) for i in range(LARGE_AT_A_TIME)]
        # All are taken in their order, so that two who want them do not wait for each other.
        for choice in [[file] for file in files] if all_of_them else [files]:
            while not any(_locked(file) for file in choice):
                time.sleep(0.1)
        try:
            yield
        finally:
            # A graph of autograd's may be a cycle, which holds what it saved.
            gc.collect()
            torch.cuda.empty_cache()


def _locked(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

# SPDX-License-Identifier: Apache-2.0
"""Calls ops with corrupt counts and indices on CUDA: `python -m testing.corrupt_calls OP...`.

Triton launches each call once. Those whose tensors are all contiguous are replayed as well.

A program of its own, since an access out of bounds ends the process that makes it, and since
compute-sanitizer watches a whole process. "oob" in place of an op is one that does go out of
bounds, to see that the watcher would tell.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl

from moe_ops._core.library import SCHEMAS
from moe_ops._triton.replay import Record
from moe_ops.configs.device import HOPPER
from testing.launches import Launches, launches
from testing.on_device import DEVICE, corrupt_indices, move_sample, some_variants
from testing.strategies import PRESENT, Sample, seeded_sample

INDEX = (torch.int32, torch.int64)
# What one run under the sanitizer can hold, at its slowness.
VARIANTS = 5


@triton.jit
def _store_out_of_bounds_kernel(pointer, offset):
    tl.store(pointer + offset, 1.0)


# The ops of which some samples have to come to the kernels for Hopper, on such a GPU.
ON_HOPPER = ("grouped_gemm", "fused_experts", "fused_experts_forward")


def run(name: str) -> int:
    """Make every corrupt call of a few samples of the op, and return how many there were."""
    launched, count = Launches(), 0
    for sample in _samples(name):
        for corrupted in corrupt_indices(sample):
            run_corrupted(sample, corrupted, launched)
            count += 1
    if name in ON_HOPPER and torch.cuda.get_device_capability(DEVICE)[0] == HOPPER:
        assert launched.specialized("gemm"), name
    return count


def run_corrupted(sample: Sample, corrupted: dict[str, torch.Tensor], launched: Launches) -> None:
    """Make a corrupt call: by Triton, and by a replay where nothing has to be copied for it."""
    is_contiguous = set(sample.layouts.values()) == {"contiguous"}
    if is_contiguous:
        corrupted = {name: value.contiguous() for name, value in corrupted.items()}
    arguments = {**sample.arguments, **corrupted}
    call = move_sample(Sample(sample.schema, arguments, sample.layouts))
    # While Triton's launches are watched, nothing is recorded or replayed.
    with launches() as found:
        call()
    launched.names += found.names
    # An error is reported at the call that it belongs to.
    torch.cuda.synchronize()
    if not is_contiguous:
        return
    with _replays() as replayed:
        # A sample's first call is recorded here before it is replayed. A process does not count the
        # first call of an op.
        for _ in range(3):
            if not replayed:
                call()
                torch.cuda.synchronize()
    assert replayed, sample


@contextlib.contextmanager
def _replays() -> Iterator[list[Record]]:
    """Yield the records that are replayed inside."""
    found: list[Record] = []
    do_again = Record._replay

    def noted(record: Record, addresses: list[int]) -> Any:
        found.append(record)
        return do_again(record, addresses)

    with mock.patch.object(Record, "_replay", noted):
        yield found


def _samples(name: str) -> list[Sample]:
    schema = SCHEMAS[name]
    small = {"T": 3, "D": 17, "N": 8, "H": 17, "U": 10, "E": 4, "num_experts": 4, "top_k": 2}
    # Rows that descriptors can read, and enough of them for the kernels that do.
    large = {
        "T": 80, "D": 64, "N": 64, "H": 64, "I": 32, "U": 64, "A": 16, "B": 8, "in_features": 64,
        "hidden_size": 64, "capacity": 64, "E": 4, "num_experts": 4, "top_k": 2,
    }  # fmt: skip
    # Sizes for which the warp-specialised kernels are chosen.
    wide = {
        **large, "T": 320, "D": 256, "N": 256, "H": 256, "I": 256, "U": 512, "in_features": 256,
        "hidden_size": 256,
    }  # fmt: skip
    all_given = {a.name: PRESENT for a in schema.tensors if a.is_optional}
    permutations: list[dict[str, Any]] = [{}]
    if "permute_x" in {a.name for a in schema.arguments}:
        pairs = ((False, False), (True, False), (False, True))
        permutations = [{"permute_x": x, "permute_y": y} for x, y in pairs]
    fixed = [
        {**small, **variant, "dtype": torch.float32, "index_dtype": INDEX[seed % 2]}
        for seed, variant in enumerate(some_variants(name, VARIANTS))
    ] + [
        {**sizes, **all_given, **flags, "dtype": torch.bfloat16, "layout": "contiguous"}
        for sizes in (large, wide)
        for flags in permutations
    ]
    return [seeded_sample(schema, seed, **settings) for seed, settings in enumerate(fixed)]


def main(names: list[str]) -> None:
    for name in names:
        if name == "oob":
            _store_out_of_bounds_kernel[(1,)](torch.zeros(1, device=DEVICE), 1 << 20)
            torch.cuda.synchronize()
        else:
            print(name, run(name))
    print("done")


if __name__ == "__main__":
    main(sys.argv[1:])

# SPDX-License-Identifier: Apache-2.0
"""Calls the interpreted kernels with corrupt counts and indices, every tensor next to a guard page.

A program of its own, `python -m testing.guarded_calls end|start OP...`: an access out of
bounds is a segmentation fault. Each tensor ends where a page begins that may not be touched, or
starts where one ends. "oob" in place of an op goes out of bounds on purpose. "push" makes the ops of
expert parallelism push rows between ranks.
"""

import ctypes
import functools
import math
import mmap
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_ops._core.library import SCHEMAS
from moe_ops._triton.expert_parallel import Sizes
from moe_ops.ops.ep_combine.triton import push_combine, push_combine_backward
from moe_ops.ops.ep_dispatch.triton import push_dispatch, push_dispatch_backward
from testing import fast_interpreter
from testing.fake_pools import FakePool, FakeRanks
from testing.on_device import corrupt_indices, some_variants
from testing.strategies import Sample, seeded_sample

INDEX = (torch.int32, torch.int64)
VARIANTS = 2
SIZES = {"T": 3, "D": 17, "N": 8, "H": 17, "U": 10, "E": 4, "num_experts": 4, "top_k": 2}
PROT_NONE = 0
_zeros = torch.zeros
_mprotect = ctypes.CDLL(None, use_errno=True).mprotect


class Guarded:
    """Makes tensors of memory between two pages that may not be touched."""

    def __init__(self, side: str) -> None:
        self.at_end = side == "end"

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        inner = max(1, -(-size // mmap.PAGESIZE)) * mmap.PAGESIZE
        memory = mmap.mmap(-1, inner + 2 * mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for page in (address, address + mmap.PAGESIZE + inner):
            if _mprotect(ctypes.c_void_p(page), mmap.PAGESIZE, PROT_NONE) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        if size == 0:
            return _zeros(shape, dtype=dtype)
        offset = mmap.PAGESIZE + (inner - size if self.at_end else 0)
        # The tensor keeps `memory` alive.
        flat = torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=offset)
        return flat.view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        return self.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)

    def install(self) -> None:
        """Guard what launchers allocate too."""

        def of_shape(original: Callable[..., Tensor], fill: bool) -> Callable[..., Tensor]:
            def empty(*sizes: Any, dtype: Any = None, device: Any = None) -> Tensor:
                shape = sizes[0] if isinstance(sizes[0], (tuple, list, torch.Size)) else sizes
                made = self.empty(tuple(shape), dtype or torch.get_default_dtype())
                return made.zero_() if fill else made.fill_(3)

            return empty

        def of_tensor(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def new_empty(
                tensor: Tensor, *sizes: Any, dtype: Any = None, device: Any = None
            ) -> Tensor:
                return make(*sizes, dtype=dtype or tensor.dtype)

            return new_empty

        empty, zeros = of_shape(torch.empty, False), of_shape(torch.zeros, True)
        torch.Tensor.new_empty = of_tensor(empty)  # type: ignore[method-assign]
        torch.Tensor.new_zeros = of_tensor(zeros)  # type: ignore[method-assign]
        torch.empty = empty
        torch.zeros = zeros


@triton.jit
def _store_out_of_bounds_kernel(pointer, offset):
    tl.store(pointer + offset, 1.0)


def run(name: str, guarded: Guarded) -> int:
    """Make every corrupt call of a few samples of the op, and return how many there were."""
    count = 0
    for seed, variant in enumerate(some_variants(name, VARIANTS)):
        sample = seeded_sample(
            SCHEMAS[name], seed, **SIZES, **variant,
            dtype=torch.float32, index_dtype=INDEX[seed % 2], layout="contiguous",
        )  # fmt: skip
        calls = [{**sample.arguments, **corrupted} for corrupted in corrupt_indices(sample)]
        for arguments in calls:
            moved = {
                n: guarded.copy(value) if isinstance(value, Tensor) else value
                for n, value in arguments.items()
            }
            Sample(sample.schema, moved, sample.layouts)()
            count += 1
    return count


def run_push(guarded: Guarded) -> int:
    """Let two ranks push rows where their indices say, which are corrupt; return how often."""
    sizes = Sizes(4, 2, 3, 3)
    num_rows, columns, num_tokens, width = sizes.num_rows, sizes.columns, 5, 17
    largest = torch.iinfo(torch.int64).max
    values = (-1, -7, 0, 3, 4, sizes.num_places - 1, sizes.num_places, 2**31, largest, -largest - 1)

    def indices(value: int, rows: int, length: int) -> Tensor:
        return guarded.empty((rows, length), torch.int64).fill_(value)

    def work(value: int, rank: int, pool: FakePool) -> None:
        tokens, rows = (guarded.empty((n, width), torch.float32) for n in (num_tokens, num_rows))
        weights = guarded.empty((num_tokens, sizes.top_k), torch.float16)
        local_weights = guarded.empty((num_rows, columns), torch.float16)
        local_ids = indices(value, num_rows, columns)
        # The ranks go out of their ways differently.
        places = indices(value if rank == 0 else ~value, num_tokens, sizes.top_k)
        push_dispatch(pool, tokens, places, weights, sizes)
        push_combine(pool, rows, local_ids, places, sizes)
        push_combine_backward(pool, tokens, places, sizes)
        needs = [True, True]
        push_dispatch_backward(pool, rows, local_weights, local_ids, places, sizes, needs)

    count = 0
    for value in values:
        # A half has no room to spare.
        half_bytes = 1024
        ranks = FakeRanks(2, half_bytes, empty=guarded.empty)
        ranks.run(functools.partial(work, value))
        assert {pool.largest for pool in ranks.pools} == {half_bytes}
        count += 1
    return count


def main(side: str, *names: str) -> None:
    fast_interpreter.install()
    guarded = Guarded(side)
    guarded.install()
    for name in names:
        if name == "oob":
            tensor = guarded.empty((5,), torch.float32)
            _store_out_of_bounds_kernel[(1,)](tensor, 5 if side == "end" else -1)
        else:
            print(name, run_push(guarded) if name == "push" else run(name, guarded))
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])

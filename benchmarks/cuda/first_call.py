# SPDX-License-Identifier: Apache-2.0
"""The first call of a process, with an empty Triton cache and with a warm one."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.cuda.timing import Bench, Case, Record, rounded
from benchmarks.suite import Shape

ROOT = Path(__file__).resolve().parents[2]

FIRST_CALL = """
import sys, time
import torch, moe_ops
from benchmarks.suite import Routing, Shape
name, device, dtype, *sizes = sys.argv[1:]
device, dtype = torch.device(device), getattr(torch, dtype)
shape = Shape(name, *map(int, sizes))
counts = Routing.draw(shape, "uniform", device).counts
options = {"dtype": dtype, "device": device, "requires_grad": True}
x = torch.randn(shape.num_rows, shape.hidden_size, **options)
weight = torch.randn(shape.num_experts, *shape.features("up"), **options)
grad = torch.randn(shape.num_rows, shape.features("up")[0], dtype=dtype, device=device)
synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
synchronize()
for _ in range(2):
    begin = time.perf_counter()
    torch.autograd.grad(moe_ops.grouped_gemm(x, weight, counts), (x, weight), grad)
    synchronize()
    print(time.perf_counter() - begin)
"""


def cases(bench: Bench, shapes: Iterable[Shape]) -> Iterator[Case]:
    for shape in list(shapes)[:1]:
        yield shape.name, functools.partial(run_first_call, bench, shape)


def run_first_call(bench: Bench, shape: Shape) -> Iterator[Record]:
    """Forward and backward in fresh processes; the first of them finds an empty Triton cache."""
    sizes = (
        shape.num_tokens, shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k,
    )  # fmt: skip
    dtype = str(bench.dtype).removeprefix("torch.")
    command = [sys.executable, "-c", FIRST_CALL, shape.name, str(bench.device), dtype]
    command += map(str, sizes)
    with tempfile.TemporaryDirectory() as cache:
        environ = {**os.environ, "TRITON_CACHE_DIR": cache}
        for state in ("empty", "warm", "warm"):
            done = subprocess.run(
                command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(f"the fresh process failed:\n{done.stderr}")
            first, second = map(float, done.stdout.split())
            seconds = {"first": rounded(first), "second": rounded(second)}
            yield {"shape": shape.name, "triton_cache": state, "seconds": seconds}

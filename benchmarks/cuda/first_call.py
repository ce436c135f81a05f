# SPDX-License-Identifier: Apache-2.0
"""The first call of a process, with an empty Triton cache and with a warm one."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.cuda.timing import Bench, Case, Record, rounded
from benchmarks.suite import Shape

ROOT = Path(__file__).resolve().parents[2]

# A fresh process prints the seconds of torch's own first gradient, then of the first two calls of
# `step`, forward and backward. torch.autograd imports a good deal when it is first given a grad_output,
# whatever the gradient is of.
_SCRIPT = """
import json, sys, time
import torch, moe_ops
from benchmarks.cuda.experts import BOTH, Block, ours
from benchmarks.cuda.timing import Bench
from benchmarks.suite import Routing, Shape

device, tiny, sizes = json.loads(sys.argv[1])
bench, shape = Bench(torch.device(device), tiny), Shape(*sizes)

def tell_seconds(call):
    bench.synchronize()
    begin = time.perf_counter()
    call()
    bench.synchronize()
    print(time.perf_counter() - begin)

leaf = bench.randn(64, 64).requires_grad_()
tell_seconds(lambda: torch.autograd.grad(leaf @ leaf, leaf, leaf.detach()))
{step}
tell_seconds(step)
tell_seconds(step)
"""
_GEMM_STEP = """
counts = Routing.draw(shape, "uniform", bench.device).counts
x = bench.randn(shape.num_rows, shape.hidden_size).requires_grad_()
weight = bench.randn(shape.num_experts, *shape.features("up")).requires_grad_()
grad = bench.randn(shape.num_rows, shape.features("up")[0])
step = lambda: torch.autograd.grad(moe_ops.grouped_gemm(x, weight, counts), (x, weight), grad)
"""
_EXPERTS_STEP = """
block = Block(bench, shape)
step = ours(block).call(BOTH, block.route("uniform"), block.grad_output)
"""


def cases(bench: Bench, shapes: Iterable[Shape]) -> Iterator[Case]:
    """Of grouped_gemm."""
    for shape in list(shapes)[:1]:
        yield shape.name, functools.partial(run_first_call, bench, shape, _GEMM_STEP)


def experts_cases(bench: Bench, shapes: Iterable[Shape]) -> Iterator[Case]:
    """Of fused_experts."""
    for shape in list(shapes)[:1]:
        yield shape.name, functools.partial(run_first_call, bench, shape, _EXPERTS_STEP)


def run_first_call(bench: Bench, shape: Shape, step: str) -> Iterator[Record]:
    """Forward and backward in fresh processes; the first of them finds an empty Triton cache."""
    given = json.dumps([str(bench.device), bench.tiny, dataclasses.astuple(shape)])
    command = [sys.executable, "-c", _SCRIPT.format(step=step), given]
    with tempfile.TemporaryDirectory() as cache:
        environ = {**os.environ, "TRITON_CACHE_DIR": cache}
        for state in ("empty", "warm", "warm"):
            done = subprocess.run(
                command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(f"the fresh process failed:\n{done.stderr}")
            names = ("torch alone", "first", "second")
            told = map(float, done.stdout.split())
            seconds = {name: rounded(s) for name, s in zip(names, told, strict=True)}
            yield {"shape": shape.name, "triton_cache": state, "seconds": seconds}

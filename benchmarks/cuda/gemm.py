# SPDX-License-Identifier: Apache-2.0
"""The grouped GEMM's three passes, against torch's and a dense product of as many operations.

T num_tokens, E num_experts, K top_k, R = T * K routed rows; N and D, the out_features and
in_features of a projection.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import multiprocessing
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

import moe_ops  # noqa: F401  registers torch.ops.moe
from benchmarks import suite
from benchmarks.cuda.timing import (
    OURS,
    TORCH,
    Bench,
    Call,
    Case,
    Record,
    compare,
    free,
    poisoned_memory,
    relative_error,
    rounded,
    worst,
)
from benchmarks.suite import Routing, Shape

moe = torch.ops.moe

# What is compared, beside OURS and TORCH.
DENSE = "dense"
OURS_PERMUTED, TORCH_PERMUTED = f"{OURS} permuted", f"{TORCH} permuted"
PASSES = ("forward", "dX", "dW")


class Gemm:
    """One projection: its operands, and its three passes by ours, by torch and by cuBLAS.

    Permuted, an up projection gathers its input from token order and a down projection scatters its
    output to slot order, within the op or, for torch, in a call of its own.
    """

    def __init__(self, bench: Bench, shape: Shape, routing: str, projection: str) -> None:
        self.bench, self.shape = bench, shape
        self.out_features, self.in_features = shape.features(projection)
        self.is_up = projection == "up"
        self.routing = Routing.draw(shape, routing, bench.device)
        num_rows = shape.num_rows
        self.weight = bench.randn(shape.num_experts, self.out_features, self.in_features)
        self.dy = bench.randn(num_rows, self.out_features)
        if self.is_up:
            self.tokens = bench.randn(shape.num_tokens, self.in_features)
            self.x = self.tokens.index_select(0, self.routing.tokens)
        else:
            self.x = bench.randn(num_rows, self.in_features)
            self.dy_slots = self.dy.index_select(0, self.routing.scatter)

    def ours(self, name: str, permuted: bool) -> Call:
        """A pass by our op, without autograd."""
        px, py = permuted and self.is_up, permuted and not self.is_up
        x, dy = self.tokens if px else self.x, self.dy_slots if py else self.dy
        counts, gather = self.routing.counts, self.routing.gather if permuted else None
        flags = (self.shape.top_k if permuted else 1, px, py)
        needs = [True, False]
        if name == "forward":
            return lambda: moe.grouped_gemm(x, self.weight, counts, gather, None, None, *flags)
        if name == "dX":
            return lambda: moe.grouped_gemm_dx(
                dy, self.weight, counts, gather, None, None, None, *flags, needs
            )[0]
        return lambda: moe.grouped_gemm_dw(dy, x, counts, gather, None, *flags, needs, False)[0]

    def torchs(self, name: str, permuted: bool) -> Call:
        px, py = permuted and self.is_up, permuted and not self.is_up
        routing, weight, ends = self.routing, self.weight, self.routing.ends

        def x() -> Tensor:
            return self.tokens.index_select(0, routing.tokens) if px else self.x

        def dy() -> Tensor:
            return self.dy_slots.index_select(0, routing.gather) if py else self.dy

        def forward() -> Tensor:
            y = torch._grouped_mm(x(), weight.transpose(1, 2), ends)
            return y.index_select(0, routing.scatter) if py else y

        def dx() -> Tensor:
            rows = torch._grouped_mm(dy(), weight, ends)
            if not px:
                return rows
            slots = rows.index_select(0, routing.scatter)
            return slots.view(-1, self.shape.top_k, self.in_features).sum(1)

        calls = {"forward": forward, "dX": dx, "dW": lambda: torch._grouped_mm(dy().t(), x(), ends)}
        return calls[name]

    def dense_operands(self, name: str) -> tuple[Tensor, Tensor]:
        """Of one product of as many operations."""
        if name == "dW":
            return self.dy.t(), self.x
        return (self.x, self.weight[0].t()) if name == "forward" else (self.dy, self.weight[0])

    def error(self, name: str, result: Tensor) -> float:
        """The worst relative error of a pass over a few experts, against fp32."""
        ends = self.routing.ends.tolist()
        errors = []
        for e in few_experts(self.routing.counts):
            rows = slice(ends[e - 1] if e else 0, ends[e])
            if name == "dW":
                got, want = result[e], self.dy[rows].float().t() @ self.x[rows].float()
            elif name == "dX":
                got, want = result[rows], self.dy[rows].float() @ self.weight[e].float()
            else:
                got, want = result[rows], self.x[rows].float() @ self.weight[e].float().t()
            errors.append(relative_error(got, want))
        return worst(errors)

    def permuted_error(self, name: str, result: Tensor, plain: Tensor) -> float:
        """The relative error of a permuted pass, given what the plain one found."""
        if name == "forward" and not self.is_up:
            plain = plain.index_select(0, self.routing.scatter)
        if name == "dX" and self.is_up:
            slots = plain.index_select(0, self.routing.scatter)
            slots = slots.view(-1, self.shape.top_k, self.in_features)
            plain = slots.sum(1, dtype=torch.float32)
        return relative_error(result, plain)

    def errors(self, name: str, calls: dict[str, Call]) -> dict[str, float]:
        """Of every call: a few experts against fp32, and all of the result against torch's."""
        found = {}
        with poisoned_memory():
            plain = calls[OURS]()
            found[OURS] = self.error(name, plain)
            permuted = calls[OURS_PERMUTED]()
        found[OURS_PERMUTED] = self.permuted_error(name, permuted, plain)
        del permuted
        torchs = calls[TORCH]()
        found[TORCH] = self.error(name, torchs)
        if found[TORCH] <= self.bench.tolerance:
            found[OURS] = worst([found[OURS], relative_error(plain, torchs)])
        del plain
        found[TORCH_PERMUTED] = self.permuted_error(name, calls[TORCH_PERMUTED](), torchs)
        left, right = self.dense_operands(name)
        expected = left[:64].float() @ right.float()
        found[DENSE] = relative_error((left @ right)[:64], expected)
        return found

    def measure(self, name: str) -> Record:
        left, right = self.dense_operands(name)
        calls: dict[str, Call] = {
            OURS: self.ours(name, permuted=False),
            OURS_PERMUTED: self.ours(name, permuted=True),
            TORCH: self.torchs(name, permuted=False),
            TORCH_PERMUTED: self.torchs(name, permuted=True),
            DENSE: lambda: left @ right,
        }
        ratios = {
            TORCH: (TORCH, OURS),
            TORCH_PERMUTED: (TORCH_PERMUTED, OURS_PERMUTED),
            DENSE: (DENSE, OURS),
            # What permuting costs us.
            "permuted": (OURS_PERMUTED, OURS),
        }
        record = compare(self.bench, calls, self.errors(name, calls), ratios)
        flops = 2 * self.shape.num_rows * self.out_features * self.in_features
        record["tflops"] = {
            call: rounded(flops / median / 1e9)
            for call, (_, median, _) in record["milliseconds"].items()
        }
        if OURS in record["tflops"]:
            reached = record["tflops"][OURS] / self.bench.ceilings["dense_tflops"]
            record["of_dense_ceiling"] = rounded(reached)
        return record


def few_experts(counts: Tensor) -> list[int]:
    """The expert of most rows, that of fewest, the last of any, and one of none."""
    rows = counts.tolist()
    some = [e for e, n in enumerate(rows) if n]
    none = [e for e, n in enumerate(rows) if not n]
    return (
        sorted({max(some, key=rows.__getitem__), min(some, key=rows.__getitem__), some[-1]})
        + (none[-1:])
    )


def cases(bench: Bench, shapes: Iterable[Shape]) -> Iterator[Case]:
    for shape in shapes:
        routings = suite.ROUTINGS if shape.name in suite.EVERY_ROUTING else suite.ROUTINGS[:1]
        for routing, projection in itertools.product(routings, suite.PROJECTIONS):
            run = functools.partial(run_gemm, bench, shape, routing, projection)
            yield f"{shape.name} {routing} {projection}", run


def run_gemm(bench: Bench, shape: Shape, routing: str, projection: str) -> Iterator[Record]:
    gemm = Gemm(bench, shape, routing, projection)
    sizes = {"E": shape.num_experts, "N": gemm.out_features, "D": gemm.in_features}
    case = {"shape": shape.name, "routing": routing, "projection": projection, **sizes}
    for name in PASSES:
        yield {**case, "R": shape.num_rows, "pass": name, **gemm.measure(name)}


def compile_gemm(bench: Bench, shape: Shape, projection: str) -> None:
    """Leaves the kernels of a projection in Triton's cache on disk."""
    gemm = Gemm(bench, shape, "uniform", projection)
    for name, permuted in itertools.product(PASSES, (False, True)):
        gemm.ours(name, permuted)()
    bench.synchronize()
    del gemm
    free()


def compile_ahead(bench: Bench, shapes: Iterable[Shape], processes: int) -> None:
    """Compiling one kernel after the other would take longer than measuring them."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        jobs = {
            pool.submit(compile_gemm, bench, shape, projection): f"{shape.name} {projection}"
            for shape, projection in itertools.product(shapes, suite.PROJECTIONS)
        }
        for job in concurrent.futures.as_completed(jobs):
            if job.exception() is not None:
                print(f"compiling {jobs[job]} ahead: {job.exception()}", flush=True)

# SPDX-License-Identifier: Apache-2.0
"""What a call costs the CPU, against its launches alone and an op that does nothing."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

import moe_ops  # noqa: F401  registers torch.ops.moe
from benchmarks.cuda.timing import (
    OURS,
    Bench,
    Call,
    Case,
    Record,
    quartiles,
    recorded_launches,
    rounded,
)
from benchmarks.suite import Routing, Shape
from moe_ops._core.library import SCHEMAS

moe = torch.ops.moe


def cases(bench: Bench, shapes: Iterable[Shape]) -> Iterator[Case]:
    del shapes
    for label, (op, args) in _dispatch_calls(bench).items():
        yield label, functools.partial(run_dispatch, bench, label, op, args)


def _dispatch_calls(bench: Bench) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Small inputs: what the device does is done before the next call is made."""
    shape = Shape("", 16, 128, 64, 8, 2)
    routing = Routing.draw(shape, "uniform", bench.device)
    gather, scatter, counts = routing.gather, routing.scatter, routing.counts
    x, rows = bench.randn(16, 128), bench.randn(32, 128)
    weight = bench.randn(8, 128, 128)
    logits = bench.randn(16, 8)
    ids = torch.rand(16, 8, device=bench.device).topk(2, 1).indices.int()
    topk_weights = torch.rand(16, 2, device=bench.device)
    calls: dict[str, tuple[str, tuple[Any, ...]]] = {
        "grouped_gemm": ("grouped_gemm", (rows, weight, counts)),
        "grouped_gemm, permute_x": (
            "grouped_gemm",
            (x, weight, counts, gather, None, None, 2, True),
        ),
        "grouped_gemm, permute_y": (
            "grouped_gemm",
            (rows, weight, counts, gather, None, None, 2, False, True),
        ),
        "permute": ("permute", (x, gather, 2, scatter)),
        "unpermute": ("unpermute", (rows, gather, topk_weights, 2, scatter)),
        "routing_indices": ("routing_indices", (ids, 8)),
        "topk_routing": ("topk_routing", (logits, 2)),
    }
    if not bench.tiny:
        # Enough rows for the kernels that take descriptors, whose making costs the CPU time.
        many = Routing.draw(shape, "uniform", bench.device, num_tokens=1024)
        calls["grouped_gemm, descriptors"] = (
            "grouped_gemm",
            (bench.randn(2048, 128), weight, many.counts),
        )
    return calls


def run_dispatch(bench: Bench, label: str, op: str, args: tuple[Any, ...]) -> Iterator[Record]:
    overload = getattr(moe, op).default
    with torch.no_grad():
        outputs = overload(*args)
        with recorded_launches() as launches:
            overload(*args)
        bare = _bare_op(op, label, outputs, bench.device)

        def launch() -> None:
            for again in launches:
                again()

        calls: dict[str, Call] = {
            OURS: lambda: overload(*args),
            "launches": launch,
            "bare op": lambda: bare(*args),
        }
        turns, iterations = (2, 1) if bench.tiny else (25, 100)
        times: dict[str, list[float]] = {name: [] for name in calls}
        # The first turn warms up.
        for turn in range(turns + 1):
            for name, call in calls.items():
                bench.synchronize()
                begin = time.perf_counter_ns()
                for _ in range(iterations):
                    call()
                if turn:
                    times[name].append((time.perf_counter_ns() - begin) / iterations / 1e3)
    medians = {name: statistics.median(each) for name, each in times.items()}
    yield {
        "call": label,
        "kernels": len(launches),
        "microseconds": {name: quartiles(each) for name, each in times.items()},
        "of_bare_op": rounded((medians[OURS] - medians["launches"]) / medians["bare op"]),
    }


def _bare_op(op: str, label: str, outputs: object, device: torch.device) -> Callable[..., object]:
    """An op of the same schema whose kernel does nothing."""
    name = "".join(c if c.isalnum() else "_" for c in label)
    library = _bare_library()
    library.define(name + SCHEMAS[op].schema)
    library.impl(name, lambda *_: outputs, device.type.upper())
    overload: Callable[..., object] = getattr(torch.ops.moe_ops_benchmark, name).default
    return overload


@functools.cache
def _bare_library() -> torch.library.Library:
    return torch.library.Library("moe_ops_benchmark", "FRAGMENT")

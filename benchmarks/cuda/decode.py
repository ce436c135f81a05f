# SPDX-License-Identifier: Apache-2.0
"""The grouped GEMM of a decoding step, against torch's and the reading of the weights that it touches.

T num_tokens.
"""

from __future__ import annotations

import functools
import itertools
import math
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
    Captured,
    Case,
    Record,
    compare,
    errors_of,
    read_experts,
    relative_error,
    rounded,
)
from benchmarks.suite import Routing, Shape
from testing import reference

moe = torch.ops.moe

# What is compared, beside OURS and TORCH.
READ = "read"


def cases(bench: Bench, shapes: Iterable[Shape]) -> Iterator[Case]:
    del shapes
    shape = suite.TINY_DECODE if bench.tiny else suite.DECODE
    tokens = suite.TINY_DECODE_TOKENS if bench.tiny else suite.DECODE_TOKENS
    for projection, num_tokens in itertools.product(suite.PROJECTIONS, tokens):
        run = functools.partial(run_decode, bench, shape, projection, num_tokens)
        yield f"{shape.name} {projection} T={num_tokens}", run


def run_decode(bench: Bench, shape: Shape, projection: str, num_tokens: int) -> Iterator[Record]:
    """Many calls in one graph, each with experts of its own out of 1 GiB of weights or more."""
    out_features, in_features = shape.features(projection)
    is_up = projection == "up"
    num_bytes = out_features * in_features * bench.dtype.itemsize
    num_weights = 2 if bench.tiny else math.ceil(2**30 / (shape.num_experts * num_bytes))
    num_calls = 2 if bench.tiny else 16
    weights = [
        bench.randn(shape.num_experts, out_features, in_features) for _ in range(num_weights)
    ]
    calls: dict[str, list[Call]] = {OURS: [], TORCH: [], READ: []}
    touched = 0
    for i in range(num_calls):
        routing = Routing.draw(shape, "uniform", bench.device, i, num_tokens)
        x = bench.randn(num_tokens if is_up else num_tokens * shape.top_k, in_features)
        experts = routing.counts.nonzero().view(-1).int()
        touched += len(experts)
        call = _Decoding(weights[i % num_weights], x, routing, experts, is_up, shape.top_k)
        for name, way in ((OURS, call.ours), (TORCH, call.torchs), (READ, call.read)):
            calls[name].append(way)
        if i == 0:
            first = call
    errors = first.errors()
    graphs = {name: Captured(bench, each) for name, each in calls.items()}
    ratios = {TORCH: (TORCH, OURS), "of read": (OURS, READ)}
    record = compare(bench, graphs, errors, ratios)
    touched_bytes = touched * num_bytes / num_calls
    floor = touched_bytes / bench.ceilings["read_tbs"] / 1e9
    record |= {"touched_bytes": round(touched_bytes), "floor_milliseconds": rounded(floor)}
    if OURS in record["milliseconds"]:
        record["of_floor"] = rounded(record["milliseconds"][OURS][1] / floor)
    yield {"shape": shape.name, "projection": projection, "T": num_tokens, **record}


class _Decoding:
    """One product of a decoding step; up gathers its input, down takes it as it is."""

    def __init__(
        self,
        weight: Tensor,
        x: Tensor,
        routing: Routing,
        experts: Tensor,
        is_up: bool,
        top_k: int,
    ) -> None:
        self.weight, self.x, self.routing, self.experts = weight, x, routing, experts
        self.is_up, self.top_k = is_up, top_k

    def ours(self) -> Tensor:
        counts, gather = self.routing.counts, self.routing.gather
        if self.is_up:
            return moe.grouped_gemm(
                self.x, self.weight, counts, gather, None, None, self.top_k, True
            )
        return moe.grouped_gemm(self.x, self.weight, counts)

    def rows(self) -> Tensor:
        return self.x.index_select(0, self.routing.tokens) if self.is_up else self.x

    def torchs(self) -> Tensor:
        return torch._grouped_mm(self.rows(), self.weight.transpose(1, 2), self.routing.ends)

    def read(self) -> Tensor:
        return read_experts(self.weight, self.experts)

    def errors(self) -> dict[str, float]:
        """All of the results against the fp64 reference."""
        expected = reference.grouped_gemm(self.rows(), self.weight, self.routing.counts)
        sums = torch.stack([self.weight[e].sum(dtype=torch.float32) for e in self.experts.tolist()])
        found = errors_of({OURS: self.ours, TORCH: self.torchs}, lambda: expected)
        return {**found, READ: relative_error(self.read().sum(1), sums)}

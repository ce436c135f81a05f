# SPDX-License-Identifier: Apache-2.0
"""The ops that move rows: permute, unpermute and its backward, against torch's and the copy ceiling."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

import moe_ops  # noqa: F401  registers torch.ops.moe
from benchmarks.cuda.timing import (
    OURS,
    TORCH,
    Bench,
    Call,
    Case,
    Record,
    compare,
    errors_of,
    rounded,
)
from benchmarks.suite import Routing, Shape

moe = torch.ops.moe


def cases(bench: Bench, shapes: Iterable[Shape]) -> Iterator[Case]:
    for shape in shapes:
        yield shape.name, functools.partial(run_rows, bench, shape)


def run_rows(bench: Bench, shape: Shape) -> Iterator[Record]:
    routing = Routing.draw(shape, "uniform", bench.device)
    num_tokens, num_rows, top_k = shape.num_tokens, shape.num_rows, shape.top_k
    gather, scatter, tokens = routing.gather, routing.scatter, routing.tokens
    x = bench.randn(num_tokens, shape.hidden_size)
    rows = bench.randn(num_rows, shape.hidden_size)
    # As topk_routing gives them; torch's calls get them in the rows' dtype, which is faster.
    weights = torch.rand(num_tokens, top_k, device=bench.device) + 0.1
    low_weights = weights.to(bench.dtype)

    def torch_permute() -> Tensor:
        return x.index_select(0, tokens)

    def torch_unpermute() -> Tensor:
        slots = rows.index_select(0, scatter).view(num_tokens, top_k, -1)
        return (slots * low_weights[:, :, None]).sum(1)

    def torch_backward() -> tuple[Tensor, Tensor]:
        grad_rows = x.index_select(0, tokens)
        grad_weights = (grad_rows * rows).sum(1).index_select(0, scatter).view(num_tokens, top_k)
        row_weights = low_weights.view(-1).index_select(0, gather)
        return grad_rows * row_weights[:, None], grad_weights

    def expected_backward() -> tuple[Tensor, Tensor]:
        grad_rows = x.index_select(0, tokens).float()
        dots = (grad_rows * rows.float()).sum(1).index_select(0, scatter)
        scale = weights.view(-1).index_select(0, gather)[:, None]
        return grad_rows * scale, dots.view(num_tokens, top_k)

    def expected_unpermute() -> Tensor:
        slots = rows.float().index_select(0, scatter).view(num_tokens, top_k, -1)
        return (slots * weights[:, :, None]).sum(1)

    needs = [True, True]
    token_bytes, row_bytes = (t.numel() * t.element_size() for t in (x, rows))
    slot_bytes = 4 * num_rows
    ops: dict[str, tuple[Call, Call, Call, int]] = {
        "permute": (
            lambda: moe.permute(x, gather, top_k, scatter),
            torch_permute,
            torch_permute,
            token_bytes + row_bytes + slot_bytes,
        ),
        "unpermute": (
            lambda: moe.unpermute(rows, gather, weights, top_k, scatter),
            torch_unpermute,
            expected_unpermute,
            token_bytes + row_bytes + 2 * slot_bytes,
        ),
        "unpermute_backward": (
            lambda: moe.unpermute_backward(x, rows, gather, weights, top_k, scatter, needs),
            torch_backward,
            expected_backward,
            token_bytes + 2 * row_bytes + 3 * slot_bytes,
        ),
    }
    for op, (ours, torchs, reference, num_bytes) in ops.items():
        calls = {OURS: ours, TORCH: torchs}
        ratios = {TORCH: (TORCH, OURS)}
        if bench.device.type == "cuda" and op == "unpermute":
            calls["compiled"] = torch.compile(torchs, fullgraph=True)
            ratios["compiled"] = ("compiled", OURS)
        errors = errors_of(calls, reference)
        record: Record = {"shape": shape.name, "op": op, "bytes": num_bytes}
        record |= compare(bench, calls, errors, ratios)
        if OURS in record["milliseconds"]:
            reached = num_bytes / record["milliseconds"][OURS][1] / 1e9
            record["tbs"] = rounded(reached)
            record["of_copy_ceiling"] = rounded(reached / bench.ceilings["copy_tbs"])
        yield record

# SPDX-License-Identifier: Apache-2.0
"""The routing ops against torch's: routing_indices, topk_routing and its gradient.

T num_tokens, E num_experts, K top_k.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

import moe_ops  # noqa: F401  registers torch.ops.moe
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
)
from benchmarks.suite import Shape

moe = torch.ops.moe

Way = Callable[[Tensor], Any]


def cases(bench: Bench, shapes: Iterable[Shape]) -> Iterator[Case]:
    del shapes
    for num_experts in (8,) if bench.tiny else (128, 8, 64, 256, 512):
        run = functools.partial(run_routing_indices, bench, num_experts)
        yield f"routing_indices E={num_experts}", run
    yield "topk_routing", functools.partial(run_topk_routing, bench)


def run_routing_indices(bench: Bench, num_experts: int) -> Iterator[Record]:
    num_slots, copies = (64, 2) if bench.tiny else (131072, 20)
    top_k = 2 if num_experts <= 8 else 8
    shape = Shape("", num_slots // top_k, 0, 0, num_experts, top_k)
    ids = [
        torch.rand(shape.num_tokens, num_experts, device=bench.device).topk(top_k, 1).indices.int()
        for _ in range(copies)
    ]

    def inverse(order: Tensor) -> Tensor:
        scatter = torch.empty_like(order)
        scatter[order] = torch.arange(num_slots, device=bench.device)
        return scatter

    def with_bincount(ids: Tensor) -> tuple[Tensor, ...]:
        flat = ids.view(-1)
        order = flat.argsort(stable=True)
        return torch.bincount(flat, minlength=num_experts), order, inverse(order)

    ones = torch.ones(num_slots, dtype=torch.int32, device=bench.device)

    def with_scatter_add(ids: Tensor) -> tuple[Tensor, ...]:
        # bincount waits for the device, so a graph cannot hold it.
        flat = ids.view(-1)
        order = flat.argsort(stable=True)
        counts = torch.zeros(num_experts, dtype=torch.int32, device=bench.device)
        return counts.scatter_add_(0, flat.long(), ones), order, inverse(order)

    def ours(ids: Tensor) -> tuple[Tensor, ...]:
        return moe.routing_indices(ids, num_experts)

    ways = {OURS: ours, TORCH: with_bincount, "torch, no sync": with_scatter_add}
    single: dict[str, Call] = {name: functools.partial(way, ids[0]) for name, way in ways.items()}
    flat = ids[0].view(-1).cpu().long()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=num_experts)
    want = tuple(t.to(bench.device) for t in (counts, order, order.argsort()))
    errors = errors_of(single, lambda: want)
    graphs = {
        f"{name}, graph": Captured(bench, [functools.partial(ways[name], each) for each in ids])
        for name in (OURS, "torch, no sync")
    }
    errors |= {name: errors[name.removesuffix(", graph")] for name in graphs}
    record = compare(
        bench,
        {**single, **graphs},
        errors,
        {
            "eager": (TORCH, OURS),
            "graph": ("torch, no sync, graph", f"{OURS}, graph"),
            "eager torch, ours in a graph": (TORCH, f"{OURS}, graph"),
        },
    )
    yield {"op": "routing_indices", "E": num_experts, "slots": num_slots, **record}


def run_topk_routing(bench: Bench) -> Iterator[Record]:
    num_tokens, num_experts, top_k, copies = (8, 8, 2, 2) if bench.tiny else (16384, 128, 8, 10)
    # fp32: of bf16 ones, many would be alike.
    logits = [torch.randn(num_tokens, num_experts, device=bench.device) for _ in range(copies)]
    grad = torch.randn(num_tokens, top_k, device=bench.device)

    def ours(logits: Tensor) -> tuple[Tensor, ...]:
        return moe.topk_routing(logits, top_k, None, "softmax", True, True)

    def torchs(logits: Tensor) -> tuple[Tensor, ...]:
        weights, ids = logits.softmax(1, dtype=torch.float32).topk(top_k, 1)
        return weights / weights.sum(1, keepdim=True), ids

    def with_gradient(way: Way, logits: Tensor) -> Tensor:
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(way(leaf)[0], leaf, grad)[0]

    def in_double(logits: Tensor) -> Tensor:
        weights, _ = logits.double().softmax(1).topk(top_k, 1)
        return weights / weights.sum(1, keepdim=True)

    def with_own_weights(way: Way) -> tuple[Tensor, Tensor]:
        # Of two that fp32 cannot tell apart either may be chosen: judged are weights, not ids.
        weights, ids = way(logits[0])
        chosen = logits[0].double().softmax(1).gather(1, ids.long())
        return weights, chosen / chosen.sum(1, keepdim=True)

    def gradient_in_double() -> Tensor:
        leaf = logits[0].double().requires_grad_()
        return torch.autograd.grad(in_double(leaf), leaf, grad.double())[0]

    def measure(name: str, ways: dict[str, Way], checked: dict[str, Call], want: Call) -> Record:
        errors = errors_of(checked, want)
        graphs = {
            key: Captured(bench, [functools.partial(way, each) for each in logits])
            for key, way in ways.items()
        }
        record = compare(bench, graphs, errors, {TORCH: (TORCH, OURS)})
        sizes = {"T": num_tokens, "E": num_experts, "K": top_k}
        return {"op": "topk_routing", **sizes, "pass": name, **record}

    ways: dict[str, Way] = {OURS: ours, TORCH: torchs}
    checked: dict[str, Call] = {
        key: functools.partial(with_own_weights, way) for key, way in ways.items()
    }
    yield measure("forward", ways, checked, lambda: (in_double(logits[0]),) * 2)
    ways = {key: functools.partial(with_gradient, way) for key, way in ways.items()}
    checked = {key: functools.partial(way, logits[0]) for key, way in ways.items()}
    yield measure("forward+backward", ways, checked, gradient_in_double)

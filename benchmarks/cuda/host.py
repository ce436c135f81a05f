# SPDX-License-Identifier: Apache-2.0
"""What a call costs the host: the wall time of one call that is not synchronised.

The device is idle before each call, so that no launch waits for it. The whole block and LoRA experts
stand beside transformers' and torch's grouped_mm. Beside the host's time stands the device's, and
the time of a step among many, which is that of the slower of the two. The ops follow one by one,
with the launches and the allocations of a call.

T num_tokens, H hidden_size, I intermediate_size, E num_experts, K top_k, R = T * K routed rows.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moe_ops
from benchmarks import suite
from benchmarks.cuda import experts, lora
from benchmarks.cuda.experts import (
    COMPILED,
    EAGER,
    PASSES,
    Block,
    Comparison,
    Implementation,
)
from benchmarks.cuda.lora import OURS_COMPILED
from benchmarks.cuda.timing import (
    OURS,
    TORCH,
    Bench,
    Call,
    Case,
    Record,
    errors_of,
    orders,
    quartiles,
    ratios_of,
    rounded,
)
from benchmarks.suite import Routing, Shape
from moe_ops._triton.direct import DirectLaunch, DirectZero, TensorMap
from testing import reference

moe = torch.ops.moe

# Calls of each contender, and calls among which launches and allocations are counted.
TURNS, COUNTED = 200, 10
WARM_UPS = 3
# Calls that follow each other without a synchronisation, and how often each contender makes them.
STEPS, STEP_TURNS = 50, 8
# Our host time over a peer's: below 1 ours is less.
HOST_RATIOS = {
    "of eager": (OURS, EAGER),
    "of compiled": (OURS, COMPILED),
    "compiled of compiled": (OURS_COMPILED, COMPILED),
    "of torch": (OURS, TORCH),
}
# The time of a peer over ours, the device's and a step's, as in the other parts.
RATIOS = {
    EAGER: (EAGER, OURS),
    COMPILED: (COMPILED, OURS),
    "both compiled": (COMPILED, OURS_COMPILED),
}

Blocks = tuple[Block, dict[str, Implementation]]


def cases(bench: Bench, shapes: Iterable[Shape]) -> Iterator[Case]:
    """All that is timed before what is counted: a profiler may leave launches slower."""
    del shapes
    for label, (what, shape) in measured(bench).items():
        yield label, functools.partial(run_blocks, bench, what, shape)
    yield "grouped_gemm", functools.partial(run_gemm, bench, small(bench))
    yield "ops", functools.partial(run_ops, bench, small(bench))
    yield "launches", functools.partial(run_counts, bench, small(bench))


def small(bench: Bench) -> Shape:
    return (suite.TINY_SUITE if bench.tiny else suite.HOST)[0]


def measured(bench: Bench) -> dict[str, tuple[str, Shape]]:
    """By label, which blocks of which shape."""
    shapes = suite.TINY_SUITE if bench.tiny else suite.HOST
    return {f"{what} {shape.name}": (what, shape) for what in MAKERS for shape in shapes}


# What is timed


def host_microseconds(
    bench: Bench, calls: Mapping[str, Call], turns: int = TURNS
) -> dict[str, list[float]]:
    """The host's us of each call, turn by turn, in whole rounds of `orders`."""
    for call in calls.values():
        for _ in range(WARM_UPS):
            call()
    names, order_of = list(calls), orders(len(calls))
    turns = WARM_UPS if bench.tiny else turns
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns + -turns % len(order_of)):
        for i in order_of[turn % len(order_of)]:
            bench.synchronize()
            begin = time.perf_counter_ns()
            result = calls[names[i]]()
            elapsed = time.perf_counter_ns() - begin
            # What frees the results is not the call.
            del result
            found[names[i]].append(elapsed / 1e3)
    return found


def host_record(bench: Bench, calls: Mapping[str, Call]) -> Record:
    """The host's us of each call, and ours over each peer's."""
    times = host_microseconds(bench, calls)
    return {
        "host_us": {name: quartiles(each) for name, each in times.items()},
        "host_ratio": ratios_of(times, HOST_RATIOS),
    }


def step_record(bench: Bench, calls: Mapping[str, Call]) -> Record:
    """us of a call among many that follow each other, and each peer's over ours."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names, order_of = list(calls), orders(len(calls))
    steps, turns = (WARM_UPS, 1) if bench.tiny else (STEPS, STEP_TURNS)
    for turn in range(turns + -turns % len(order_of)):
        for i in order_of[turn % len(order_of)]:
            call = calls[names[i]]
            # The allocator gets used to this call again.
            call()
            bench.synchronize()
            begin = time.perf_counter_ns()
            for _ in range(steps):
                call()
            bench.synchronize()
            times[names[i]].append((time.perf_counter_ns() - begin) / steps / 1e3)
    return {
        "step_us": {name: quartiles(each) for name, each in times.items()},
        "step_ratio": ratios_of(times, RATIOS),
    }


# Blocks


class OurExperts(nn.Module):
    """fused_experts on the block's projections, to be compiled as grouped_mm is."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = block.gate_up_proj, block.down_proj

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        return moe_ops.fused_experts(
            hidden_states, self.gate_up_proj, self.down_proj, topk_ids, topk_weights
        )


def make_experts(bench: Bench, shape: Shape, backend: str | None) -> Blocks:
    block = Block(bench, shape)
    module = experts.grouped_mm_module(block)
    found = {OURS: experts.ours(block), EAGER: experts.grouped_mm(block, module)}
    if backend:
        for name, each in ((OURS_COMPILED, OurExperts(block)), (COMPILED, module)):
            compiled = experts.compiled(each, dynamic=False, backend=backend)
            found[name] = experts.grouped_mm(block, compiled)
    return block, found


def make_lora(bench: Bench, shape: Shape, backend: str | None) -> Blocks:
    block = lora.LoraBlock(bench, shape, lora.LAYOUTS[0])
    found = lora.implementations_of(block, backend)
    return block, {name: how for name, how in found.items() if lora.CHECKPOINT not in name}


MAKERS: dict[str, Callable[[Bench, Shape, str | None], Blocks]] = {
    "experts": make_experts,
    "lora": make_lora,
}


def backend_of(bench: Bench) -> str | None:
    """On the CPU it would compile C++ for nothing."""
    return "inductor" if bench.device.type == "cuda" else None


def run_blocks(
    bench: Bench, what: str, shape: Shape, backend: str | None = None
) -> Iterator[Record]:
    """Both passes of the blocks that MAKERS[what] makes: the device's time, and the host's."""
    # Without it Dynamo goes over to dynamic sizes after the first shape.
    torch._dynamo.reset()
    block, implementations = MAKERS[what](bench, shape, backend or backend_of(bench))
    comparison = Comparison(block, block.route("uniform"), implementations)
    ratios = {ratio: pair for ratio, pair in RATIOS.items() if set(pair) <= implementations.keys()}
    for name in PASSES:
        record = comparison.measure(name, ratios)
        calls = comparison.calls(name)
        right = {who: calls[who] for who in calls if comparison.is_right(who, name)}
        host = host_record(bench, right) | step_record(bench, right) if right else {}
        yield {"what": what, "shape": shape.name, "pass": name, **record, **host}


def jobs_ahead(bench: Bench, shapes: Iterable[Shape]) -> dict[str, Callable[[], None]]:
    """What `experts.compile_ahead` is given."""
    del shapes
    return {
        f"host {label}": functools.partial(compile_blocks, bench, what, shape)
        for label, (what, shape) in measured(bench).items()
    }


def compile_blocks(bench: Bench, what: str, shape: Shape, backend: str = "inductor") -> None:
    """Leaves in the caches on disk what Triton and Inductor compile for it."""
    block, implementations = MAKERS[what](bench, shape, backend)
    experts.run_once(block, block.route("uniform"), implementations.values())


# Ops


@dataclass(frozen=True)
class Op:
    """A call of one op, and the reference for its first results, or for all of them."""

    call: Call
    expected: Call


def run_gemm(bench: Bench, shape: Shape) -> Iterator[Record]:
    """grouped_gemm of an up projection with its backward, beside torch's."""
    routing = Routing.draw(shape, "uniform", bench.device)
    x = bench.randn(shape.num_rows, shape.hidden_size).requires_grad_()
    weight = bench.randn(shape.num_experts, *shape.features("up")).requires_grad_()
    grad = bench.randn(shape.num_rows, shape.features("up")[0])
    counts, ends = routing.counts, routing.ends

    def expected(ids: Tensor) -> Tensor:
        del ids
        return reference.grouped_gemm(x, weight, counts)

    ways = {
        OURS: lambda _: moe_ops.grouped_gemm(x, weight, counts),
        TORCH: lambda _: torch._grouped_mm(x, weight.transpose(1, 2), ends),
    }
    leaves = (x, weight)
    for name in PASSES:
        calls = {
            who: Implementation(way, leaves).call(name, counts, grad) for who, way in ways.items()
        }
        want = Implementation(expected, leaves).call(name, counts, grad.double())
        yield {
            "what": "grouped_gemm",
            "shape": shape.name,
            "pass": name,
            **op_record(bench, calls, errors_of(calls, want)),
        }


def op_record(bench: Bench, calls: Mapping[str, Call], errors: Mapping[str, float]) -> Record:
    """As `compare` makes one, of the host's times alone."""
    right = {who: call for who, call in calls.items() if errors[who] <= bench.tolerance}
    record: Record = {"errors": {who: rounded_or_text(error) for who, error in errors.items()}}
    if len(right) < len(calls):
        record["wrong"] = sorted(set(calls) - set(right))
    return record | (host_record(bench, right) if right else {})


def rounded_or_text(error: float) -> float | str:
    """JSON has no NaN."""
    return rounded(error) if error < float("inf") else str(error)


def ops_of(bench: Bench, shape: Shape) -> dict[str, Op]:
    """The ops that a block of this shape is made of, by what is told of them."""
    block = Block(bench, shape)
    ids = block.route("uniform")
    counts, gather, scatter = reference.routing_indices(ids, shape.num_experts)
    x, gate_up, down, weights = (leaf.detach() for leaf in block.leaves)
    rows, dy = x[gather // shape.top_k], bench.randn(shape.num_rows, gate_up.shape[1])
    arguments = (x, gate_up, down, ids, weights)
    expected = block.expected(ids)
    kept = moe.fused_experts_forward.default(*arguments)[1:]
    down_backward = (
        block.grad_output, x, gate_up, down, weights, None, None, *kept, "silu", True, False, None,
        False, [True] * 3 + [False], False,
    )  # fmt: skip
    dz = moe.fused_experts_down_backward.default(*down_backward)[0]
    up_backward = (
        dz, x, gate_up, None, *kept[1:], shape.top_k, [True, True, False, False], False,
    )  # fmt: skip
    grad_x, grad_gate_up, grad_down, grad_weights = expected[1:]
    unweighted = (rows, gather, None, shape.top_k, scatter)
    weighted = (rows, gather, weights, shape.top_k, scatter)

    def dw() -> Tensor:
        parts = zip(dy.split(counts.tolist()), rows.split(counts.tolist()), strict=True)
        return torch.stack([left.double().t() @ right.double() for left, right in parts])

    return {
        "routing_indices": Op(
            lambda: moe.routing_indices.default(ids, shape.num_experts),
            lambda: (counts, gather, scatter),
        ),
        "grouped_gemm": Op(
            lambda: moe.grouped_gemm.default(rows, gate_up, counts),
            lambda: reference.grouped_gemm(rows, gate_up, counts),
        ),
        "grouped_gemm_dx": Op(
            lambda: moe.grouped_gemm_dx.default(dy, gate_up, counts),
            lambda: reference.grouped_gemm(dy, gate_up.transpose(1, 2), counts),
        ),
        "grouped_gemm_dw": Op(lambda: moe.grouped_gemm_dw.default(dy, rows, counts), dw),
        "fused_experts": Op(lambda: moe.fused_experts.default(*arguments), lambda: expected[0]),
        "fused_experts_forward": Op(
            lambda: moe.fused_experts_forward.default(*arguments), lambda: expected[0]
        ),
        # Its first output, the gradient of z, has no reference. The other op is right if that is.
        "fused_experts_down_backward": Op(
            lambda: moe.fused_experts_down_backward.default(*down_backward)[1:],
            lambda: (grad_down, grad_weights),
        ),
        "fused_experts_up_backward": Op(
            lambda: moe.fused_experts_up_backward.default(*up_backward),
            lambda: (grad_x, grad_gate_up),
        ),
        "permute": Op(
            lambda: moe.permute.default(x, gather, shape.top_k, scatter),
            lambda: reference.permute(x, gather, shape.top_k),
        ),
        "unpermute": Op(
            lambda: moe.unpermute.default(*weighted), lambda: reference.unpermute(*weighted)
        ),
        "unpermute, no weights": Op(
            lambda: moe.unpermute.default(*unweighted), lambda: reference.unpermute(*unweighted)
        ),
        # A yardstick of the host: one launch by torch.
        "torch: silu": Op(lambda: F.silu(x), lambda: F.silu(x.double())),
    }


def run_ops(bench: Bench, shape: Shape) -> Iterator[Record]:
    """Each op without autograd: the host's time of all of them, then what they launch."""
    ops = ops_of(bench, shape)
    with torch.no_grad():
        records = {
            name: op_record(bench, {OURS: op.call}, errors_of({OURS: op.call}, op.expected))
            | time_without_launches(bench, op.call)
            for name, op in ops.items()
        }
        counts = {name: taken_apart(bench, op.call) for name, op in ops.items()}
    for name, record in records.items():
        yield {"what": "op", "op": name, "shape": shape.name, **record, **counts[name]}


# What is counted


def run_counts(bench: Bench, shape: Shape) -> Iterator[Record]:
    """The launches and allocations of whole blocks; nothing on the CPU."""
    if bench.device.type != "cuda":
        return
    for what, make in MAKERS.items():
        torch._dynamo.reset()
        block, implementations = make(bench, shape, backend_of(bench))
        ids = block.route("uniform")
        for name in PASSES:
            for who, implementation in implementations.items():
                call = implementation.call(name, ids, block.grad_output)
                for _ in range(WARM_UPS):
                    call()
                of_call = {"what": "launches", "block": what, "shape": shape.name, "pass": name}
                yield {**of_call, "implementation": who, **counted(bench, call)}


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """What is replayed packs no parameters and launches nothing."""
    with contextlib.ExitStack() as stack:
        for kind in (DirectLaunch, DirectZero):
            stack.enter_context(mock.patch.object(kind, "__call__", return_value=None))
        yield


@contextlib.contextmanager
def counted_descriptors() -> Iterator[list[int]]:
    """The addresses of the tensors whose TMA descriptors are asked for meanwhile."""
    addresses: list[int] = []
    at = TensorMap.at

    def note(made: TensorMap, address: int) -> bytes:
        addresses.append(address)
        return at(made, address)

    with mock.patch.object(TensorMap, "at", note):
        yield addresses


def time_without_launches(bench: Bench, call: Call) -> Record:
    """The host's us of what is replayed but for its launches; empty on the CPU."""
    if bench.device.type != "cuda":
        return {}
    with without_launches():
        times = host_microseconds(bench, {OURS: call})
    return {"us_without_launches": rounded(statistics.median(times[OURS]))}


def taken_apart(bench: Bench, call: Call) -> Record:
    """What `counted` counts, and the TMA descriptors of what is replayed; empty on the CPU."""
    if bench.device.type != "cuda":
        return {}
    counts = counted(bench, call)
    with counted_descriptors() as addresses:
        call()
    return {**counts, "descriptors": len(addresses)}


def counted(bench: Bench, call: Call) -> Record:
    """Launches (kernels, copies, fills) and allocations of a call; empty on the CPU."""
    if bench.device.type != "cuda":
        return {}
    call()
    bench.synchronize()
    before = num_allocations(bench)
    for _ in range(COUNTED):
        call()
    allocations = (num_allocations(bench) - before) / COUNTED
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(COUNTED):
            call()
        bench.synchronize()
    events = [event for event in profile.events() if event.device_type.name == "CUDA"]
    return {"launches": rounded(len(events) / COUNTED), "allocations": rounded(allocations)}


def num_allocations(bench: Bench) -> int:
    """Of the caching allocator, since the process began."""
    return int(torch.cuda.memory_stats(bench.device)["allocation.all.allocated"])

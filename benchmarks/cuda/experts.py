# SPDX-License-Identifier: Apache-2.0
"""The whole expert block, gather to combine, against transformers' grouped_mm and its own floor.

T num_tokens, H hidden_size, I intermediate_size, E num_experts, K top_k, R = T * K routed rows.

Every implementation computes the same block of gated SiLU experts on the same tensors: hidden_states
(T, H), gate_up_proj (E, 2I, H), down_proj (E, H, I), topk_ids and topk_weights (T, K), and the
gradients of all that have one. The router is no part of it.
"""

from __future__ import annotations

import concurrent.futures
import functools
import importlib.metadata
import importlib.util
import logging
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moe_ops
from benchmarks import suite
from benchmarks.cuda.timing import (
    OURS,
    Bench,
    Call,
    Case,
    Record,
    compare,
    free,
    poisoned_memory,
    recorded_launches,
    relative_error,
    rounded,
    worst,
)
from benchmarks.suite import Shape
from testing import reference

ROOT = Path(__file__).resolve().parents[2]

# What is compared, beside OURS. EAGER and COMPILED are transformers' grouped_mm.
RECOMPUTE = f"{OURS} recompute"
UNIFORM = f"{OURS} uniform"
EAGER, COMPILED, DYNAMIC = "eager", "compiled", "compiled, dynamic"
FORWARD, BOTH = "forward", "forward+backward"
PASSES = (FORWARD, BOTH)

MIB = 2**20

logger = logging.getLogger("moe_ops.benchmarks")

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None


class Block:
    """The tensors of one block; the leaves are in the order of the gradients."""

    def __init__(self, bench: Bench, shape: Shape) -> None:
        self.bench, self.shape = bench, shape
        T, H, K = shape.num_tokens, shape.hidden_size, shape.top_k
        self.hidden_states = bench.randn(T, H).requires_grad_()
        self.gate_up_proj = self._weight("up")
        self.down_proj = self._weight("down")
        # In the rows' dtype, as transformers' routers give them.
        weights = torch.rand(T, K, device=bench.device) + 0.1
        weights /= weights.sum(1, keepdim=True)
        self.topk_weights = weights.to(bench.dtype).requires_grad_()
        self.grad_output = bench.randn(T, H)

    def _weight(self, projection: str) -> nn.Parameter:
        out_features, in_features = self.shape.features(projection)
        weight = self.bench.randn(self.shape.num_experts, out_features, in_features)
        return nn.Parameter(weight.mul_(in_features**-0.5))

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.hidden_states, self.gate_up_proj, self.down_proj, self.topk_weights

    @property
    def options(self) -> dict[str, Any]:
        """What fused_experts is given beside tensors."""
        return {}

    def parameters(self, leaves: Sequence[Tensor]) -> dict[str, Tensor]:
        """The weights among the leaves, or among their gradients, as fused_experts takes them."""
        return {"gate_up_proj": leaves[1], "down_proj": leaves[2]}

    def flops(self, name: str) -> int:
        """Of the products of a pass."""
        return flops(self.shape, name)

    def route(self, routing: str) -> Tensor:
        """topk_ids of one of suite.ROUTINGS."""
        shape = self.shape
        return reference.route(
            routing, shape.num_tokens, shape.num_experts, shape.top_k, self.bench.device
        )

    def expected(self, topk_ids: Tensor) -> tuple[Tensor, ...]:
        """Output and gradients by the fp64 reference.

        The weights' gradients are kept in the weights' dtype: in fp64 they would not fit.
        """
        projections = (self.gate_up_proj.detach(), self.down_proj.detach())
        grads = [torch.zeros_like(weight) for weight in projections]
        output, grad_hidden, grad_weights = reference.experts_step(
            self.hidden_states,
            topk_ids,
            self.topk_weights,
            self.grad_output,
            projections,
            grads,
            lambda _, gate_up, down: (gate_up, down),
        )
        return output, grad_hidden, *grads, grad_weights


def _as_it_is(grad: Tensor) -> Tensor:
    return grad


@dataclass(frozen=True)
class Implementation:
    """One way to compute a block.

    Attributes:
        forward: topk_ids -> the output.
        leaves: what it is differentiated in, in the order of Block.leaves.
        restore: the gradient of its gate_up_proj, laid out as the block's is.
    """

    forward: Callable[[Tensor], Tensor]
    leaves: tuple[Tensor, ...]
    restore: Callable[[Tensor], Tensor] = _as_it_is

    def call(self, name: str, topk_ids: Tensor, grad_output: Tensor) -> Call:
        """What is timed: `name` is one of PASSES."""

        def forward() -> Tensor:
            with torch.no_grad():
                return self.forward(topk_ids)

        def both() -> tuple[Tensor, ...]:
            output = self.forward(topk_ids)
            return output, *torch.autograd.grad(output, self.leaves, grad_output)

        return forward if name == FORWARD else both

    def errors(
        self, block: Block, topk_ids: Tensor, expected: Sequence[Tensor]
    ) -> dict[str, float]:
        """By pass, the worst relative error of what it gives."""
        output = self.call(FORWARD, topk_ids, block.grad_output)()
        forward = relative_error(output, expected[0])
        del output
        results = list(self.call(BOTH, topk_ids, block.grad_output)())
        results[2] = self.restore(results[2])
        both = worst(
            relative_error(result, want) for result, want in zip(results, expected, strict=True)
        )
        return {FORWARD: forward, BOTH: both}


def ours(block: Block, recompute: str = "none") -> Implementation:
    def forward(topk_ids: Tensor) -> Tensor:
        return moe_ops.fused_experts(
            block.hidden_states,
            block.gate_up_proj,
            block.down_proj,
            topk_ids,
            block.topk_weights,
            recompute=recompute,
        )

    return Implementation(forward, block.leaves)


def count_experts(ids: Tensor, num_experts: int) -> Tensor:
    """Rows of each expert without waiting for the device, as bincount does; floats on the CPU."""
    values = ids.float() if ids.device.type == "cpu" else ids
    return torch.histc(values, num_experts, 0, num_experts - 1)


class GroupedMM(nn.Module):
    """transformers' algorithm on torch._grouped_mm, for where transformers is not installed."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = block.gate_up_proj, block.down_proj

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        num_experts, top_k = self.gate_up_proj.shape[0], topk_ids.shape[1]
        sorted_ids, gather = torch.sort(topk_ids.view(-1))
        ends = count_experts(sorted_ids, num_experts).cumsum(0, dtype=torch.int32)
        rows = hidden_states[gather // top_k]
        gate, up = torch._grouped_mm(rows, self.gate_up_proj.transpose(1, 2), ends).chunk(2, -1)
        rows = torch._grouped_mm(F.silu(gate) * up, self.down_proj.transpose(1, 2), ends)
        rows = rows * topk_weights.view(-1)[gather, None]
        scatter = torch.empty_like(gather)
        scatter[gather] = torch.arange(len(gather), device=gather.device)
        return rows[scatter].view(-1, top_k, rows.shape[1]).sum(1)


def grouped_mm_module(block: Block) -> nn.Module:
    """transformers' Qwen3MoeExperts on the block's weights; GroupedMM without transformers."""
    if not HAS_TRANSFORMERS:
        return GroupedMM(block)
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=block.shape.hidden_size,
        moe_intermediate_size=block.shape.intermediate_size,
        num_experts=block.shape.num_experts,
        num_experts_per_tok=block.shape.top_k,
        hidden_act="silu",
    )
    config._experts_implementation = "grouped_mm"
    # Its own weights would be as large as the block's.
    with torch.device("meta"):
        module: nn.Module = Qwen3MoeExperts(config)
    module.gate_up_proj, module.down_proj = block.gate_up_proj, block.down_proj
    return module


def grouped_mm_facts() -> dict[str, str]:
    """Whose grouped_mm is measured."""
    if not HAS_TRANSFORMERS:
        whose = "transformers is not installed: our own writing of its algorithm"
    else:
        whose = f"transformers {importlib.metadata.version('transformers')}, Qwen3MoeExperts"
    return {"grouped_mm": f"{whose}, on torch's grouped_mm"}


def grouped_mm(block: Block, module: Callable[..., Tensor]) -> Implementation:
    def forward(topk_ids: Tensor) -> Tensor:
        return module(block.hidden_states, topk_ids, block.topk_weights)

    return Implementation(forward, block.leaves)


def compiled(module: nn.Module, dynamic: bool, backend: str = "inductor") -> Callable[..., Tensor]:
    compiled_module: Callable[..., Tensor] = torch.compile(
        module, fullgraph=True, dynamic=dynamic, backend=backend
    )
    return compiled_module


def flops(shape: Shape, name: str) -> int:
    """Of the products alone; backward has twice as many as forward."""
    forward = 6 * shape.num_rows * shape.hidden_size * shape.intermediate_size
    return forward if name == FORWARD else 3 * forward


def floor_milliseconds(
    bench: Bench, shape: Shape, name: str, num_flops: int | None = None
) -> float:
    """The products at the dense ceiling, and the sums over slots at that of copying.

    num_flops: of the products, where they are others than those of the experts alone.

    Forward reads R rows and writes T, the combine; backward does so once more, for the gradient of
    hidden_states. A product can do every other movement of rows on its way.
    """
    row_bytes = shape.hidden_size * bench.dtype.itemsize
    moved = (shape.num_rows + shape.num_tokens) * row_bytes * (1 if name == FORWARD else 2)
    num_flops = flops(shape, name) if num_flops is None else num_flops
    products = num_flops / bench.ceilings["dense_tflops"] / 1e9
    return products + moved / bench.ceilings["copy_tbs"] / 1e9


def memory(bench: Bench, implementation: Implementation, block: Block, ids: Tensor) -> Record:
    """MiB of the device's memory that a step takes beside its inputs; empty on the CPU.

    kept: allocated after forward, less what was before and less the output: all that is held for
    backward and does not belong to the inputs. output: the output itself. peak: the most that was
    allocated at once in forward and backward, less what was before. gradients: part of that peak,
    what backward returns.
    """
    if bench.device.type != "cuda":
        return {}
    bench.synchronize()
    before = torch.cuda.memory_allocated(bench.device)
    torch.cuda.reset_peak_memory_stats(bench.device)
    output = implementation.forward(ids)
    after_forward = torch.cuda.memory_allocated(bench.device)
    grads = torch.autograd.grad(output, implementation.leaves, block.grad_output)
    bench.synchronize()
    peak = torch.cuda.max_memory_allocated(bench.device)
    output_bytes = output.untyped_storage().nbytes()
    num_bytes = {
        "kept": after_forward - before - output_bytes,
        "output": output_bytes,
        "peak": peak - before,
        "gradients": sum(grad.untyped_storage().nbytes() for grad in grads),
    }
    return {name: rounded(count / MIB) for name, count in num_bytes.items()}


class Comparison:
    """Implementations of a block on one routing, found right or wrong before any is timed."""

    def __init__(
        self, block: Block, topk_ids: Tensor, implementations: Mapping[str, Implementation]
    ) -> None:
        self.block, self.bench = block, block.bench
        self.topk_ids, self.implementations = topk_ids, dict(implementations)
        # By pass, by implementation.
        self.errors: dict[str, dict[str, float]] = {name: {} for name in PASSES}
        self.failed: dict[str, str] = {}
        expected = block.expected(topk_ids)
        for who, implementation in self.implementations.items():
            # Ours alone: what torch compiles would be compiled again without it.
            is_poisoned = who.startswith(OURS) and COMPILED not in who
            poison = poisoned_memory() if is_poisoned else nullcontext()
            found = dict.fromkeys(PASSES, math.nan)
            try:
                with poison:
                    found = implementation.errors(block, topk_ids, expected)
            except Exception as error:
                # The others are worth their numbers; this one is told as wrong, and why.
                logger.exception("%s failed", who)
                self.failed[who] = first_line(error)
            for name in PASSES:
                self.errors[name][who] = found[name]

    def is_right(self, who: str, name: str) -> bool:
        return self.errors[name][who] <= self.bench.tolerance

    def calls(self, name: str) -> dict[str, Call]:
        return {
            who: implementation.call(name, self.topk_ids, self.block.grad_output)
            for who, implementation in self.implementations.items()
        }

    def measure(
        self,
        name: str,
        ratios: Mapping[str, tuple[str, str]],
        more: Mapping[str, Call] | None = None,
    ) -> Record:
        """The record of a pass.

        Args:
            name: one of PASSES.
            ratios: as in `compare`.
            more: calls that were found right elsewhere.
        """
        shape, more = self.block.shape, more or {}
        num_flops = self.block.flops(name)
        errors = {**self.errors[name], **dict.fromkeys(more, 0.0)}
        right = {who for who in self.implementations if self.is_right(who, name)} | set(more)
        record = compare(self.bench, {**self.calls(name), **more}, errors, ratios, right)
        for who in more:
            del record["errors"][who]
        if self.failed:
            record["failed"] = self.failed
        record["tflops"] = {
            who: rounded(num_flops / median / 1e9)
            for who, (_, median, _) in record["milliseconds"].items()
        }
        floor = floor_milliseconds(self.bench, shape, name, num_flops)
        record["floor_milliseconds"] = rounded(floor)
        if OURS in record["milliseconds"]:
            record["of_floor"] = rounded(record["milliseconds"][OURS][1] / floor)
        if name == BOTH:
            record["mib"] = {
                who: memory(self.bench, implementation, self.block, self.topk_ids)
                for who, implementation in self.implementations.items()
                if self.is_right(who, name)
            }
        return record


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n", maxsplit=1)[0]


def cases(bench: Bench, shapes: Iterable[Shape]) -> Iterator[Case]:
    for shape in shapes:
        yield shape.name, functools.partial(run_experts, bench, shape)


def run_experts(bench: Bench, shape: Shape) -> Iterator[Record]:
    """Every routing of the shape, then the dynamic case where it is the shape for that."""
    # Without it Dynamo goes over to dynamic sizes after the first shape.
    torch._dynamo.reset()
    block = Block(bench, shape)
    module = grouped_mm_module(block)
    implementations = {
        OURS: ours(block),
        RECOMPUTE: ours(block, "pre_activation"),
        EAGER: grouped_mm(block, module),
    }
    # On the CPU it would compile C++ for nothing.
    on_gpu = bench.device.type == "cuda"
    if on_gpu:
        implementations[COMPILED] = grouped_mm(block, compiled(module, dynamic=False))
    ratios = {name: (name, OURS) for name in (EAGER, COMPILED)}
    every = shape.name in suite.EVERY_ROUTING or bench.tiny
    routings = suite.BLOCK_ROUTINGS if every else suite.BLOCK_ROUTINGS[:1]
    uniform: dict[str, Call] = {}
    for routing in routings:
        comparison = Comparison(block, block.route(routing), implementations)
        for name in PASSES:
            case: Record = {"shape": shape.name, "routing": routing, "pass": name}
            more = {UNIFORM: uniform[name]} if name in uniform else {}
            of_pass = {**ratios, "of uniform": (OURS, UNIFORM)}
            if name == BOTH:
                of_pass["recompute"] = (RECOMPUTE, OURS)
            yield {**case, **comparison.measure(name, of_pass, more)}
            if routing == "uniform" and comparison.is_right(OURS, name):
                uniform[name] = comparison.calls(name)[OURS]
    if on_gpu and shape == suite.SUITE[0]:
        yield from run_dynamic(block, module)


def run_dynamic(block: Block, module: nn.Module, backend: str = "inductor") -> Iterator[Record]:
    """grouped_mm compiled for any number of tokens; ours is one op and is called as it is."""
    torch._dynamo.reset()
    dynamic = grouped_mm(block, compiled(module, dynamic=True, backend=backend))
    comparison = Comparison(block, block.route("uniform"), {OURS: ours(block), DYNAMIC: dynamic})
    for name in PASSES:
        record = comparison.measure(name, {DYNAMIC: (DYNAMIC, OURS)})
        yield {"shape": block.shape.name, "routing": "uniform", "pass": name, **record}


def compile_block(bench: Bench, shape: Shape) -> None:
    """Leaves in the caches on disk what Triton and Inductor compile for a shape."""
    block = Block(bench, shape)
    static = grouped_mm(block, compiled(grouped_mm_module(block), dynamic=False))
    run_once(block, block.route("uniform"), (ours(block), ours(block, "pre_activation"), static))
    del block, static
    free()


def jobs_ahead(bench: Bench, shapes: Iterable[Shape]) -> dict[str, Callable[[], None]]:
    """What `compile_ahead` is given, of every shape."""
    return {shape.name: functools.partial(compile_block, bench, shape) for shape in shapes}


def run_once(block: Block, topk_ids: Tensor, implementations: Iterable[Implementation]) -> None:
    """Forward, and forward and backward, of each: it leaves in the caches what is compiled."""
    torch._inductor.config.compile_threads = 1
    # A process may have had another job before.
    torch._dynamo.reset()
    for implementation in implementations:
        for name in PASSES:
            implementation.call(name, topk_ids, block.grad_output)()
    block.bench.synchronize()


def compile_ahead(jobs: Mapping[str, Callable[[], None]], processes: int) -> None:
    """All jobs at once: one after the other would take longer than measuring what they compile."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        running = {pool.submit(run): label for label, run in jobs.items()}
        for job in concurrent.futures.as_completed(running):
            if (error := job.exception()) is not None:
                print(f"compiling {running[job]} ahead: {first_line(error)}", flush=True)


# Kernel by kernel

PROFILED_STEPS = 5
# The arguments of a kernel that multiplies: the length of its sums, or of the rows that dW sums over
# tokens, and the block that it is cut in.
PRODUCT_SIZES = (("K", "BLOCK_K"), ("D", "BLOCK_D"))


def kernels_cases(bench: Bench, shapes: Iterable[Shape]) -> Iterator[Case]:
    """Only where there is a device to profile."""
    if bench.device.type != "cuda":
        return
    for shape in shapes:
        yield shape.name, functools.partial(run_kernels, bench, shape)


def run_kernels(bench: Bench, shape: Shape) -> Iterator[Record]:
    """One forward and backward of ours, launch by launch."""
    block = Block(bench, shape)
    step = ours(block).call(BOTH, block.route("uniform"), block.grad_output)
    for _ in range(3):
        step()
    with recorded_launches() as launches:
        step()
    bench.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(PROFILED_STEPS):
            step()
        bench.synchronize()
    events = [event for event in profile.events() if event.device_type.name == "CUDA"]
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in events)
    yield from kernel_records(bench, shape, spans, launches)


def kernel_records(
    bench: Bench,
    shape: Shape,
    spans: Sequence[tuple[float, float, str]],
    launches: Iterable[Any],
) -> Iterator[Record]:
    """A record for each launch of a step, in order, and one for the time between launches.

    Args:
        bench: its dense ceiling is the floor of the products.
        shape: of the block.
        spans: (start, end, kernel) in us, of PROFILED_STEPS equal steps, in order.
        launches: of one step, as `recorded_launches` has them.
    """
    num_launches, rest = divmod(len(spans), PROFILED_STEPS)
    steps = [spans[i : i + num_launches] for i in range(0, len(spans), max(num_launches, 1))]
    names = [name for _, _, name in spans[:num_launches]]
    if not names or rest or any([name for _, _, name in step] != names for step in steps):
        raise RuntimeError(f"the profiled steps differ: {[len(step) for step in steps]} launches")
    # The fastest step: what else the machine does only adds.
    step = min(steps, key=lambda step: sum(end - start for start, end, _ in step))
    busy = [(end - start) / 1e3 for start, end, _ in step]
    total = (step[-1][1] - step[0][0]) / 1e3
    products = product_flops(shape, names, launches)
    seen: dict[str, int] = {}
    for name, milliseconds, count in zip(names, busy, products, strict=True):
        seen[name] = seen.get(name, 0) + 1
        record: Record = {
            "shape": shape.name,
            "kernel": name,
            "nth": seen[name],
            "milliseconds": rounded(milliseconds),
            "share": rounded(milliseconds / total),
        }
        if count:
            floor = count / bench.ceilings["dense_tflops"] / 1e9
            record["product_tflops"] = rounded(count / milliseconds / 1e9)
            record["floor_milliseconds"] = rounded(floor)
            record["of_floor"] = rounded(milliseconds / floor)
        yield record
    between = total - sum(busy)
    yield {
        "shape": shape.name,
        "kernel": "(between kernels)",
        "nth": 1,
        "milliseconds": rounded(between),
        "share": rounded(between / total),
    }


def product_flops(shape: Shape, names: Sequence[str], launches: Iterable[Any]) -> list[int]:
    """The FLOPs of each launch, 0 where it multiplies nothing.

    Read from the sizes that a Triton kernel is given. All are 0 where they do not add up to those
    of the block: then a kernel's sizes are called otherwise than is thought here.
    """
    of_name: dict[str, list[int]] = {}
    for launch in launches:
        kernel, *args = launch.args
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **launch.keywords}
        # A kernel that computes the activation is told the width of that; gated, if not told.
        columns = given.get("N") or given.get("width", 0) * (2 if given.get("GATED", True) else 1)
        inner = [given[size] for size, block in PRODUCT_SIZES if {size, block} <= given.keys()]
        product = 2 * shape.num_rows * columns * sum(inner)
        of_name.setdefault(kernel.__name__, []).append(product)
    found = [of_name[name].pop(0) if of_name.get(name) else 0 for name in names]
    return found if sum(found) == flops(shape, BOTH) else [0] * len(found)

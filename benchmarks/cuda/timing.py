# SPDX-License-Identifier: Apache-2.0
"""Timing on a GPU: what is compared takes turns in one process, and was found right first.

Before each timed call the L2 cache is overwritten. Times are of the device, between two events; the
host runs ahead of it, so its own time is hidden wherever it is less. A ratio is taken turn by turn
and told by its quartiles, as the times are. On the CPU, where Triton is interpreted, the same runs
by the host's clock: it tests the benchmark and measures nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import importlib.metadata
import math
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_ops._triton.kernels.dependent_launch import follow_on
from moe_ops.configs.device import device_of
from testing.gpu_report import kernel_sha256
from testing.tolerances import RELATIVE_NORM

# What most parts compare.
OURS, TORCH = "moe_ops", "torch"

Call = Callable[[], Any]
Record = dict[str, Any]
# A label, and what measures it.
Case = tuple[str, Callable[[], Iterable[Record]]]

# Several times the L2 cache of any GPU.
_FLUSH_BYTES = 1 << 28
_MOST_TURNS = 300


@dataclass
class Bench:
    """Where is measured, and for how long.

    Attributes:
        seconds: of device time, for one comparison; 0 takes the least turns.
        least_turns: however long they take; two quartiles need two.
        ceilings: of the device, from `ceilings`.
    """

    device: torch.device
    tiny: bool = False
    seconds: float = 0.8
    least_turns: int = 10
    ceilings: dict[str, float] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Triton's interpreter cannot multiply bf16."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float16

    @property
    def tolerance(self) -> float:
        return RELATIVE_NORM[self.dtype]

    def randn(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=self.dtype, device=self.device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def warm_up(self, seconds: float) -> None:
        """Keeps the matrix units busy until the clocks are those of long work."""
        size = 64 if self.tiny else 8192
        left, right = self.randn(size, size), self.randn(size, size)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for _ in range(10):
                left @ right
            self.synchronize()

    def timed(self, call: Call) -> Callable[[], float]:
        """Runs the call. What is returned tells its milliseconds, when the device is done.

        A call that has an attribute `prepare` is prepared by it, before the clock starts.
        """
        prepare: Call | None = getattr(call, "prepare", None)
        if prepare is not None:
            prepare()
        self.set_out()
        if self.device.type != "cuda":
            begin = time.perf_counter()
            call()
            elapsed = (time.perf_counter() - begin) * 1e3
            return lambda: elapsed
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        return lambda: start.elapsed_time(end)

    def set_out(self) -> None:
        """Brings the device to where every timed call starts: with none of its operands in L2."""
        if self.device.type == "cuda":
            _flush_buffer(self.device).zero_()

    def counted(self, times: list[float]) -> list[float]:
        """The times that count, of those measured here."""
        return times

    def take_turns(self, calls: Mapping[str, Call]) -> dict[str, list[float]]:
        """Milliseconds of each call, turn by turn: whole rounds of `orders`, if there is one.

        The first call of a turn is made once before it, so that it comes after itself and not after
        the last of the turn before.
        """
        for call in calls.values():
            call()
        turns = self.least_turns
        if self.seconds > 0:
            pilot = [self.timed(call) for call in calls.values() for _ in range(2)]
            self.synchronize()
            turn_seconds = sum(self.counted([elapsed() for elapsed in pilot])) / 2e3
            turns = max(turns, min(int(self.seconds / max(turn_seconds, 1e-6)), _MOST_TURNS))
        names, order_of = list(calls), orders(len(calls))
        if turns > len(order_of):
            turns += -turns % len(order_of)
        running: dict[str, list[Callable[[], float]]] = {name: [] for name in names}
        for turn in range(turns):
            order = order_of[turn % len(order_of)]
            self.timed(calls[names[order[0]]])
            for i in order:
                running[names[i]].append(self.timed(calls[names[i]]))
        self.synchronize()
        return {n: self.counted([elapsed() for elapsed in each]) for n, each in running.items()}


def orders(count: int) -> list[list[int]]:
    """Orders of 0 to count - 1 in which each comes right after each other one equally often.

    A call finds the GPU as the one before has left it: at its power limit it is slower after a call
    that kept the tensor cores busy. (E. J. Williams, 1949, has these for experiments with residual
    effects of treatments.)
    """
    zigzag = [i // 2 if i % 2 == 0 else count - 1 - i // 2 for i in range(count)]
    found = [[(i + shift) % count for i in zigzag] for shift in range(count)]
    return found + [order[::-1] for order in found] if count % 2 else found


@functools.cache
def _flush_buffer(device: torch.device) -> Tensor:
    return torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)


def quartiles(values: Sequence[float]) -> list[float]:
    return [rounded(q) for q in statistics.quantiles(values, n=4, method="inclusive")]


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def compare(
    bench: Bench,
    calls: Mapping[str, Call],
    errors: Mapping[str, float],
    ratios: Mapping[str, tuple[str, str]],
    right: Collection[str] | None = None,
) -> Record:
    """Times the calls in turns; the record that is written to the results.

    Args:
        bench: where and how long.
        calls: by name. One that has an attribute `calls` does so many at once.
        errors: of each call, its relative error. A call that is wrong is named in the record's
            `wrong`; it is not timed and has no ratio.
        ratios: by the name of the ratio, the calls whose times are divided.
        right: the calls that are right; by default those whose error is within the tolerance.
    """
    # JSON has no NaN.
    told = {name: rounded(e) if math.isfinite(e := errors[name]) else str(e) for name in calls}
    record: Record = {"errors": told}
    if right is None:
        # A NaN is not within the tolerance.
        right = {name for name in calls if errors[name] <= bench.tolerance}
    timed = {name: call for name, call in calls.items() if name in right}
    if len(timed) < len(calls):
        record["wrong"] = sorted(set(calls) - set(timed))
    times = bench.take_turns(timed) if timed else {}
    for name, call in timed.items():
        times[name] = [elapsed / getattr(call, "calls", 1) for elapsed in times[name]]
    record["turns"] = len(next(iter(times.values()), []))
    record["milliseconds"] = {name: quartiles(each) for name, each in times.items()}
    record["ratio"] = ratios_of(times, ratios)
    return record


def ratios_of(
    times: Mapping[str, Sequence[float]], ratios: Mapping[str, tuple[str, str]]
) -> dict[str, list[float]]:
    """Quartiles of the ratios turn by turn, of those whose two contenders were both timed."""
    return {
        name: quartiles([a / b for a, b in zip(times[over], times[under], strict=True)])
        for name, (over, under) in ratios.items()
        if over in times and under in times
    }


class Captured:
    """Several calls in one CUDA graph; on the CPU, one after the other."""

    def __init__(self, bench: Bench, calls: Sequence[Call]) -> None:
        self.calls = len(calls)
        # What the graph reads is theirs, and has to live as long.
        self._calls = calls
        self._run: Call = lambda: [call() for call in calls]
        if bench.device.type != "cuda":
            return
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        # What a first call does (compiling, workspaces) cannot be captured.
        with torch.cuda.stream(side):
            for call in calls:
                call()
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        self._run = graph.replay

    def __call__(self) -> None:
        self._run()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in fp32, a slice at a time.

    Infinite where the shapes differ, and where integers do.
    """
    if actual.shape != expected.shape:
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if bool((actual == expected).all()) else math.inf
    if actual.numel() == 0:
        return 0.0
    step = max(1, (1 << 27) * actual.shape[0] // actual.numel())
    error, scale = 0.0, 0.0
    for a, e in zip(actual.detach().split(step), expected.detach().split(step), strict=True):
        error += float((a.float() - e.float()).square().sum(dtype=torch.float64))
        scale += float(e.float().square().sum(dtype=torch.float64))
    return math.sqrt(error / scale) if scale > 0 else math.sqrt(error)


def worst(errors: Iterable[float]) -> float:
    """The largest; NaN where one is NaN, which max may overlook."""
    found = list(errors)
    return math.nan if any(map(math.isnan, found)) else max(found)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """New memory holds NaN until something is written to it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def errors_of(calls: dict[str, Call], reference: Call) -> dict[str, float]:
    """The worst relative error of each call's results."""
    expected = _as_tuple(reference())
    found = {}
    for name, call in calls.items():
        # Ours alone: what torch compiles would be compiled again without it.
        with poisoned_memory() if name == OURS else contextlib.nullcontext():
            results = _as_tuple(call())
        found[name] = worst(map(relative_error, results, expected))
    return found


def _as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def free() -> None:
    """Gives back what the last shape left: its memory, and what was compiled for its sizes."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Call]]:
    """The launches that Triton makes meanwhile, to be made again with the same arguments."""
    launches: list[Call] = []
    # What @triton.jit makes: interpreted kernels are of another class.
    kind = type(_read_kernel)
    original = kind.run

    def run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        # A kernel that is compiled ahead is not launched.
        if not kwargs.get("warmup"):
            launches.append(functools.partial(original, kernel, *args, **kwargs))
        return original(kernel, *args, **kwargs)

    with mock.patch.object(kind, "run", run):
        yield launches


@triton.jit  # type: ignore[untyped-decorator]
def _read_kernel(  # type: ignore[no-untyped-def]
    weight_ptr, experts_ptr, sums_ptr, size,
    BLOCK: tl.constexpr, LOADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, experts read): sums[expert, chunk], of BLOCK * LOADS elements of an expert."""
    if PDL:
        follow_on()
    expert = tl.load(experts_ptr + tl.program_id(1)).to(tl.int64)
    start = tl.program_id(0) * BLOCK * LOADS
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(LOADS):
        offsets = start + i * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(weight_ptr + expert * size + offsets, mask=offsets < size, other=0.0)
        total += values.to(tl.float32)
    tl.store(sums_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.sum(total))


def read_experts(weight: Tensor, experts: Tensor) -> Tensor:
    """Reads weight[e], contiguous, for each e in `experts` and does nothing else: sums, fp32.

    By the fastest of some kernels that do: of small programs, launched while the one before ends.
    """
    block, loads = 2048, 4
    follows = weight.is_cuda and device_of(weight.device).has_tma
    size = weight[0].numel()
    chunks = triton.cdiv(size, block * loads)
    sums = torch.empty(len(experts), chunks, dtype=torch.float32, device=weight.device)
    _read_kernel[(chunks, len(experts))](
        weight, experts, sums, size, BLOCK=block, LOADS=loads, PDL=follows,
        **({"launch_pdl": True} if follows else {}),
    )  # fmt: skip
    return sums


def ceilings(bench: Bench) -> dict[str, float]:
    """What the device reaches: dense product, TFLOP/s; copy (read + written) and read, TB/s."""
    size = 64 if bench.tiny else 8192
    left, right = bench.randn(size, size), bench.randn(size, size)
    expected = left[:64].float() @ right.float()
    _require(relative_error((left @ right)[:64], expected) <= bench.tolerance, "dense product")
    dense = _median(bench, lambda: left @ right)

    # 4 GiB, as 64 experts.
    source = bench.randn(64, 64 if bench.tiny else 1 << 25)
    num_bytes = source.numel() * source.element_size()
    experts = torch.arange(64, dtype=torch.int32, device=bench.device)
    sums = read_experts(source, experts).sum(1)
    expected = torch.stack([row.sum(dtype=torch.float32) for row in source])
    _require(relative_error(sums, expected) <= bench.tolerance, "read")
    read = _median(bench, lambda: read_experts(source, experts))
    target = torch.empty_like(source)
    copy = _median(bench, lambda: target.copy_(source))
    _require(torch.equal(target, source), "copy")
    return {
        "dense_tflops": rounded(2 * size**3 / dense / 1e9),
        "copy_tbs": rounded(2 * num_bytes / copy / 1e9),
        "read_tbs": rounded(num_bytes / read / 1e9),
    }


def _median(bench: Bench, call: Call) -> float:
    return statistics.median(bench.take_turns({"": call})[""])


def _require(right: bool, what: str) -> None:
    if not right:
        raise RuntimeError(f"the {what} that measures a ceiling is wrong")


def environment(bench: Bench) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        **_device(bench.device),
        "dtype": str(bench.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "python": platform.python_version(),
        "kernel_sha256": kernel_sha256(),
    }


def device_name(device: torch.device) -> str:
    """'NVIDIA H200' -> 'h200'."""
    if device.type != "cuda":
        return "interpreter"
    name = torch.cuda.get_device_name(device).lower().replace("nvidia", "")
    return "_".join("".join(c if c.isalnum() else " " for c in name).split())


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"gpu": "none: Triton's interpreter"}
    properties = torch.cuda.get_device_properties(device)
    asked = {
        "driver": "driver_version",
        "clock now": "clocks.sm",
        "clock at most": "clocks.max.sm",
        "memory clock": "clocks.mem",
        "power limit": "power.limit",
    }
    return {
        "gpu": properties.name,
        "sms": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        **dict(zip(asked, _nvidia_smi(list(asked.values())), strict=False)),
    }


def _nvidia_smi(fields: list[str]) -> list[str]:
    """Its answers for the first GPU; empty where it is missing or refuses."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    query = [smi, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    return [answer.strip() for answer in lines[0].split(",")] if lines else []

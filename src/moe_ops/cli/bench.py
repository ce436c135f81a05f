# SPDX-License-Identifier: Apache-2.0
"""`moe_ops bench`: the block of a model's experts on this machine, against what torch offers."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moe_ops
from moe_ops._core.library import IMPLEMENTATIONS
from moe_ops.cli import blocks, experts
from moe_ops.cli.text import number_of
from moe_ops.tuning import Experts

PASSES = ("forward", "forward+backward")
ABOUT = {
    "grouped_mm": "torch's grouped_mm with the same permutations, eager",
    "compiled": "the same compiled for these sizes",
    "loop": "a loop over the experts",
}
# Tokens of a call where none are given, by kind of device.
_NUM_TOKENS = {"cuda": 16384, "cpu": 256}
# The most that a result may differ from the loop in fp32, as a fraction of its norm.
TOLERANCE = {torch.bfloat16: 0.02, torch.float16: 0.004, torch.float32: 1e-4}
LEAST_TURNS, MOST_TURNS = 5, 200
MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    experts.add_arguments(parser, f"{_NUM_TOKENS['cuda']} on a GPU, {_NUM_TOKENS['cpu']} on a CPU")
    parser.add_argument(
        "--against",
        nargs="+",
        choices=tuple(ABOUT),
        default=tuple(ABOUT),
        metavar="NAME",
        help="; ".join(f"{name}: {about}" for name, about in ABOUT.items()) + "; default: all",
    )
    parser.add_argument(
        "--passes",
        nargs="+",
        choices=PASSES,
        default=PASSES,
        metavar="PASS",
        help=f"{' or '.join(PASSES)}; default: both",
    )
    parser.add_argument(
        "--device", help="default: cuda where this torch sees a GPU, else cpu", metavar="NAME"
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, metavar="S", help="of timing for each pass; default 5"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="also draw the times, with matplotlib"
    )
    experts.add_json(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar, which needs tqdm")


@dataclass
class Row:
    """How long one way to compute a block took, in one pass.

    Attributes:
        block: the sizes of the block.
        num_tokens: tokens of the call.
        passes: "forward" or "forward+backward".
        name: "moe_ops", "grouped_mm", "compiled" or "loop".
        milliseconds: the quartiles of the times, or None where it could not be run or was wrong.
        ratio: its time over ours, the median over the turns; above 1 ours is faster.
        mib: MiB at most beside the inputs, on a GPU.
        error: why there is no time.
    """

    block: str
    num_tokens: int
    passes: str
    name: str
    milliseconds: list[float] | None = None
    ratio: float | None = None
    mib: float | None = None
    error: str | None = None


def bench(
    options: argparse.Namespace, parser: argparse.ArgumentParser
) -> tuple[Iterable[str], int]:
    """Time the blocks, and return what to print and the exit status: 1 if ours has no time."""
    experts.check_arguments(options, parser)
    if not 0 < options.seconds < math.inf:
        parser.error(f"expected --seconds above 0 and finite, got {options.seconds}")
    if options.plot is not None:
        _check_plot(options.plot, parser)
    try:
        layers = experts.experts_of(options)
        device = _device_of(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        num_tokens = options.num_tokens or [_NUM_TOKENS[device.type]]
        _check_dtypes(layers)
        rows = list(_rows(layers, num_tokens, device, options))
        if options.plot is not None:
            _draw(rows, device, options.plot)
            print(f"drew {options.plot}", file=sys.stderr)
    except (RuntimeError, AssertionError, ValueError, OSError, ImportError) as error:
        reason = _in_one_line(error).removeprefix("moe_ops.tune: ")
        raise SystemExit(f"{parser.prog}: {reason}") from error
    status = int(any(row.error is not None for row in rows if row.name == blocks.OURS))
    if options.json:
        content = {"device": _device(device), "rows": [asdict(row) for row in rows]}
        return [json.dumps(content, indent=1)], status
    return _table(rows, device), status


def _check_plot(file: Path, parser: argparse.ArgumentParser) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed: pip install matplotlib")
    if not file.absolute().parent.is_dir():
        parser.error(f"expected --plot in an existing folder, got {file}")
    if file.is_dir() or file.suffix.lower() != ".png":
        parser.error(f"expected --plot to be a file that ends in .png, got {file}")


def _device_of(name: str) -> torch.device:
    """Return the device of a name.

    Raises:
        ValueError: it is none that the ops and this torch run on.
    """
    if name.partition(":")[0] not in IMPLEMENTATIONS:
        raise ValueError(f"expected --device to be {' or '.join(IMPLEMENTATIONS)}, got {name}")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"expected a --device that this torch can use, got {name} ({_in_one_line(error)}); "
            "leave it out, or pass --device cpu"
        ) from error
    return device


def _check_dtypes(layers: list[Experts]) -> None:
    """Raise ValueError where a layer has a dtype whose results are not compared."""
    for layer in layers:
        if layer.dtype not in TOLERANCE:
            known, got = (
                ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                for dtypes in (TOLERANCE, [layer.dtype])
            )
            raise ValueError(f"expected a dtype of {known} (--dtype), got {got}")


def _rows(
    layers: list[Experts], num_tokens: list[int], device: torch.device, options: argparse.Namespace
) -> Iterator[Row]:
    names = [blocks.OURS, *(name for name in ABOUT if name in options.against)]
    all_passes = [passes for passes in PASSES if passes in options.passes]
    with _Progress(len(layers) * len(num_tokens) * len(all_passes), options.quiet) as step:
        for layer in layers:
            for tokens in num_tokens:
                torch.manual_seed(0)
                block = blocks.make_block(layer, tokens, device)
                for passes in all_passes:
                    rows = [Row(_sizes(layer), tokens, passes, name) for name in names]
                    _measure(rows, block, device, options.seconds)
                    step(f"{number_of(tokens, 'token')}, {passes}")
                    yield from rows


class _Progress:
    """Shows a bar on a terminal, where tqdm is installed; one line says so where it is not."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._bar: Any = None
        if quiet or not sys.stderr.isatty():
            return
        try:
            from tqdm import tqdm
        except ImportError:
            print("no progress bar: tqdm is not installed (pip install tqdm)", file=sys.stderr)
            return
        self._bar = tqdm(total=total, unit="pass")

    def __enter__(self) -> Callable[[str], None]:
        return self._step

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def _step(self, told: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(told)
            self._bar.update()


def _measure(rows: list[Row], block: blocks.Block, device: torch.device, seconds: float) -> None:
    """Check each way to compute the block, then time in turns those that are right."""
    backward = rows[0].passes == PASSES[1]
    expected = _call(blocks.with_loop, blocks.in_float32(block), backward)()
    calls: dict[str, Callable[[], Any]] = {}
    for row in rows:
        compute = blocks.CONTENDERS[row.name]
        if row.name == "compiled":
            torch.compiler.reset()
            compute = torch.compile(compute, fullgraph=True, dynamic=False)
        call = _call(compute, block, backward)
        try:
            with _without_logs():
                found = call()
            error = max(_relative_error(f, e) for f, e in zip(found, expected, strict=True))
        except Exception as failure:  # noqa: BLE001 - a compiler or a kernel may refuse in any way
            row.error = _in_one_line(_root_of(failure))
            continue
        limit = TOLERANCE[block.hidden_states.dtype]
        if not error <= limit:
            row.error = f"wrong: off by {error:.2g} of its norm, more than {limit:g}"
            continue
        row.mib = _peak(call, device)
        calls[row.name] = call
    times = _times(calls, device, seconds)
    ours = times.get(blocks.OURS)
    for row in rows:
        if row.name in times:
            row.milliseconds = [round(q, 4) for q in statistics.quantiles(times[row.name], n=4)]
            if ours:
                turns = zip(times[row.name], ours, strict=True)
                row.ratio = round(statistics.median(theirs / mine for theirs, mine in turns), 3)


def _call(
    compute: Callable[[blocks.Block], Tensor], block: blocks.Block, backward: bool
) -> Callable[[], list[Tensor]]:
    """Return a function that computes the block, and its gradients where they are asked for."""

    def call() -> list[Tensor]:
        with contextlib.nullcontext() if backward else torch.no_grad():
            output = compute(block)
        if not backward:
            return [output]
        grads = torch.autograd.grad(output, block.leaves, block.grad_output.to(output.dtype))
        return [output.detach(), *grads]

    return call


@contextlib.contextmanager
def _without_logs() -> Iterator[None]:
    """Keep what a compiler logs of a failure off the terminal: the table says why in one line."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _relative_error(found: Tensor, expected: Tensor) -> float:
    norm = expected.norm().clamp(min=torch.finfo(torch.float32).tiny)
    return float((found.detach().float() - expected).norm() / norm)


def _peak(call: Callable[[], Any], device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return round((torch.cuda.max_memory_allocated(device) - before) / MIB, 1)


def _times(
    calls: dict[str, Callable[[], Any]], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Return the milliseconds of each turn. All calls take their turns side by side."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        _milliseconds(call, device)  # warm
    end = time.perf_counter() + seconds
    for turn in range(MOST_TURNS):
        if turn >= LEAST_TURNS and time.perf_counter() > end:
            break
        # Whoever comes first meets a cache that the one before has filled: the order rotates.
        names = list(calls)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(_milliseconds(calls[name], device))
    return times


def _milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1000


def _sizes(layer: Experts) -> str:
    parts = [
        f"hidden {layer.up[1]}, intermediate {layer.down[1]}",
        f"{layer.top_k} of {number_of(layer.num_experts, 'expert')}",
        str(layer.dtype).removeprefix("torch."),
        *(["biases"] if layer.has_bias else []),
        *(["transposed"] if layer.transposed else []),
        *(["ungated"] if layer.up[0] == layer.down[1] else []),
    ]
    return ", ".join(parts)


def _device(device: torch.device) -> str:
    name = f"CPU {torch.backends.cpu.get_cpu_capability()}, {number_of(torch.get_num_threads(), 'thread')}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}, torch {torch.__version__}, moe_ops {moe_ops.__version__}"


def _table(rows: list[Row], device: torch.device) -> Iterator[str]:
    """Yield the lines of a table for each block and number of tokens."""
    yield _device(device)
    yield (
        "ms, the median of turns that alternate; "
        "(its time over ours, the median of the turns' ratios)"
    )
    groups = dict.fromkeys((row.block, row.num_tokens) for row in rows)
    for block, num_tokens in groups:
        here = [row for row in rows if (row.block, row.num_tokens) == (block, num_tokens)]
        yield f"\n{block}; {number_of(num_tokens, 'token')}"
        headings = dict.fromkeys(row.passes for row in here)
        yield f"  {'':<12}" + "".join(f"{passes:<24}" for passes in headings).rstrip()
        for name in dict.fromkeys(row.name for row in here):
            cells = [_cell(row) for row in here if row.name == name]
            yield f"  {name:<12}" + "".join(f"{cell:<24}" for cell in cells).rstrip()
        for row in here:
            if row.error:
                yield f"  {row.name}, {row.passes}: {row.error}"


def _cell(row: Row) -> str:
    if row.milliseconds is None:
        return "-"
    told = f"{row.milliseconds[1]:.3f}"
    if row.ratio is not None and row.name != blocks.OURS:
        told += f" ({row.ratio:.2f}x)"
    return told + (f" {row.mib:.0f} MiB" if row.mib is not None else "")


def _draw(rows: list[Row], device: torch.device, file: Path) -> None:
    """Draw a panel for each pass, and in it a bar for each block and way to compute it."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    titles = list(dict.fromkeys(row.passes for row in rows))
    figure, (panels,) = plt.subplots(
        1, len(titles), figsize=(10, 4), squeeze=False, layout="constrained"
    )
    names = list(dict.fromkeys(row.name for row in rows))
    groups = list(dict.fromkeys((row.block, row.num_tokens) for row in rows))
    width = 0.8 / len(names)
    for axes, passes in zip(panels, titles, strict=True):
        for i, name in enumerate(names):
            of = {(r.block, r.num_tokens): r for r in rows if (r.name, r.passes) == (name, passes)}
            heights = [row.milliseconds[1] if (row := of[g]).milliseconds else 0.0 for g in groups]
            places = [place + (i - (len(names) - 1) / 2) * width for place in range(len(groups))]
            bars = axes.bar(places, heights, width, label=name)
            axes.bar_label(bars, [f"{h:.2f}" if h else "" for h in heights], fontsize=7)
        axes.set_xticks(range(len(groups)), [number_of(tokens, "token") for _, tokens in groups])
        axes.set_title(passes, fontsize=10)
        axes.set_ylabel("ms")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    figure.suptitle(
        f"{_device(device)}\n{'; '.join(dict.fromkeys(b for b, _ in groups))}", fontsize=9
    )
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _root_of(error: BaseException) -> BaseException:
    """Return the error that a compiler has wrapped in its own."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return error


def _in_one_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__

# SPDX-License-Identifier: Apache-2.0
"""Writes the tables and plots of docs/performance.md from benchmarks/results/*.json.

    python -m benchmarks.report

Files of a CPU fill the page between `<!-- tables: begin/end -->`, those of a GPU between
`<!-- cuda tables: begin/end -->`. Where there are none, that part of the page stays as it is. Plots
go to docs/images/ where matplotlib is installed.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CPU_MARKERS = ("<!-- tables: begin -->", "<!-- tables: end -->")
CUDA_MARKERS = ("<!-- cuda tables: begin -->", "<!-- cuda tables: end -->")
PASSES = ("forward", "dX", "dW")
# What a result's environment says of its part and not of the run.
PART_FACTS = ("part", "grouped_mm", "present", "absent")
# Of the tensors of a CPU case; its cases are routings.
SIZES = tuple("ENDRHIKT")
MEMORY = ("kept", "output", "peak", "gradients")

Record = dict[str, Any]
Result = dict[str, Any]


# CPU


def cpu_tables(results: Path) -> Iterator[str]:
    for file in sorted(results.glob("cpu_*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        yield f"### {file.name}\n\n{_facts(result['environment'])}\n"
        groups: dict[tuple[str, str, str], dict[tuple[int, ...], list[float]]] = {}
        # Without a ratio: a result was wrong, and `wrong` names whose.
        wrong = [case["wrong"] for case in result["cases"] if "ratio" not in case]
        for case in result["cases"]:
            if "ratio" in case:
                key = (case["dtype"], case.get("counts", ""), case["pass"])
                shapes = groups.setdefault(key, defaultdict(list))
                shapes[tuple(case[s] for s in SIZES if s in case)].append(case["ratio"][1])
        rows = []
        for key, shapes in groups.items():
            ratios = [ratio for of_shape in shapes.values() for ratio in of_shape]
            least_shape = min(statistics.geometric_mean(of_shape) for of_shape in shapes.values())
            under = sum(ratio < 0.9 for ratio in ratios)
            means = (statistics.geometric_mean(ratios), least_shape, min(ratios))
            rows.append([*key, len(ratios), *(f"{mean:.3f}" for mean in means), under])
        header = "dtype|counts|pass|cases|geomean|least shape|least case|cases under 0.90"
        yield from _table(header, rows)
        if wrong:
            whose = Counter(name for names in wrong for name in names)
            counts = ", ".join(f"{name} {count}" for name, count in sorted(whose.items()))
            yield f"Left out, since a result was found wrong: {len(wrong)} cases ({counts}).\n"


# CUDA


def cuda_results(results: Path) -> dict[str, dict[str, Result]]:
    """By device, then by part."""
    found: dict[str, dict[str, Result]] = defaultdict(dict)
    for file in sorted(results.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        part = result["environment"].get("part")
        if part:
            found[file.stem.removesuffix(f"_{part.replace('-', '_')}")][part] = result
    return dict(found)


def cuda_tables(results: Path, images: Path | None) -> Iterator[str]:
    """Of every device; the plots that `images` holds are shown above the numbers they are of."""
    for device, parts in cuda_results(results).items():
        told = ""
        for part, rows_of in TABLES.items():
            if part not in parts:
                continue
            result = parts[part]
            yield f"### {device}: {part}\n"
            # Once for all parts of a run.
            if (facts := _facts(result["environment"])) != told:
                yield f"{facts}\n"
            told = facts
            if about := _part_facts(result["environment"]):
                yield f"{about}\n"
            image = None if images is None else images / f"{device}_{part}.png"
            if image is not None and image.exists():
                yield f"![{PLOTS[part][0]}](images/{image.name})\n"
            yield from rows_of(result["cases"])


def _ceilings(cases: list[Record]) -> Iterator[str]:
    columns = {
        "dense product, TFLOP/s": "dense_tflops",
        "copy, TB/s": "copy_tbs",
        "read, TB/s": "read_tbs",
    }
    rows = [[case["when"], *(case[key] for key in columns.values())] for case in cases]
    yield from _table("|".join(["of the run", *columns]), rows)


def _gemm(cases: list[Record]) -> Iterator[str]:
    yield (
        "TFLOP/s of ours; the same as a fraction of the dense ceiling; torch._grouped_mm's time over "
        "ours; the same with the permutation (ours within the op, torch's before or after it); a "
        "dense product's time over ours; what the permutation costs us.\n"
    )
    header = "shape|routing|projection|pass|TFLOP/s|of ceiling|grouped_mm|permuted|dense|cost"
    rows = [
        [
            *(case[key] for key in ("shape", "routing", "projection", "pass")),
            _number(case.get("tflops", {}).get("moe_ops"), ".0f"),
            _number(case.get("of_dense_ceiling"), ".2f"),
            *(_ratio(case, name) for name in ("torch", "torch permuted", "dense")),
            _number(_median_ratio(case, "permuted"), ".0%", less=1),
        ]
        for case in cases
    ]
    yield from _table(header, rows)
    yield from _geomeans(cases, ("torch", "torch permuted", "dense"))


def _geomeans(cases: list[Record], names: Sequence[str]) -> Iterator[str]:
    rows = []
    for name in PASSES:
        of_pass = [case for case in cases if case["pass"] == name]
        cells = []
        for ratio in names:
            found = [r for case in of_pass if (r := _median_ratio(case, ratio)) is not None]
            cells += [f"{statistics.geometric_mean(found):.3f}" if found else "-"]
            cells += [f"{min(found):.3f}" if found else "-"]
        rows.append([name, len(of_pass), *cells])
    heads = ("grouped_mm", "permuted", "dense")
    yield from _table("pass|cases|" + "|".join(f"{h}: geomean|least" for h in heads), rows)


def _rows(cases: list[Record]) -> Iterator[str]:
    rows = [
        [
            case["shape"],
            case["op"],
            _number(case.get("tbs"), ".2f"),
            _number(case.get("of_copy_ceiling"), ".2f"),
            _ratio(case, "torch"),
            _ratio(case, "compiled"),
        ]
        for case in cases
    ]
    yield "TB/s of the bytes that must be moved; torch's time over ours, eager and compiled.\n"
    yield from _table("shape|op|TB/s|of copy|torch|compiled", rows)


def _routing(cases: list[Record]) -> Iterator[str]:
    indices = [case for case in cases if case["op"] == "routing_indices"]
    rows = [
        [
            case["E"],
            case["slots"],
            _microseconds(case, "moe_ops"),
            _microseconds(case, "torch"),
            _ratio(case, "eager"),
            _microseconds(case, "moe_ops, graph"),
            _microseconds(case, "torch, no sync, graph"),
            _ratio(case, "graph"),
        ]
        for case in indices
    ]
    yield (
        "routing_indices, us: against argsort, bincount (which waits for the device) and an inverse; "
        "in a CUDA graph with scatter_add_ in bincount's place.\n"
    )
    yield from _table("E|slots|ours|torch|ratio|ours, graph|torch, graph|ratio", rows)
    yield "topk_routing, us, in a CUDA graph: against softmax, topk and a division.\n"
    rows = [
        [
            *(case[key] for key in ("T", "E", "K", "pass")),
            *(_microseconds(case, name) for name in ("moe_ops", "torch")),
            _ratio(case, "torch"),
        ]
        for case in cases
        if case["op"] == "topk_routing"
    ]
    yield from _table("T|E|K|pass|ours|torch|ratio", rows)


def _decode(cases: list[Record]) -> Iterator[str]:
    rows = [
        [
            *(case[key] for key in ("shape", "projection", "T")),
            *(_microseconds(case, name) for name in ("moe_ops", "torch", "read")),
            _number(case["floor_milliseconds"], ".1f", times=1000),
            _ratio(case, "torch"),
            _ratio(case, "of read"),
            _number(case.get("of_floor"), ".2f"),
        ]
        for case in cases
    ]
    yield (
        "us a call, in a CUDA graph of many calls with other weights and experts each; `read` only "
        "reads the weights of the experts that have rows; `floor` is their bytes over the ceiling of "
        "reading.\n"
    )
    header = (
        "shape|projection|T|ours|grouped_mm|read|floor|grouped_mm / ours|ours / read|ours / floor"
    )
    yield from _table(header, rows)


def _dispatch(cases: list[Record]) -> Iterator[str]:
    rows = []
    for case in cases:
        ours, launches, bare = (
            case["microseconds"][name][1] for name in ("moe_ops", "launches", "bare op")
        )
        rows.append(
            [
                case["call"],
                case["kernels"],
                *(f"{us:.1f}" for us in (ours, launches, bare)),
                f"{ours / (launches + bare):.2f}",
                f"{case['of_bare_op']:.2f}",
            ]
        )
    yield (
        "us of CPU time a call: ours, its Triton launches alone, and an op of the same schema that "
        "does nothing.\n"
    )
    yield from _table(
        "call|kernels|ours|launches|bare op|ours / (launches + bare op)"
        "|(ours - launches) / bare op",
        rows,
    )


def _first_call(what: str, cases: list[Record]) -> Iterator[str]:
    yield (
        f"Seconds of forward and backward of {what} in a fresh process, after torch's own first "
        "gradient, of a product.\n"
    )
    names = ("torch alone", "first", "second")
    rows = [
        [case["shape"], case["triton_cache"], *(case["seconds"][name] for name in names)]
        for case in cases
    ]
    yield from _table("shape|Triton cache|torch's first gradient|first call|second call", rows)


def _experts(cases: list[Record]) -> Iterator[str]:
    yield (
        "The whole expert block. Times of transformers' grouped_mm over ours, eager, compiled for "
        "these sizes, and compiled for any number of tokens; the aim of the second; ours over the "
        "floor (products at the dense ceiling, sums over slots at the copy ceiling); the same with "
        "uniform routing in the same turns; what recompute costs us.\n"
    )
    header = "shape|routing|pass|ms|TFLOP/s|eager|compiled|aim|dynamic|floor|of uniform|recompute"
    rows = [
        [
            *(case[key] for key in ("shape", "routing", "pass")),
            _milliseconds(case, "moe_ops"),
            _number(case["tflops"].get("moe_ops"), ".0f"),
            *(_ratio_of_some(case, name) for name in ("eager", "compiled")),
            _number(case.get("aim"), ".2f"),
            _ratio_of_some(case, "compiled, dynamic"),
            _number(case.get("of_floor"), ".2f"),
            *(_ratio_of_some(case, name) for name in ("of uniform", "recompute")),
        ]
        for case in cases
    ]
    yield from _table(header, rows)
    yield (
        "MiB of memory beside the inputs: kept for backward, without the output; the output; the "
        "most at once in forward and backward, and the gradients in it.\n"
    )
    yield from _table(
        "shape|routing|implementation|kept|output|peak|gradients",
        _memory(cases, "shape", "routing"),
    )


def _ratio_of_some(case: Record, name: str) -> str:
    """Not every record has it: what was not compared is not wrong."""
    compared = name in case["errors"] or name in case["ratio"]
    return _ratio(case, name) if compared else "-"


def _memory(cases: list[Record], *keys: str) -> Iterator[list[object]]:
    """A row for each implementation, which begins with what the case has under `keys`."""
    for case in cases:
        for who, mib in case.get("mib", {}).items():
            amounts = (_number(mib.get(what), ".0f") for what in MEMORY)
            yield [*(case[key] for key in keys), who, *amounts]


def _experts_kernels(cases: list[Record]) -> Iterator[str]:
    yield (
        "A forward and backward, kernel by kernel in the order of the launches: ms, the share of the "
        "whole, and of a product the time over its floor at the dense ceiling.\n"
    )
    shapes = list(dict.fromkeys(case["shape"] for case in cases))
    cells = {(case["kernel"], case["nth"], case["shape"]): _kernel(case) for case in cases}
    launches = _in_order(
        [(case["kernel"], case["nth"]) for case in cases if case["shape"] == shape]
        for shape in shapes
    )
    rows = [
        [f"{_short(kernel)} {nth}", *(cells.get((kernel, nth, shape), "-") for shape in shapes)]
        for kernel, nth in launches
    ]
    yield from _table("|".join(["kernel", *shapes]), rows)


def _short(kernel: str) -> str:
    """A kernel of torch's without its template arguments and parameters."""
    return re.split(r"[<(]", kernel.removeprefix("void "), maxsplit=1)[0] or kernel


def _kernel(case: Record) -> str:
    of_floor = f", {case['of_floor']:.2f}x" if "of_floor" in case else ""
    return f"{case['milliseconds']:.3f} ({case['share']:.0%}{of_floor})"


def _in_order(sequences: Iterable[list[tuple[str, int]]]) -> list[tuple[str, int]]:
    """All items once; one that the first sequence lacks comes after the one that it follows."""
    merged: list[tuple[str, int]] = []
    for sequence in sequences:
        place = 0
        for item in sequence:
            if item in merged:
                place = merged.index(item) + 1
            else:
                merged.insert(place, item)
                place += 1
    return merged


def _experts_peers(cases: list[Record]) -> Iterator[str]:
    yield (
        "Other libraries' blocks, each beside ours in a process of its own: their time over ours, "
        "the MiB that they and we keep and take at most, the seconds of their first call.\n"
    )
    rows = []
    for case in cases:
        peer = case["peer"]
        amounts = [case.get("mib", {}).get(who, {}) for who in (peer, "moe_ops")]
        rows.append(
            [
                *(case[key] for key in ("shape", "peer", "pass")),
                *(_milliseconds(case, who) for who in (peer, "moe_ops")),
                _ratio(case, peer),
                *(
                    " / ".join(_number(mib.get(what), ".0f") for mib in amounts)
                    for what in ("kept", "peak")
                ),
                case["first_call_seconds"],
            ]
        )
    yield from _table("shape|peer|pass|theirs, ms|ours, ms|ratio|kept|peak|first call", rows)


def _lora(cases: list[Record]) -> Iterator[str]:
    yield (
        "Adapters of rank 16 on both projections of frozen experts, gradients of the input, the "
        "router weights and the adapters. Times of torch's grouped_mm over ours: eager over eager, "
        "compiled over eager, compiled over compiled and its aim; ours over the floor; ours with "
        "a checkpoint over ours without.\n"
    )
    names = ("eager", "compiled", "both compiled", "checkpoint", "checkpoint, compiled")
    rows = [
        [
            *(case[key] for key in ("shape", "layout", "pass")),
            *(_milliseconds(case, who) for who in ("moe_ops", "moe_ops compiled", "compiled")),
            *(_ratio_of_some(case, name) for name in names[:3]),
            _number(case.get("aim"), ".2f"),
            _number(case.get("of_floor"), ".2f"),
            *(_ratio_of_some(case, name) for name in names[3:]),
        ]
        for case in cases
    ]
    header = (
        "shape|layout|pass|ours, ms|ours compiled, ms|grouped_mm compiled, ms"
        "|eager|compiled|both compiled|aim|floor"
    )
    yield from _table("|".join([header, *names[3:]]), rows)
    yield "MiB beside the inputs, as of the experts; eager and compiled are torch's grouped_mm.\n"
    header = "shape|layout|implementation|kept|output|peak|gradients"
    yield from _table(header, _memory(cases, "shape", "layout"))


def _blocks(cases: list[Record]) -> Iterator[str]:
    yield (
        "Qwen3-MoE's block with its router. Times over moe_ops.layers.MoE: of transformers' loop over "
        "the experts, of its grouped_mm, eager and compiled, and of the last over ours compiled; then "
        "the same over the fused block of moe_ops.compat.\n"
    )
    names = ("loop", "eager", "compiled", "both compiled")
    both = [case for case in cases if "peer" not in case]
    rows = [
        [
            *(case[key] for key in ("shape", "pass")),
            *(_ratio_of_some(case, f"{of}{name}") for of in ("", "compat: ") for name in names),
            _number(case.get("of_floor"), ".2f"),
        ]
        for case in both
    ]
    header = "|".join(["shape|pass", *names, *(f"compat: {name}" for name in names), "floor"])
    yield from _table(header, rows)
    yield (
        "ms, and the MiB that a step keeps for backward and takes at most beside its inputs; "
        "backward is what forward leaves of a step.\n"
    )
    header = "shape|implementation|forward|backward|forward+backward|kept|peak"
    yield from _table(header, _steps(both))
    peers = [case for case in cases if "peer" in case]
    if peers:
        yield "Other libraries' blocks, each in a process of its own beside ours: time over ours.\n"
        rows = [
            [
                *(case[key] for key in ("shape", "peer", "pass")),
                *(_milliseconds(case, who) for who in (case["peer"], "moe_ops", "moe_ops compat")),
                *(_ratio_of_some(case, f"{of}{case['peer']}") for of in ("", "compat: ")),
            ]
            for case in peers
        ]
        header = "shape|peer|pass|theirs, ms|ours, ms|compat, ms|ratio|compat: ratio"
        yield from _table(header, rows)


def _steps(cases: list[Record]) -> Iterator[list[object]]:
    for shape in dict.fromkeys(case["shape"] for case in cases):
        of_pass = {case["pass"]: case for case in cases if case["shape"] == shape}
        medians = {
            name: {who: median for who, (_, median, _) in case["milliseconds"].items()}
            for name, case in of_pass.items()
        }
        forward, step = (medians.get(name, {}) for name in ("forward", "forward+backward"))
        mib = of_pass.get("forward+backward", {}).get("mib", {})
        for who in dict.fromkeys([*forward, *step]):
            times = forward.get(who), step.get(who)
            rest = None if None in times else step[who] - forward[who]
            amounts = (mib.get(who, {}).get(what) for what in ("kept", "peak"))
            yield [
                shape,
                who,
                *(_number(time, ".2f") for time in (times[0], rest, times[1])),
                *(_number(amount, ".0f") for amount in amounts),
            ]


TABLES: dict[str, Callable[[list[Record]], Iterator[str]]] = {
    "ceilings": _ceilings,
    "gemm": _gemm,
    "rows": _rows,
    "routing": _routing,
    "decode": _decode,
    "dispatch": _dispatch,
    "first-call": functools.partial(_first_call, "grouped_gemm"),
    "experts": _experts,
    "experts-kernels": _experts_kernels,
    "experts-first-call": functools.partial(_first_call, "fused_experts"),
    "experts-peers": _experts_peers,
    "lora": _lora,
    "blocks": _blocks,
}


def _facts(environment: dict[str, Any]) -> str:
    return _listed({key: what for key, what in environment.items() if key not in PART_FACTS})


def _part_facts(environment: dict[str, Any]) -> str:
    """Empty where there is nothing to say."""
    return _listed({key: environment[key] for key in PART_FACTS[1:] if environment.get(key)})


def _listed(facts: dict[str, Any]) -> str:
    shown = dict(facts)
    if "kernel_sha256" in shown:
        shown["kernel_sha256"] = shown["kernel_sha256"][:12]
    for key, value in shown.items():
        if isinstance(value, dict):
            shown[key] = "; ".join(f"{name}: {what}" for name, what in value.items())
        elif isinstance(value, list):
            shown[key] = "; ".join(map(str, value))
    return ", ".join(f"{key} {value}" for key, value in shown.items())


def _table(header: str, rows: Iterable[Sequence[object]]) -> Iterator[str]:
    columns = header.split("|")
    yield "| " + " | ".join(columns) + " |"
    yield "|" + " --- |" * len(columns)
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"
    yield ""


def _median_ratio(case: Record, name: str) -> float | None:
    quartiles = case.get("ratio", {}).get(name)
    return None if quartiles is None else float(quartiles[1])


def _ratio(case: Record, name: str) -> str:
    """With its quartiles; `wrong` where a result was."""
    quartiles = case["ratio"].get(name)
    if quartiles is None:
        return "wrong" if case.get("wrong") else "-"
    low, median, high = quartiles
    return f"{median:.2f} ({low:.2f}-{high:.2f})"


def _microseconds(case: Record, name: str) -> str:
    return _number(case["milliseconds"].get(name, (None,) * 3)[1], ".1f", times=1000)


def _milliseconds(case: Record, name: str) -> str:
    return _number(case["milliseconds"].get(name, (None,) * 3)[1], ".2f")


def _number(value: float | None, form: str, less: float = 0, times: float = 1) -> str:
    return "-" if value is None else format(value * times - less, form)


# Plots


def _plot_gemm(cases: list[Record], plt: Any) -> Any:
    """torch._grouped_mm's time over ours, a panel for each projection."""
    uniform = [case for case in cases if case["routing"] == "uniform"]
    projections = list(dict.fromkeys(case["projection"] for case in uniform))
    figure, panels = plt.subplots(
        len(projections),
        figsize=(9, 3 * len(projections)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for (axes,), projection in zip(panels, projections, strict=True):
        here = [case for case in uniform if case["projection"] == projection]
        heights = {(c["shape"], c["pass"]): _median_ratio(c, "torch") for c in here}
        _bars(axes, heights, PASSES)
        axes.set_ylabel("torch._grouped_mm / ours")
        axes.set_title(f"{projection} projection: above 1 ours is faster", fontsize=10)
    _legend(figure, panels[0][0])
    return figure


def _plot_rows(cases: list[Record], plt: Any) -> Any:
    """Fraction of the copy bandwidth."""
    figure, axes = plt.subplots(figsize=(9, 3.5), layout="constrained")
    heights = {(c["shape"], c["op"]): c.get("of_copy_ceiling") for c in cases}
    _bars(axes, heights, tuple(dict.fromkeys(case["op"] for case in cases)))
    axes.set_ylabel("fraction of copy bandwidth")
    axes.set_title("bytes that must be moved over time, 1 is a device copy", fontsize=10)
    _legend(figure, axes)
    return figure


def _plot_experts(cases: list[Record], plt: Any) -> Any:
    """transformers' compiled grouped_mm's time over ours, and the eager one's."""
    uniform = [case for case in cases if case["routing"] == "uniform"]
    figure, panels = plt.subplots(2, figsize=(9, 6), sharex=True, layout="constrained")
    for axes, peer in zip(panels, ("compiled", "eager"), strict=True):
        heights = {
            (case["shape"], case["pass"]): _median_ratio(case, peer)
            for case in uniform
            if peer in case["errors"]
        }
        _bars(axes, heights, ("forward", "forward+backward"))
        axes.set_ylabel("grouped_mm / ours")
        axes.set_title(f"transformers' grouped_mm, {peer}: above 1 ours is faster", fontsize=10)
    _legend(figure, panels[0])
    return figure


def _plot_blocks(cases: list[Record], plt: Any) -> Any:
    """transformers' blocks' times over that of layers.MoE, a panel for each of its experts."""
    peers = ("loop", "eager", "compiled")
    own = [case for case in cases if "peer" not in case]
    shown = [peer for peer in peers if any(peer in case["errors"] for case in own)]
    figure, panels = plt.subplots(
        len(shown), figsize=(9, 3 * len(shown)), sharex=True, squeeze=False, layout="constrained"
    )
    for (axes,), peer in zip(panels, shown, strict=True):
        heights = {
            (case["shape"], case["pass"]): _median_ratio(case, peer)
            for case in own
            if peer in case["errors"]
        }
        _bars(axes, heights, ("forward", "forward+backward"))
        whose = "loop over experts" if peer == "loop" else f"grouped_mm, {peer}"
        axes.set_ylabel("transformers / ours")
        axes.set_title(f"transformers' {whose}: above 1 ours is faster", fontsize=10)
    _legend(figure, panels[0][0])
    return figure


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)


def _bars(axes: Any, heights: dict[tuple[str, str], float | None], series: Sequence[str]) -> None:
    """Groups of bars, one for each shape, and a line at 1; what was wrong has no bar."""
    shapes = list(dict.fromkeys(shape for shape, _ in heights))
    width = 0.8 / len(series)
    for i, name in enumerate(series):
        places = [place + (i - (len(series) - 1) / 2) * width for place in range(len(shapes))]
        values = [heights.get((shape, name)) or 0.0 for shape in shapes]
        bars = axes.bar(places, values, width, label=name, zorder=2)
        told = [f"{value:.2f}" if value else "wrong" for value in values]
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.bar_label(bars, told, fontsize=7, padding=2, bbox=paper, zorder=3)
    axes.axhline(1.0, color="black", linewidth=1, zorder=1)
    axes.set_xticks(range(len(shapes)), shapes)
    axes.margins(y=0.15)


# By part: what the image shows, and what draws it.
PLOTS: dict[str, tuple[str, Callable[[list[Record], Any], Any]]] = {
    "gemm": ("grouped_gemm against torch._grouped_mm by shape", _plot_gemm),
    "rows": ("bandwidth of the ops that move rows by shape", _plot_rows),
    "experts": ("the expert block against transformers' grouped_mm by shape", _plot_experts),
    "blocks": ("the block with its router against transformers' by shape", _plot_blocks),
}


def write_plots(results: Path, images: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        return
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    for device, parts in cuda_results(results).items():
        for part, (_, draw) in PLOTS.items():
            if part in parts and parts[part]["cases"]:
                images.mkdir(parents=True, exist_ok=True)
                figure = draw(parts[part]["cases"], plt)
                gpu = parts[part]["environment"]["gpu"]
                figure.suptitle(f"{gpu}, {parts[part]['environment']['date']}", fontsize=11)
                # Without the date of drawing, so that the same numbers make the same file.
                figure.savefig(images / f"{device}_{part}.png", dpi=120, metadata={"Software": ""})
                plt.close(figure)


def between(text: str, markers: tuple[str, str], lines: Iterable[str]) -> str:
    """The text with the lines between the markers; as it is where there are no lines."""
    body = "\n".join(lines)
    if not body:
        return text
    before, begin, rest = text.partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not begin or not end:
        raise ValueError(f"the page has no {markers[0]} ... {markers[1]} to write between")
    return f"{before}{begin}\n\n{body}\n{end}{after}"


def write(results: Path, page: Path) -> None:
    """Rewrites the page and the images beside it."""
    images = page.parent / "images"
    write_plots(results, images)
    text = page.read_text(encoding="utf-8")
    text = between(text, CPU_MARKERS, cpu_tables(results))
    text = between(text, CUDA_MARKERS, cuda_tables(results, images))
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md")

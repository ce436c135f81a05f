# SPDX-License-Identifier: Apache-2.0
"""The tables of each part of a GPU run."""

from __future__ import annotations

import functools
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

PASSES = ("forward", "dX", "dW")
MEMORY = ("kept", "output", "peak", "gradients")

Record = dict[str, Any]


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

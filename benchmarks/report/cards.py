# SPDX-License-Identifier: Apache-2.0
"""Writes the part of docs/performance.md that has numbers: a table for each card, and its shortfalls.

A card is a GPU. The CPUs share one table.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from benchmarks import aims, suite
from benchmarks.expert_parallel import acceptance
from benchmarks.expert_parallel.acceptance import told_number
from benchmarks.expert_parallel.records import RANKS, part_of
from benchmarks.report.columns import Column, Record, Table, at, keys, markdown, median
from benchmarks.report.records import by_shape, cpu_groups, own
from benchmarks.report.results import Result, cpu_results, cuda_results

FORWARD, BOTH = "forward", "forward+backward"
# The parts that time the whole expert block, and the peer beside compiled grouped_mm.
BLOCKS, PEERS, PEER = ("experts", "named"), "experts-peers", "sonicmoe"
# What else a card tells of, and so is dated by.
OTHERS = (
    "sweep", "widths", "blocks", "model", "experts-first-call", "host", "decode-block", "quantised",
    *(part_of(ranks) for ranks in RANKS),
)  # fmt: skip
_WRONG = (
    "Where the other's result was further from fp64's than the tests allow, it was not timed: "
    "theirs wrong. "
)
_SIZES = {shape.name: shape for shape in suite.SUITE}


def cards(results: Path) -> Iterator[str]:
    """Yield the lines of every card."""
    for device, parts in cuda_results(results).items():
        if any(part in parts for part in BLOCKS):
            yield from _gpu(device, parts)
    yield from _cpus(results)


def block_cases(parts: dict[str, Result]) -> list[Record]:
    """Return the cases of the whole block, uniformly routed, against compiled grouped_mm.

    A case that was measured against SonicMoE too has that ratio under "sonicmoe".
    """
    theirs = {
        (case["shape"], case["pass"]): case["ratio"].get(PEER)
        for case in parts.get(PEERS, {}).get("cases", [])
        if case["peer"] == PEER
    }
    found = []
    for part in BLOCKS:
        for case in own(parts.get(part, {}).get("cases", [])):
            if case["routing"] == "uniform" and "compiled" in case["errors"]:
                sonicmoe = theirs.get((case["shape"], case["pass"]))
                ratios = case["ratio"] | ({PEER: sonicmoe} if sonicmoe else {})
                found.append({**case, "ratio": ratios})
    return found


def block_bars(parts: dict[str, Result]) -> list[Record]:
    """Return a record of each ratio in block_cases, whose peer it names."""
    return [
        {**case, "peer": told, "height": case["ratio"].get(peer)}
        for peer, told in (("compiled", "compiled grouped_mm"), (PEER, "SonicMoE"))
        for case in block_cases(parts)
        if peer == "compiled" or peer in case["ratio"]
    ]


def _sizes(record: Record) -> str:
    """Return the sizes of a shape, those of the suite by its name: "16384 2048 768 128 8"."""
    if "T" in record:
        sizes = [record[letter] for letter in "THIEK"]
    else:
        of = _SIZES[record["shape"]]
        sizes = [of.num_tokens, of.hidden_size, of.intermediate_size, of.num_experts, of.top_k]
    return " ".join(map(str, sizes))


def _ratio(name: str, peer: str) -> Column:
    def cell(record: Record) -> str:
        case = record["of_pass"].get(name, {"ratio": {}})
        if peer in case["ratio"]:
            return f"{case['ratio'][peer][1]:.2f}"
        return "theirs wrong" if peer in case.get("wrong", []) else "-"

    return Column(name if peer == "compiled" else f"{name}, SonicMoE", cell)


def _mib(who: str) -> Column:
    take = at("of_pass", BOTH, "mib", who, "peak")
    return Column("MiB" if who == "moe_ops" else "grouped_mm's MiB", take, ".0f")


def _block(cases: list[Record]) -> Table:
    peers = ["compiled"]
    if any(PEER in case["ratio"] for case in cases):
        peers.append(PEER)
    return Table(
        rows=by_shape,
        columns=(
            *keys("shape"),
            Column("T H I E K", _sizes),
            Column("ms", median("of_pass", BOTH, "milliseconds", "moe_ops"), ".2f"),
            *(_ratio(name, peer) for peer in peers for name in (FORWARD, BOTH)),
            *(_mib(who) for who in ("moe_ops", "compiled")),
        ),
    )


def _gpu(device: str, parts: dict[str, Result]) -> Iterator[str]:
    told = [parts[part]["environment"] for part in (*BLOCKS, PEERS, *OTHERS) if part in parts]
    environment, dates = told[0], sorted({of["date"] for of in told})
    cases = block_cases(parts)
    wrong = _WRONG if any(case.get("wrong") for case in cases) else ""
    versions = ", ".join(
        f"{name} {environment[name]}" for name in ("torch", "triton") if name in environment
    )
    yield f"## {environment['gpu']}\n"
    yield (
        f"{', '.join(dates)}; {versions}. The whole block: T tokens, H hidden size, I "
        "intermediate size, E experts, K of them a token. ms of our forward and backward; the time of "
        f"transformers' grouped_mm, compiled for exactly these sizes, over ours;{_peer(parts)} MiB at "
        f"most beside the inputs. {wrong}[All tables, each with its date](results/{device}.md).\n"
    )
    yield from markdown(_block(cases), cases)
    if "sweep" in parts:
        yield f"{_sweep(device, parts['sweep']['cases'])}\n"
    yield "What falls short:\n"
    yield from _shortfalls(parts, cases)
    yield ""


def _peer(parts: dict[str, Result]) -> str:
    """Say what SonicMoE's columns are of, if there are any."""
    version = parts.get(PEERS, {}).get("environment", {}).get("present", {}).get(PEER)
    return (
        f" that of SonicMoE {version}, in its default configurations, over ours;" if version else ""
    )


def _ratios(cases: list[Record], name: str) -> list[float]:
    return [
        case["ratio"]["compiled"][1]
        for case in cases
        if case["pass"] == name and "compiled" in case["ratio"]
    ]


def _sweep(device: str, cases: list[Record]) -> str:
    told = []
    for name in (FORWARD, BOTH):
        ratios = _ratios([{**case, "ratio": case.get("ratio", {})} for case in cases], name)
        if ratios:
            mean = statistics.geometric_mean(ratios)
            told.append(f"{name} {mean:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    number = len({(case["shape"], case["routing"]) for case in cases})
    return (
        f"{number} more shapes, drawn at random, that no table was tuned for "
        f"([each of them](results/{device}_sweep.md)): in the geometric mean {', '.join(told)}."
    )


def _shortfalls(parts: dict[str, Result], cases: list[Record]) -> Iterator[str]:
    """Yield what the results show to be slower or larger than its peer or its aim."""
    found = False
    for line in (
        *_slower(parts, cases), *_block_aims(cases), *_drawn(parts), *_larger([*cases, *parts.get("sweep", {}).get("cases", [])]),
        *_larger_than_peer(parts), *_widths(parts), *_compat(parts), *_model(parts), *_first_call(parts),
        *_host(parts), *_decoding(parts), *_quantised(parts), *_expert_parallel(parts),
    ):  # fmt: skip
        found = True
        yield f"- {line}"
    if not found:
        yield "- Nothing in these tables."


def _slower(parts: dict[str, Result], cases: list[Record]) -> Iterator[str]:
    for what, group in (
        ("shapes above", cases),
        ("drawn shapes", parts.get("sweep", {}).get("cases", [])),
    ):
        for name in (FORWARD, BOTH):
            ratios = _ratios([{**case, "ratio": case.get("ratio", {})} for case in group], name)
            slow = [ratio for ratio in ratios if ratio < 1]
            if slow:
                yield (
                    f"{name}: slower than compiled grouped_mm on {len(slow)} of {len(ratios)} "
                    f"{what}, down to {min(slow):.2f}x."
                )


def _drawn(parts: dict[str, Result]) -> Iterator[str]:
    """Compare the geometric mean over the drawn shapes with its aim."""
    cases = parts.get("sweep", {}).get("cases", [])
    ratios = _ratios([{**case, "ratio": case.get("ratio", {})} for case in cases], BOTH)
    if ratios and (mean := statistics.geometric_mean(ratios)) < aims.SWEEP:
        yield f"{BOTH} of the drawn shapes, in the geometric mean: {_told(mean, aims.SWEEP)}."


def _missed(cases: list[Record], what: dict[str, float]) -> list[str]:
    """Return the shapes whose forward and backward misses its aim over compiled grouped_mm."""
    return [
        f"{case['shape']} {_told(ratio[1], aim)}"
        for case in cases
        if case["pass"] == BOTH
        and (aim := what.get(case["shape"]))
        and (ratio := case["ratio"].get("compiled"))
        and ratio[1] < aim
    ]


def _told(reached: float, aim: float, unit: str = "x") -> str:
    """Tell a number beside what it was to be, with a digit more where two would be the same."""
    digits = 3 if f"{reached:.2f}" == f"{aim:.2f}" else 2
    return f"{reached:.{digits}f}{unit} (aim {aim:g}{unit})"


def _block_aims(cases: list[Record]) -> Iterator[str]:
    """Compare the block with its aims over compiled grouped_mm."""
    for told, aim in (("", aims.BLOCK), (" of named models", aims.NAMED)):
        if missed := _missed(cases, aim):
            yield f"{BOTH}{told}, compiled grouped_mm's time over ours: {', '.join(missed)}."


def _compat(parts: dict[str, Result]) -> Iterator[str]:
    """Name the blocks of moe_ops.compat, which are not compiled, that are slower than a compiled one."""
    slow = [
        f"{case['shape']} {ratio[1]:.2f}x"
        for case in own(parts.get("blocks", {}).get("cases", []))
        if case.get("pass") == BOTH
        and (ratio := at("ratio", "compat: compiled")(case))
        and ratio[1] < 1
    ]
    if slow:
        yield (
            "The fused block of moe_ops.compat in eager mode, compiled grouped_mm's time over its own: "
            f"{', '.join(slow)}."
        )


def _widths(parts: dict[str, Result]) -> Iterator[str]:
    """Compare widths that are no multiples of 8 with the next that are."""
    slow = [
        f"H {case['H']}, I {case['I']}, T {case['T']}, {case['pass']} {_told(ratio[1], aims.WIDTH)}"
        for case in parts.get("widths", {}).get("cases", [])
        if case["T"] >= aims.WIDTH_TOKENS
        and (ratio := case["ratio"].get("next"))
        and ratio[1] > aims.WIDTH
    ]
    if slow:
        yield f"Widths that are no multiples of 8, over the next that are: {', '.join(slow)}."


def _model(parts: dict[str, Result]) -> Iterator[str]:
    """Compare the steps of a whole model that have the most tokens with their aims."""
    cases = parts.get("model", {}).get("cases", [])
    tokens = max((case["tokens"] for case in cases), default=0)
    for case in cases:
        if case["tokens"] != tokens:
            continue
        told, faster, smaller = (
            (", with activation checkpointing", aims.MODEL_CHECKPOINTS, aims.MODEL_CHECKPOINTS_PEAK)
            if case["checkpoints"]
            else ("", aims.MODEL, aims.MODEL_PEAK)
        )
        step = f"A step of a whole model, {tokens} tokens{told}"
        ratio = at("ratio", "grouped_mm")(case)
        if ratio and ratio[1] < faster:
            yield f"{step}, grouped_mm's time over ours: {_told(ratio[1], faster)}."
        ours, theirs = (at("peak_mib", who)(case) for who in ("moe_ops", "grouped_mm"))
        if ours and theirs and ours / theirs > smaller:
            yield f"{step}, our memory at most over grouped_mm's: {_told(ours / theirs, smaller)}."


def _first_call(parts: dict[str, Result]) -> Iterator[str]:
    """Compare the first call of the experts, in the middle of its runs, with its aims."""
    seconds = defaultdict(list)
    for case in parts.get("experts-first-call", {}).get("cases", []):
        seconds[case["triton_cache"]].append(case["seconds"]["first"])
    for cache, told, aim in (
        ("empty", "nothing", aims.FIRST_CALL_COLD),
        ("warm", "everything", aims.FIRST_CALL_WARM),
    ):
        if seconds[cache] and (first := statistics.median(seconds[cache])) > aim:
            yield f"The experts' first call with {told} compiled before: {_told(first, aim, ' s')}."


def _larger(cases: list[Record]) -> Iterator[str]:
    """Name the shapes, drawn ones too, that take more memory than is allowed."""
    names = []
    for case in cases:
        ours, theirs = (at("mib", who, "peak")(case) for who in ("moe_ops", "compiled"))
        if ours and theirs and aims.exceeds_peak(ours, theirs):
            names.append(f"{case['shape']} {ours / theirs:.2f}x")
    if names:
        yield f"More memory at most than compiled grouped_mm: {', '.join(names)}."


def _larger_than_peer(parts: dict[str, Result]) -> Iterator[str]:
    names = []
    for case in parts.get(PEERS, {}).get("cases", []):
        ours, theirs = (at("mib", who, "peak")(case) for who in ("moe_ops", PEER))
        if case["peer"] == PEER and ours and theirs and ours / theirs >= 1.005:
            names.append(f"{case['shape']} {ours / theirs:.2f}x")
    if names:
        yield f"More memory at most than SonicMoE: {', '.join(names)}."


def _host(parts: dict[str, Result]) -> Iterator[str]:
    """Compare the host's time and a step's with their aims, and tell which calls are slower, too."""
    late, slow, steps = [], [], []
    for case in parts.get("host", {}).get("cases", []):
        if case.get("pass") != BOTH:
            continue
        name = f"{case['what']} {case['shape']}"
        for told, host, device in (
            ("", "of compiled", "compiled"),
            (" compiled", "compiled of compiled", "both compiled"),
        ):
            ratio = at("host_ratio", host)(case)
            if ratio and round(ratio[1], 2) > aims.HOST:
                late.append(f"{name}{told} {ratio[1]:.2f}x")
            ratio = at("ratio", device)(case)
            if ratio and ratio[1] < 1:
                slow.append(f"{name}{told} {ratio[1]:.2f}x")
            ratio = at("step_ratio", device)(case)
            if ratio and case["shape"] == suite.HOST[1].name and ratio[1] < aims.STEP:
                steps.append(f"{name}{told} {_told(ratio[1], aims.STEP)}")
    yield from _host_of_gemm(parts)
    if late:
        yield (
            f"The host's time of forward+backward, ours over compiled grouped_mm's (aim {aims.HOST}x): "
            f"{', '.join(late)}."
        )
    if slow:
        yield f"Of these calls slower than compiled grouped_mm's: {', '.join(slow)}."
    if steps:
        yield (
            f"A step of {BOTH} among many that follow each other, compiled grouped_mm's time over "
            f"ours: {', '.join(steps)}."
        )


def _host_of_gemm(parts: dict[str, Result]) -> Iterator[str]:
    """Tell where grouped_gemm takes more of the host's time than torch's."""
    slow = [
        f"{case['shape']} {case['pass']} {ratio[1]:.2f}x"
        for case in parts.get("host", {}).get("cases", [])
        if case["what"] == "grouped_gemm"
        and (ratio := at("host_ratio", "of torch")(case))
        and ratio[1] > 1
    ]
    if slow:
        yield f"The host's time of grouped_gemm, ours over torch's: {', '.join(slow)}."


def _decoding(parts: dict[str, Result]) -> Iterator[str]:
    """Compare a decoding step with its floor, the read of the weights that it touches."""
    slow = [
        f"{case['T']} token{'s' * (case['T'] > 1)} {case['of_floor']:.2f}x"
        for case in parts.get("decode-block", {}).get("cases", [])
        if case.get("of_floor", 0) > (aims.DECODE_ONE if case["T"] == 1 else aims.DECODE)
    ]
    if slow:
        yield (
            "Decoding a block, over the time of reading its weights (aim "
            f"{aims.DECODE_ONE}x for one token and {aims.DECODE}x from eight on): "
            f"{', '.join(slow)}."
        )


def _quantised(parts: dict[str, Result]) -> Iterator[str]:
    """Compare decoding quantised experts with the aim over bf16's time."""
    slow = [
        f"{case['format']} {case['ratio']['bf16'][1]:.2f}x (aim {case['aim']}x)"
        for case in parts.get("quantised", {}).get("cases", [])
        if case["what"] == "decode" and "aim" in case and case["ratio"]["bf16"][1] < case["aim"]
    ]
    if slow:
        yield f"Decoding quantised experts of 8 tokens, bf16's time over ours: {', '.join(slow)}."


def _expert_parallel(parts: dict[str, Result]) -> Iterator[str]:
    """Name what expert parallelism was to reach and did not."""
    for ranks in RANKS:
        missed: dict[str, list[str]] = defaultdict(list)
        for aim in acceptance.aims(parts.get(part_of(ranks), {}).get("cases", [])):
            if aim.reached is not None and aim.reached < aim.must:
                told = f"{told_number(aim.reached)} (aim {told_number(aim.must)})"
                missed[aim.what].append(f"{aim.shape} {told}")
        for what, shapes in missed.items():
            yield f"Expert parallelism on {ranks} GPUs, {what}: {', '.join(shapes)}."


def _cpus(results: Path) -> Iterator[str]:
    """Yield the table of all CPUs: transformers' experts and the bare products, by dtype."""
    rows: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for file, result in cpu_results(results):
        what = file.split("_")[1].removesuffix(".json")
        if what not in {"experts", "gemm"}:
            continue
        cpu = result["environment"].get("cpu", "")
        for group in cpu_groups(result["cases"]):
            key = (cpu, group["dtype"])
            name = group["pass"] if what == "experts" else "products"
            rows[key][name] += group["ratios"]
    if not rows:
        return
    yield "## CPU\n"
    yield (
        "transformers' experts, eager: its grouped_mm's time over ours, geometric mean and least "
        "case. Products: `torch._grouped_mm` over ours, all passes. Below 1 ours is slower. [All "
        "tables](results/cpu.md).\n"
    )
    records = [{"cpu": cpu, "dtype": dtype, **of} for (cpu, dtype), of in sorted(rows.items())]
    yield from markdown(_CPUS, records)


def _mean_and_least(name: str) -> Column:
    def cell(record: Record) -> str | None:
        ratios = record.get(name)
        return f"{statistics.geometric_mean(ratios):.2f} ({min(ratios):.2f})" if ratios else None

    return Column(name, cell)


_CPUS = Table(columns=(*keys("cpu", "dtype"), *map(_mean_and_least, (FORWARD, BOTH, "products"))))

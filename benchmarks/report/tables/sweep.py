# SPDX-License-Identifier: Apache-2.0
"""The tables of the sweep over drawn shapes, and of the named ones."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator

from benchmarks import aims
from benchmarks.report.columns import Column, Record, Table, Take, at, keys, median, ratio, spread
from benchmarks.report.records import by_shape, by_value, over_group

FORWARD, BOTH = "forward", "forward+backward"
RATIO = median("ratio", "compiled")


def _of_pass(name: str, take: Take) -> Take:
    """Take a value of one pass of a shape; None where that pass has no case."""

    def taken(record: Record) -> object:
        case = record["of_pass"].get(name)
        return None if case is None else take(case)

    return taken


def _count_below(limit: float) -> Take:
    return over_group(lambda ratios: sum(ratio < limit for ratio in ratios), RATIO)


def _peaks(case: Record) -> tuple[float, float] | None:
    """Return the MiB at most of ours and of compiled grouped_mm, where both were measured."""
    ours, theirs = (at("mib", who, "peak")(case) for who in ("moe_ops", "compiled"))
    return (ours, theirs) if ours and theirs else None


def _peak_ratio(case: Record) -> float | None:
    peaks = _peaks(case)
    return None if peaks is None else peaks[0] / peaks[1]


def _num_peaks_above(record: Record) -> int | None:
    """Count the peaks that are higher than they may be; None where no peak was measured."""
    found = [peaks for case in record["group"] if (peaks := _peaks(case))]
    return sum(aims.exceeds_peak(*peaks) for peaks in found) if found else None


def is_aligned(case: Record) -> bool:
    """Tell whether all rows begin at a sector of the L2 cache, which has 16 elements of bf16."""
    return bool(case["H"] % 16 == 0 and case["I"] % 16 == 0)


ALIGNED, MISALIGNED = "both widths multiples of 16", "a width a multiple of 8, not of 16"
_GROUPS: dict[str, Callable[[Record], bool]] = {
    "all": lambda _: True,
    "uniform routing": lambda case: bool(case["routing"] == "uniform"),
    "Zipf routing": lambda case: bool(case["routing"] == "zipf"),
    ALIGNED: is_aligned,
    MISALIGNED: lambda case: not is_aligned(case),
}


def _groups(cases: list[Record]) -> Iterator[Record]:
    """Group the cases by pass: all, and those of one kind, where there are others beside them."""
    for of, belongs in _GROUPS.items():
        group = [case for case in cases if belongs(case)]
        if group and (of == "all" or len(group) < len(cases)):
            for record in by_value("pass")(group):
                yield {"of": of, **record}


MEANS = Table(
    about=(
        "Shapes of the whole expert block that no table was tuned for: transformers' grouped_mm, "
        "compiled for exactly these sizes, over ours. The last column counts the shapes whose peak of "
        f"memory is above {aims.PEAK_FACTOR} times compiled grouped_mm's plus {aims.PEAK_MIB:.0f} MiB."
    ),
    rows=_groups,
    columns=(
        Column("shapes", "of"),
        *keys("pass"),
        Column("number", lambda record: len(record["group"])),
        Column("wrong", lambda record: sum("wrong" in case for case in record["group"])),
        Column("geomean", over_group(statistics.geometric_mean, RATIO), ".3f"),
        Column("least", over_group(min, RATIO), ".3f"),
        Column("below 1.1", _count_below(1.1)),
        Column("below 1", _count_below(1.0)),
        Column("below 0.97", _count_below(0.97)),
        Column("peaks above", _num_peaks_above),
    ),
)


def rows_per_expert(case: Record) -> float:
    """Return the mean rows of an expert."""
    return float(case["T"] * case["K"] / case["E"])


def _errors(case: Record) -> str:
    """Return the worst relative errors of ours and of compiled grouped_mm: "0.0054 / 0.0050"."""
    told = (at("errors", who)(case) for who in ("moe_ops", "compiled"))
    return " / ".join(f"{error:.4f}" if isinstance(error, float) else f"{error}" for error in told)


def _sources(case: Record) -> str | None:
    """Return how many configurations came from where: "5 computed, 1 shipped"."""
    told = case.get("configs")
    if not told:
        return None
    counts = Counter(text.split(",")[0] for text in told.values())
    return ", ".join(f"{count} {source}" for source, count in sorted(counts.items()))


def _of_ours(name: str) -> tuple[Column, ...]:
    """Return the columns of a pass: our ms and TFLOP/s, and the ratio."""
    return (
        Column(f"{name}, ms", _of_pass(name, median("milliseconds", "moe_ops")), ".3f"),
        Column("TFLOP/s", _of_pass(name, at("tflops", "moe_ops")), ".0f"),
        Column("ratio", _of_pass(name, ratio("compiled")), spread),
    )


SHAPES = Table(
    about=(
        "By shape: the mean rows of an expert; by pass our ms and TFLOP/s, and compiled grouped_mm's "
        "time over ours. Then of forward and backward our time over the floor; MiB beside the inputs "
        "at most, ours, compiled grouped_mm's and their ratio; the worst relative errors, ours and "
        "compiled grouped_mm's; where our configurations came from. Ours is wrong beyond 0.015. "
        "Compiled grouped_mm's gradients of biases may be off by more: they are sums of as many "
        "numbers as an expert has rows, which are rounded to bf16 after each addition."
    ),
    rows=by_shape,
    columns=(
        *keys("shape", "routing", "T", "H", "I", "E", "K"),
        Column("rows", rows_per_expert, ".0f"),
        *_of_ours(FORWARD),
        *_of_ours(BOTH),
        Column("floor", _of_pass(BOTH, at("of_floor")), ".2f"),
        Column("peak", _of_pass(BOTH, at("mib", "moe_ops", "peak")), ".0f"),
        Column("theirs", _of_pass(BOTH, at("mib", "compiled", "peak")), ".0f"),
        Column("peak / theirs", _of_pass(BOTH, _peak_ratio), ".2f"),
        Column("errors", _of_pass(BOTH, _errors)),
        Column("configurations", _of_pass(BOTH, _sources)),
    ),
)

# SPDX-License-Identifier: Apache-2.0
"""The tables of the sweep over drawn shapes, and of the named ones."""

from __future__ import annotations

import statistics
from collections import Counter

from benchmarks.report.columns import Column, Record, Table, Take, at, keys, median, ratio, spread
from benchmarks.report.records import by_shape, by_value, over_group

BOTH = "forward+backward"
RATIO = median("ratio", "compiled")


def _of_pass(name: str, take: Take) -> Take:
    """Take a value of one pass of a shape; None where that pass has no case."""

    def taken(record: Record) -> object:
        case = record["of_pass"].get(name)
        return None if case is None else take(case)

    return taken


def _count_below(limit: float) -> Take:
    return over_group(lambda ratios: sum(ratio < limit for ratio in ratios), RATIO)


MEANS = Table(
    about=(
        "Shapes of the whole expert block that no table was tuned for: transformers' grouped_mm, "
        "compiled for the very sizes, over ours."
    ),
    rows=by_value("pass"),
    columns=(
        *keys("pass"),
        Column("shapes", lambda record: len(record["group"])),
        Column("wrong", lambda record: sum("wrong" in case for case in record["group"])),
        Column("geomean", over_group(statistics.geometric_mean, RATIO), ".3f"),
        Column("least", over_group(min, RATIO), ".3f"),
        Column("below 1.1", _count_below(1.1)),
        Column("below 1", _count_below(1.0)),
        Column("below 0.97", _count_below(0.97)),
    ),
)


def _peak_ratio(case: Record) -> float | None:
    """Return our peak over compiled grouped_mm's."""
    ours, theirs = (at("mib", who, "peak")(case) for who in ("moe_ops", "compiled"))
    return ours / theirs if ours and theirs else None


def _sources(case: Record) -> str | None:
    """Return how many configurations came from where: "5 computed, 1 shipped"."""
    told = case.get("configs")
    if not told:
        return None
    counts = Counter(text.split(",")[0] for text in told.values())
    return ", ".join(f"{count} {source}" for source, count in sorted(counts.items()))


SHAPES = Table(
    about=(
        "By shape: the ratios; our ms of forward and backward, and its time over the floor; MiB "
        "beside the inputs at most, ours, compiled grouped_mm's and their ratio; where our "
        "configurations came from."
    ),
    rows=by_shape,
    columns=(
        *keys("shape", "routing", "T", "H", "I", "E", "K"),
        Column("forward", _of_pass("forward", ratio("compiled")), spread),
        Column(BOTH, _of_pass(BOTH, ratio("compiled")), spread),
        Column("ms", _of_pass(BOTH, median("milliseconds", "moe_ops")), ".3f"),
        Column("floor", _of_pass(BOTH, at("of_floor")), ".2f"),
        Column("peak", _of_pass(BOTH, at("mib", "moe_ops", "peak")), ".0f"),
        Column("theirs", _of_pass(BOTH, at("mib", "compiled", "peak")), ".0f"),
        Column("peak / theirs", _of_pass(BOTH, _peak_ratio), ".2f"),
        Column("configurations", _of_pass(BOTH, _sources)),
    ),
)

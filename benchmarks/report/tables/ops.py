# SPDX-License-Identifier: Apache-2.0
"""The tables of single ops: products, rows, routing, launches."""

from __future__ import annotations

import statistics

from benchmarks.report.columns import (
    Column,
    Record,
    Table,
    at,
    keys,
    median,
    microseconds,
    ratio,
    share_above_one,
    spread,
)
from benchmarks.report.records import by_pass, cpu_groups, over_group, where

CPU = Table(
    rows=cpu_groups,
    columns=(
        *keys("dtype", "counts", "pass"),
        Column("cases", lambda group: len(group["ratios"])),
        Column("geomean", lambda group: statistics.geometric_mean(group["ratios"]), ".3f"),
        Column("least shape", lambda group: min(group["means"]), ".3f"),
        Column("least case", lambda group: min(group["ratios"]), ".3f"),
        Column("cases under 0.90", lambda group: sum(r < 0.9 for r in group["ratios"])),
    ),
)

CEILINGS = Table(
    columns=(
        Column("of the run", "when"),
        Column("dense product, TFLOP/s", "dense_tflops"),
        Column("copy, TB/s", "copy_tbs"),
        Column("read, TB/s", "read_tbs"),
    )
)

GEMM = Table(
    about=(
        "TFLOP/s of ours; the same as a fraction of the dense ceiling; torch._grouped_mm's time over "
        "ours; the same with the permutation (ours within the op, torch's before or after it); a "
        "dense product's time over ours; what the permutation costs us."
    ),
    columns=(
        *keys("shape", "routing", "projection", "pass"),
        Column("TFLOP/s", at("tflops", "moe_ops"), ".0f"),
        Column("of ceiling", at("of_dense_ceiling"), ".2f"),
        Column("grouped_mm", ratio("torch"), spread),
        Column("permuted", ratio("torch permuted"), spread),
        Column("dense", ratio("dense"), spread),
        Column("cost", median("ratio", "permuted"), share_above_one),
    ),
)


def _means(heading: str, name: str) -> tuple[Column, Column]:
    """Return the columns of a ratio over a group: its geometric mean and its least."""
    take = median("ratio", name)
    return (
        Column(f"{heading}: geomean", over_group(statistics.geometric_mean, take), ".3f"),
        Column("least", over_group(min, take), ".3f"),
    )


GEMM_MEANS = Table(
    rows=by_pass,
    columns=(
        *keys("pass"),
        Column("cases", lambda record: len(record["group"])),
        *_means("grouped_mm", "torch"),
        *_means("permuted", "torch permuted"),
        *_means("dense", "dense"),
    ),
)

ROWS = Table(
    about="TB/s of the bytes that must be moved; torch's time over ours, eager and compiled.",
    columns=(
        *keys("shape", "op"),
        Column("TB/s", at("tbs"), ".2f"),
        Column("of copy", at("of_copy_ceiling"), ".2f"),
        Column("torch", ratio("torch"), spread),
        Column("compiled", ratio("compiled"), spread),
    ),
)

ROUTING_INDICES = Table(
    about=(
        "routing_indices, us: against argsort, bincount (which waits for the device) and an inverse; "
        "in a CUDA graph with scatter_add_ in bincount's place."
    ),
    rows=where(op="routing_indices"),
    columns=(
        *keys("E", "slots"),
        Column("ours", median("milliseconds", "moe_ops"), microseconds),
        Column("torch", median("milliseconds", "torch"), microseconds),
        Column("ratio", ratio("eager"), spread),
        Column("ours, graph", median("milliseconds", "moe_ops, graph"), microseconds),
        Column("torch, graph", median("milliseconds", "torch, no sync, graph"), microseconds),
        Column("ratio", ratio("graph"), spread),
    ),
)

TOPK_ROUTING = Table(
    about="topk_routing, us, in a CUDA graph: against softmax, topk and a division.",
    rows=where(op="topk_routing"),
    columns=(
        *keys("T", "E", "K", "pass"),
        Column("ours", median("milliseconds", "moe_ops"), microseconds),
        Column("torch", median("milliseconds", "torch"), microseconds),
        Column("ratio", ratio("torch"), spread),
    ),
)

DECODE = Table(
    about=(
        "us a call, in a CUDA graph of many calls with other weights and experts each; `read` only "
        "reads the weights of the experts that have rows; `floor` is their bytes over the ceiling of "
        "reading."
    ),
    columns=(
        *keys("shape", "projection", "T"),
        Column("ours", median("milliseconds", "moe_ops"), microseconds),
        Column("grouped_mm", median("milliseconds", "torch"), microseconds),
        Column("read", median("milliseconds", "read"), microseconds),
        Column("floor", "floor_milliseconds", microseconds),
        Column("grouped_mm / ours", ratio("torch"), spread),
        Column("ours / read", ratio("of read"), spread),
        Column("ours / floor", at("of_floor"), ".2f"),
    ),
)


def _of_launches_and_bare_op(case: Record) -> float:
    ours, launches, bare = (
        median("microseconds", name)(case) for name in ("moe_ops", "launches", "bare op")
    )
    return float(ours / (launches + bare))


DISPATCH = Table(
    about=(
        "us of CPU time a call: ours, its Triton launches alone, and an op of the same schema that "
        "does nothing."
    ),
    columns=(
        *keys("call", "kernels"),
        Column("ours", median("microseconds", "moe_ops"), ".1f"),
        Column("launches", median("microseconds", "launches"), ".1f"),
        Column("bare op", median("microseconds", "bare op"), ".1f"),
        Column("ours / (launches + bare op)", _of_launches_and_bare_op, ".2f"),
        Column("(ours - launches) / bare op", "of_bare_op", ".2f"),
    ),
)


def first_call(op: str) -> Table:
    """Return the table of an op's first call."""
    return Table(
        about=(
            f"Seconds of forward and backward of {op} in a fresh process, after torch's own first "
            "gradient, of a product."
        ),
        columns=(
            *keys("shape"),
            Column("Triton cache", "triton_cache"),
            Column("torch's first gradient", at("seconds", "torch alone")),
            Column("first call", at("seconds", "first")),
            Column("second call", at("seconds", "second")),
        ),
    )

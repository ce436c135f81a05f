# SPDX-License-Identifier: Apache-2.0
"""The tables of a whole model, and of a block's decoding step."""

from __future__ import annotations

from benchmarks.report.columns import (
    Column,
    Record,
    Table,
    at,
    keys,
    median,
    microseconds,
    ratio,
    spread,
)


def _gib(mib: float) -> str:
    return f"{mib / 1024:.2f}"


def _peak_ratio(case: Record) -> float | None:
    """Return the peak with moe_ops over that with grouped_mm."""
    ours, theirs = (at("peak_mib", who)(case) for who in ("moe_ops", "grouped_mm"))
    return ours / theirs if ours and theirs else None


MODEL = Table(
    about=(
        "Forward and backward of transformers' Qwen3-MoE of qwen3-30b's width, compiled, without an "
        "optimizer: ms a step with moe_ops and with grouped_mm, the latter over the former, tokens/s, "
        "the GiB at most with the parameters, and the seconds of the first step, which compiles."
    ),
    columns=(
        *keys("tokens"),
        Column("checkpoints", lambda case: "yes" if case["checkpoints"] else "no"),
        Column("moe_ops, ms", median("milliseconds", "moe_ops"), ".1f"),
        Column("grouped_mm, ms", median("milliseconds", "grouped_mm"), ".1f"),
        Column("ratio", ratio("grouped_mm"), spread),
        Column("moe_ops, tokens/s", at("tokens_per_second", "moe_ops")),
        Column("grouped_mm, tokens/s", at("tokens_per_second", "grouped_mm")),
        Column("moe_ops, GiB", at("peak_mib", "moe_ops"), _gib),
        Column("grouped_mm, GiB", at("peak_mib", "grouped_mm"), _gib),
        Column("peak ratio", _peak_ratio, ".2f"),
        Column("moe_ops, first step", at("first_step_seconds", "moe_ops"), ".1f"),
        Column("grouped_mm, first step", at("first_step_seconds", "grouped_mm"), ".1f"),
    ),
)

DECODE_BLOCK = Table(
    about=(
        "us of a block's decoding step, from topk_ids to the output, in a CUDA graph of as many "
        "`layers`, with other ids in each replay and the L2 cache overwritten; `floor` is the bytes of "
        "the touched weights over the ceiling of reading. grouped_mm, compiled grouped_mm and batched_mm are "
        "transformers', each also over ours."
    ),
    columns=(
        *keys("shape", "T"),
        Column("layers", lambda case: case.get("layers", 1)),
        Column("ours", median("milliseconds", "moe_ops"), microseconds),
        Column("floor", "floor_milliseconds", microseconds),
        Column("ours / floor", at("of_floor"), ".2f"),
        *(
            column
            for who in ("grouped_mm", "compiled", "batched_mm")
            for column in (
                Column(who, median("milliseconds", who), microseconds),
                Column(f"{who} / ours", ratio(who, of_all=False), spread),
            )
        ),
    ),
)

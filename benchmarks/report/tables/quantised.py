# SPDX-License-Identifier: Apache-2.0
"""The tables of quantised experts beside the same experts in bf16."""

from __future__ import annotations

from benchmarks.report.columns import Column, Table, at, keys, median, microseconds, ratio, spread
from benchmarks.report.records import where


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f}"


LORA = Table(
    about=(
        "ms of experts with LoRA of rank 16 on both projections; bf16's time over ours, the aim being "
        "0.80 for forward+backward; what the format adds over the time that the bytes of its "
        "dequantisation take at the run's copy bandwidth, the aim being 1.25."
    ),
    rows=where(what="lora"),
    columns=(
        *keys("shape", "T", "format", "pass"),
        Column("ours, ms", median("milliseconds", "moe_ops"), ".2f"),
        Column("bf16, ms", median("milliseconds", "bf16"), ".2f"),
        Column("bf16 / ours", ratio("bf16"), spread),
        Column("added / bytes", at("of_bound"), ".2f"),
    ),
)

DECODE = Table(
    about=(
        "us of a block's decoding step without adapters in a CUDA graph of as many `layers`, bf16's "
        "over ours with its aim, and ours over the time of reading the touched weights."
    ),
    rows=where(what="decode"),
    columns=(
        *keys("shape", "T", "format"),
        Column("layers", lambda case: case.get("layers", 1)),
        Column("ours", median("milliseconds", "moe_ops"), microseconds),
        Column("bf16", median("milliseconds", "bf16"), microseconds),
        Column("bf16 / ours", ratio("bf16"), spread),
        Column("aim", at("aim"), ".1f"),
        Column("of the floor", at("of_floor"), ".2f"),
    ),
)

DEQUANTISE = Table(
    about="us to dequantise a projection's weight, and its bytes over the copy bandwidth; aim 0.80.",
    rows=where(what="dequantise"),
    columns=(
        *keys("shape", "format", "projection"),
        Column("us", median("milliseconds", "moe_ops"), microseconds),
        Column("of copy", at("of_copy"), ".2f"),
    ),
)

STACK = Table(
    about=(
        "Training of a stack of layers of experts in NF4 with fp32 adapters, every layer checkpointed, "
        "AdamW included: tokens a second, and GB (1e9 bytes) at most, the aim being 24."
    ),
    rows=where(what="stack"),
    skip_empty=True,
    columns=(
        *keys("shape", "T", "layers", "rank"),
        Column("tokens/s", at("tokens_per_second"), ".0f"),
        Column("GB", at("peak_bytes"), _gb),
    ),
)

# SPDX-License-Identifier: Apache-2.0
"""The tables of whole expert blocks and layers."""

from __future__ import annotations

import re

from benchmarks import aims
from benchmarks.report.columns import Column, Record, Table, at, keys, median, ratio, spread
from benchmarks.report.records import (
    by_implementation,
    by_kernel,
    own,
    shapes,
    steps,
    with_peer,
)


def _aim(case: Record) -> float | None:
    is_aimed = case["pass"] == "forward+backward" and case["routing"] == "uniform"
    # Of the first shape there is a case of dynamic sizes, which is none of the aim's.
    return aims.BLOCK.get(case["shape"]) if is_aimed and "compiled" in case["errors"] else None


def _lora_aim(case: Record) -> float | None:
    return aims.LORA.get(case["shape"]) if case["pass"] == "forward+backward" else None


EXPERTS = Table(
    about=(
        "The whole expert block. Times of transformers' grouped_mm over ours, eager, compiled for "
        "these sizes, and compiled for any number of tokens; the aim of the second; ours over the "
        "floor (products at the dense ceiling, sums over slots at the copy ceiling); the same with "
        "uniform routing in the same turns; what recompute costs us."
    ),
    columns=(
        *keys("shape", "routing", "pass"),
        Column("ms", median("milliseconds", "moe_ops"), ".2f"),
        Column("TFLOP/s", at("tflops", "moe_ops"), ".0f"),
        Column("eager", ratio("eager", of_all=False), spread),
        Column("compiled", ratio("compiled", of_all=False), spread),
        Column("aim", _aim, ".2f"),
        Column("dynamic", ratio("compiled, dynamic", of_all=False), spread),
        Column("floor", at("of_floor"), ".2f"),
        Column("of uniform", ratio("of uniform", of_all=False), spread),
        Column("recompute", ratio("recompute", of_all=False), spread),
    ),
)

WIDTHS = Table(
    about=(
        "Our block, whose rows TMA cannot describe, and our block of the next widths that are multiples "
        "of 8 elements: ms, and the first over the second, with what it may be at most."
    ),
    columns=(
        *keys("T", "H", "I", "E", "K"),
        Column("next H", at("next_H"), "d"),
        Column("next I", at("next_I"), "d"),
        *keys("pass"),
        Column("ms", median("milliseconds", "moe_ops"), ".2f"),
        Column("next, ms", median("milliseconds", "next"), ".2f"),
        Column("ratio", ratio("next"), spread),
        Column("aim", lambda case: aims.WIDTH if case["T"] >= aims.WIDTH_TOKENS else None, ".2f"),
    ),
)

MEMORY = (
    *keys("implementation"),
    Column("kept", at("memory", "kept"), ".0f"),
    Column("output", at("memory", "output"), ".0f"),
    Column("peak", at("memory", "peak"), ".0f"),
    Column("gradients", at("memory", "gradients"), ".0f"),
)

EXPERTS_MEMORY = Table(
    about=(
        "MiB of memory beside the inputs: kept for backward, without the output; the output; the "
        "most at once in forward and backward, and the gradients in it."
    ),
    rows=by_implementation,
    columns=(*keys("shape", "routing"), *MEMORY),
)


def _launch(record: Record) -> str:
    """Name a launch without the template arguments and parameters of torch's kernels."""
    kernel = record["kernel"]
    short = re.split(r"[<(]", kernel.removeprefix("void "), maxsplit=1)[0] or kernel
    return f"{short} {record['nth']}"


def _kernel_time(case: Record) -> str:
    of_floor = f", {case['of_floor']:.2f}x" if "of_floor" in case else ""
    return f"{case['milliseconds']:.3f} ({case['share']:.0%}{of_floor})"


EXPERTS_KERNELS = Table(
    about=(
        "A forward and backward, kernel by kernel in the order of the launches: ms, the share of the "
        "whole, and of a product the time over its floor at the dense ceiling."
    ),
    rows=by_kernel,
    columns=lambda cases: (
        Column("kernel", _launch),
        *(Column(shape, at("of_shape", shape), _kernel_time) for shape in shapes(cases)),
    ),
)


def _theirs_and_ours(what: str) -> Column:
    """Return a column of a peer's memory and ours."""
    both = (
        Column("", at("theirs", "mib", what), ".0f"),
        Column("", at("mib", "moe_ops", what), ".0f"),
    )
    return Column(what, lambda case: " / ".join(column.cell(case) for column in both))


EXPERTS_PEERS = Table(
    about=(
        "Other libraries' blocks, each beside ours in a process of its own: their time over ours, "
        "the MiB that they and we keep and take at most, the seconds of their first call (SonicMoE's: of "
        "one whose kernels another process has compiled before, but where it tunes itself)."
    ),
    rows=with_peer,
    columns=(
        *keys("shape", "peer", "pass"),
        Column("theirs, ms", median("theirs", "milliseconds"), ".2f"),
        Column("ours, ms", median("milliseconds", "moe_ops"), ".2f"),
        Column("ratio", lambda case: ratio(case["peer"])(case), spread),
        _theirs_and_ours("kept"),
        _theirs_and_ours("peak"),
        Column("first call", "first_call_seconds"),
    ),
)

LORA = Table(
    about=(
        "Adapters of rank 16 on both projections of frozen experts, gradients of the input, the "
        "router weights and the adapters. Times of torch's grouped_mm over ours: eager over eager, "
        "compiled over eager, compiled over compiled and its aim; ours over the floor; ours with "
        "a checkpoint over ours without."
    ),
    columns=(
        *keys("shape", "layout", "pass"),
        Column("ours, ms", median("milliseconds", "moe_ops"), ".2f"),
        Column("ours compiled, ms", median("milliseconds", "moe_ops compiled"), ".2f"),
        Column("grouped_mm compiled, ms", median("milliseconds", "compiled"), ".2f"),
        Column("eager", ratio("eager", of_all=False), spread),
        Column("compiled", ratio("compiled", of_all=False), spread),
        Column("both compiled", ratio("both compiled", of_all=False), spread),
        Column("aim", _lora_aim, ".2f"),
        Column("floor", at("of_floor"), ".2f"),
        Column("checkpoint", ratio("checkpoint", of_all=False), spread),
        Column("checkpoint, compiled", ratio("checkpoint, compiled", of_all=False), spread),
    ),
)

LORA_MEMORY = Table(
    about="MiB beside the inputs, as of the experts; eager and compiled are torch's grouped_mm.",
    rows=by_implementation,
    columns=(*keys("shape", "layout"), *MEMORY),
)

BLOCKS = Table(
    about=(
        "Qwen3-MoE's block with its router. Times over moe_ops.layers.MoE: of transformers' loop over "
        "the experts, of its grouped_mm, eager and compiled, and of the last over ours compiled; then "
        "the same over the fused block of moe_ops.compat."
    ),
    rows=own,
    columns=(
        *keys("shape", "pass"),
        *(
            Column(name, ratio(name, of_all=False), spread)
            for of in ("", "compat: ")
            for name in (f"{of}loop", f"{of}eager", f"{of}compiled", f"{of}both compiled")
        ),
        Column("floor", at("of_floor"), ".2f"),
    ),
)

BLOCKS_STEPS = Table(
    about=(
        "ms, and the MiB that a step keeps for backward and takes at most beside its inputs; "
        "backward is what forward leaves of a step."
    ),
    rows=steps,
    columns=(
        *keys("shape", "implementation"),
        Column("forward", "forward", ".2f"),
        Column("backward", "backward", ".2f"),
        Column("forward+backward", "forward+backward", ".2f"),
        Column("kept", at("memory", "kept"), ".0f"),
        Column("peak", at("memory", "peak"), ".0f"),
    ),
)

BLOCKS_PEERS = Table(
    about="Other libraries' blocks, each in a process of its own beside ours: time over ours.",
    rows=with_peer,
    skip_empty=True,
    columns=(
        *keys("shape", "peer", "pass"),
        Column("theirs, ms", median("theirs", "milliseconds"), ".2f"),
        Column("ours, ms", median("milliseconds", "moe_ops"), ".2f"),
        Column("compat, ms", median("milliseconds", "moe_ops compat"), ".2f"),
        Column("ratio", lambda case: ratio(case["peer"], of_all=False)(case), spread),
        Column(
            "compat: ratio",
            lambda case: ratio(f"compat: {case['peer']}", of_all=False)(case),
            spread,
        ),
    ),
)

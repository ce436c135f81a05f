# SPDX-License-Identifier: Apache-2.0
"""The tables of the host's time."""

from __future__ import annotations

from benchmarks.report.columns import Column, Table, at, keys, median, ratio, spread
from benchmarks.report.records import among, where

BLOCKS = Table(
    about=(
        "us of the host's time for one call that is not synchronised, with the device idle before "
        "it; ours over grouped_mm's (below 1 ours is less): over eager, over compiled, and compiled "
        "over compiled. Then grouped_mm's time over ours: of the device alone, and of a step among many "
        "that follow each other, which takes as long as the slower of host and device."
    ),
    rows=among("what", "experts", "lora"),
    columns=(
        Column("block", "what"),
        *keys("shape", "pass"),
        Column("ours", median("host_us", "moe_ops"), ".0f"),
        Column("ours compiled", median("host_us", "moe_ops compiled"), ".0f"),
        Column("eager", median("host_us", "eager"), ".0f"),
        Column("compiled", median("host_us", "compiled"), ".0f"),
        Column("ours / eager", at("host_ratio", "of eager"), spread),
        Column("ours / compiled", at("host_ratio", "of compiled"), spread),
        Column("both compiled", at("host_ratio", "compiled of compiled"), spread),
        Column("device: compiled", ratio("compiled", of_all=False), spread),
        Column("device: both compiled", ratio("both compiled", of_all=False), spread),
        Column("step: compiled", at("step_ratio", "compiled"), spread),
        Column("step: both compiled", at("step_ratio", "both compiled"), spread),
    ),
)

GEMM = Table(
    about="The same of grouped_gemm of an up projection; torch is torch._grouped_mm, eager.",
    rows=where(what="grouped_gemm"),
    skip_empty=True,
    columns=(
        *keys("shape", "pass"),
        Column("ours", median("host_us", "moe_ops"), ".0f"),
        Column("torch", median("host_us", "torch"), ".0f"),
        Column("ours / torch", at("host_ratio", "of torch"), spread),
    ),
)

OPS = Table(
    about=(
        "The same of each op without autograd, and of a torch op as a yardstick, with the launches "
        "(kernels, copies, fills), the allocations and the TMA descriptors of a call. The second column "
        "is the time of a call that makes no launch of its own: Python, dispatcher and allocator."
    ),
    rows=where(what="op"),
    skip_empty=True,
    columns=(
        *keys("op", "shape"),
        Column("us", median("host_us", "moe_ops"), ".1f"),
        Column("without launches", at("us_without_launches"), ".1f"),
        Column("launches", at("launches"), "g"),
        Column("descriptors", at("descriptors"), "g"),
        Column("allocations", at("allocations"), "g"),
    ),
)

LAUNCHES = Table(
    about="Launches and allocations of whole blocks.",
    rows=where(what="launches"),
    skip_empty=True,
    columns=(
        *keys("block", "shape", "pass", "implementation"),
        Column("launches", at("launches"), "g"),
        Column("allocations", at("allocations"), "g"),
    ),
)

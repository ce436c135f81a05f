# SPDX-License-Identifier: Apache-2.0
"""The tables of the page by the benchmark's part. A new table is a Table, and its name here."""

from __future__ import annotations

from benchmarks.expert_parallel.records import RANKS, part_of
from benchmarks.report.columns import Table
from benchmarks.report.tables import (
    compiled,
    expert_parallel,
    experts,
    host,
    model,
    ops,
    quantised,
    sweep,
)

CPU = ops.CPU
# By part of a GPU run, in the order of the page.
TABLES: dict[str, tuple[Table, ...]] = {
    "ceilings": (ops.CEILINGS,),
    "gemm": (ops.GEMM, ops.GEMM_MEANS),
    "rows": (ops.ROWS,),
    "routing": (ops.ROUTING_INDICES, ops.TOPK_ROUTING),
    "decode": (ops.DECODE,),
    "decode-block": (model.DECODE_BLOCK,),
    "dispatch": (ops.DISPATCH,),
    "host": (host.BLOCKS, host.GEMM, host.OPS, host.LAUNCHES),
    "first-call": (ops.first_call("grouped_gemm"),),
    "experts": (experts.EXPERTS, experts.EXPERTS_MEMORY),
    "experts-kernels": (experts.EXPERTS_KERNELS,),
    "experts-first-call": (ops.first_call("fused_experts"),),
    "experts-peers": (experts.EXPERTS_PEERS,),
    "lora": (experts.LORA, experts.LORA_MEMORY),
    "quantised": (quantised.LORA, quantised.DECODE, quantised.DEQUANTISE, quantised.STACK),
    "widths": (experts.WIDTHS,),
    "blocks": (experts.BLOCKS, experts.BLOCKS_STEPS, experts.BLOCKS_PEERS),
    "sweep": (sweep.MEANS, sweep.SHAPES),
    "named": (sweep.MEANS, sweep.SHAPES),
    "model": (model.MODEL,),
    "compiled": (compiled.COMPILED,),
    **{
        part_of(ranks): (expert_parallel.EXCHANGES, expert_parallel.BLOCKS, expert_parallel.AIMS)
        for ranks in RANKS
    },
}
# Parts whose tables stand on pages of their own. The device's page has the first table of each.
OWN_PAGES = ("sweep", "named")

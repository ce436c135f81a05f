# SPDX-License-Identifier: Apache-2.0
"""The table of kernels that were compiled and not run."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.report.columns import Column, Record, Table


def _by_architecture(cases: list[Record]) -> Iterator[Record]:
    """Group the kernels of an architecture and size: those that multiply, and the others."""
    for key in dict.fromkeys((case["architecture"], case["gpu"], case["size"]) for case in cases):
        group = [c for c in cases if (c["architecture"], c["gpu"], c["size"]) == key]
        products = [c for c in group if _multiplies(c["kernel"])]
        yield {
            "architecture": key[0], "gpu": key[1], "size": key[2], "kernels": len(group),
            "spilling": sum(c["stack"] > 0 for c in group),
            "stack": max(c["stack"] for c in group),
            "registers": max(c["registers"] for c in products),
            "shared": max(c["shared"] for c in products),
            "blocks": min(c["blocks"] for c in products),
            "occupancy": min(c["occupancy"] for c in products),
        }  # fmt: skip


def _multiplies(kernel: str) -> bool:
    parts = ("gemm_kernel", "_dw_", "up_", "cooperative", "tall", "pingpong")
    return any(part in kernel for part in parts)


COMPILED = Table(
    about=(
        "Compiled and never run: no line here says that a kernel is fast, or that it was seen to "
        "work. Spills are the kernels that keep anything on a thread's stack, and the most bytes of "
        "it. The other columns are of the kernels that multiply: the most registers of a thread and "
        "shared memory of a block, the fewest blocks that an SM holds, and their share of its warps."
    ),
    rows=_by_architecture,
    columns=(
        Column("architecture", "architecture"),
        Column("GPU", "gpu"),
        Column("size", "size"),
        Column("kernels", "kernels"),
        Column("spills", "spilling"),
        Column("bytes", "stack"),
        Column("registers", "registers"),
        Column("shared KiB", lambda record: record["shared"] / 1024, ".0f"),
        Column("blocks an SM", "blocks"),
        Column("occupancy", "occupancy", ".0%"),
    ),
)

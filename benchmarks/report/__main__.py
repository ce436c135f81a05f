# SPDX-License-Identifier: Apache-2.0
"""Writes the tables and plots of docs/performance.md from benchmarks/results/*.json.

    python -m benchmarks.report

Files of a CPU fill the page between `<!-- tables: begin/end -->`, those of a GPU between
`<!-- cuda tables: begin/end -->`. Where there are none, that part of the page stays as it is. Plots
go to docs/images/ where matplotlib is installed.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.report.page import write

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    write(ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md")

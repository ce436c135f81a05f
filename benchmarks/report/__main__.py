# SPDX-License-Identifier: Apache-2.0
"""Write the tables and plots of docs/performance.md from benchmarks/results/*.json.

    python -m benchmarks.report

The results of CPUs fill the page between `<!-- tables: begin/end -->`, and those of GPUs between
`<!-- cuda tables: begin/end -->`. A part of the page without results stays as it is. Long tables go
to pages in docs/results/, and plots to docs/images/ where matplotlib is installed.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.report.page import write

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    write(ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md")

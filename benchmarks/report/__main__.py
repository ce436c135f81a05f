# SPDX-License-Identifier: Apache-2.0
"""Write the tables and plots of docs/performance.md and docs/results.

    python -m benchmarks.report

They come from benchmarks/results/*.json. performance.md gets a table for each card between
`<!-- cards: begin/end -->`. The pages of docs/results/ are written whole, and the plots go to
docs/images/ where matplotlib is installed.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.report.page import write

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    write(ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md")

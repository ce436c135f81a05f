# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of docs/performance.md and docs/results, made from benchmarks/results/*.json.

columns.py says what a table is and renders it, tables/ declares the tables, and records.py makes
their rows from the cases. plots.py declares and draws the plots. cards.py writes what performance.md
says of each card, and page.py writes the pages. results.py reads the files.
"""

from benchmarks.report.page import CARD_MARKERS, cpu_page, write
from benchmarks.report.plots import PLOTS, draw

__all__ = ["CARD_MARKERS", "PLOTS", "cpu_page", "draw", "write"]

# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of docs/performance.md, made from benchmarks/results/*.json.

columns.py says what a table is and renders it, tables/ declares the tables, and records.py makes
their rows from the cases. plots.py declares and draws the plots. page.py writes the page.
"""

from benchmarks.report.page import CPU_MARKERS, CUDA_MARKERS, cpu_tables, write
from benchmarks.report.plots import PLOTS, draw

__all__ = ["CPU_MARKERS", "CUDA_MARKERS", "PLOTS", "cpu_tables", "draw", "write"]

# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of docs/performance.md, made from benchmarks/results/*.json."""

from benchmarks.report.page import CPU_MARKERS, CUDA_MARKERS, cpu_tables, write
from benchmarks.report.plots import PLOTS

__all__ = ["CPU_MARKERS", "CUDA_MARKERS", "PLOTS", "cpu_tables", "write"]

# SPDX-License-Identifier: Apache-2.0
"""The plots of each part of a GPU run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.report.columns import Record, median
from benchmarks.report.records import PASSES


def _plot_gemm(cases: list[Record], plt: Any) -> Any:
    """torch._grouped_mm's time over ours, a panel for each projection."""
    uniform = [case for case in cases if case["routing"] == "uniform"]
    projections = list(dict.fromkeys(case["projection"] for case in uniform))
    figure, panels = plt.subplots(
        len(projections),
        figsize=(9, 3 * len(projections)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for (axes,), projection in zip(panels, projections, strict=True):
        here = [case for case in uniform if case["projection"] == projection]
        heights = {(c["shape"], c["pass"]): median("ratio", "torch")(c) for c in here}
        _bars(axes, heights, PASSES)
        axes.set_ylabel("torch._grouped_mm / ours")
        axes.set_title(f"{projection} projection: above 1 ours is faster", fontsize=10)
    _legend(figure, panels[0][0])
    return figure


def _plot_rows(cases: list[Record], plt: Any) -> Any:
    """Fraction of the copy bandwidth."""
    figure, axes = plt.subplots(figsize=(9, 3.5), layout="constrained")
    heights = {(c["shape"], c["op"]): c.get("of_copy_ceiling") for c in cases}
    _bars(axes, heights, tuple(dict.fromkeys(case["op"] for case in cases)))
    axes.set_ylabel("fraction of copy bandwidth")
    axes.set_title("bytes that must be moved over time, 1 is a device copy", fontsize=10)
    _legend(figure, axes)
    return figure


def _plot_experts(cases: list[Record], plt: Any) -> Any:
    """transformers' compiled grouped_mm's time over ours, and the eager one's."""
    uniform = [case for case in cases if case["routing"] == "uniform"]
    figure, panels = plt.subplots(2, figsize=(9, 6), sharex=True, layout="constrained")
    for axes, peer in zip(panels, ("compiled", "eager"), strict=True):
        heights = {
            (case["shape"], case["pass"]): median("ratio", peer)(case)
            for case in uniform
            if peer in case["errors"]
        }
        _bars(axes, heights, ("forward", "forward+backward"))
        axes.set_ylabel("grouped_mm / ours")
        axes.set_title(f"transformers' grouped_mm, {peer}: above 1 ours is faster", fontsize=10)
    _legend(figure, panels[0])
    return figure


def _plot_blocks(cases: list[Record], plt: Any) -> Any:
    """transformers' blocks' times over that of layers.MoE, a panel for each of its experts."""
    peers = ("loop", "eager", "compiled")
    own = [case for case in cases if "peer" not in case]
    shown = [peer for peer in peers if any(peer in case["errors"] for case in own)]
    figure, panels = plt.subplots(
        len(shown), figsize=(9, 3 * len(shown)), sharex=True, squeeze=False, layout="constrained"
    )
    for (axes,), peer in zip(panels, shown, strict=True):
        heights = {
            (case["shape"], case["pass"]): median("ratio", peer)(case)
            for case in own
            if peer in case["errors"]
        }
        _bars(axes, heights, ("forward", "forward+backward"))
        whose = "loop over experts" if peer == "loop" else f"grouped_mm, {peer}"
        axes.set_ylabel("transformers / ours")
        axes.set_title(f"transformers' {whose}: above 1 ours is faster", fontsize=10)
    _legend(figure, panels[0][0])
    return figure


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)


def _bars(axes: Any, heights: dict[tuple[str, str], float | None], series: Sequence[str]) -> None:
    """Groups of bars, one for each shape, and a line at 1; what was wrong has no bar."""
    shapes = list(dict.fromkeys(shape for shape, _ in heights))
    width = 0.8 / len(series)
    for i, name in enumerate(series):
        places = [place + (i - (len(series) - 1) / 2) * width for place in range(len(shapes))]
        values = [heights.get((shape, name)) or 0.0 for shape in shapes]
        bars = axes.bar(places, values, width, label=name, zorder=2)
        told = [f"{value:.2f}" if value else "wrong" for value in values]
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.bar_label(bars, told, fontsize=7, padding=2, bbox=paper, zorder=3)
    axes.axhline(1.0, color="black", linewidth=1, zorder=1)
    axes.set_xticks(range(len(shapes)), shapes)
    axes.margins(y=0.15)


# By part: what the image shows, and what draws it.
PLOTS: dict[str, tuple[str, Callable[[list[Record], Any], Any]]] = {
    "gemm": ("grouped_gemm against torch._grouped_mm by shape", _plot_gemm),
    "rows": ("bandwidth of the ops that move rows by shape", _plot_rows),
    "experts": ("the expert block against transformers' grouped_mm by shape", _plot_experts),
    "blocks": ("the block with its router against transformers' by shape", _plot_blocks),
}

# SPDX-License-Identifier: Apache-2.0
"""The plots of each benchmark, declared, and the one function that draws them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report.columns import Record, Take, at, median
from benchmarks.report.records import PASSES, shapes


@dataclass(frozen=True)
class Panel:
    """A panel has a bar for each of its cases.

    Attributes:
        title: what stands above the panel.
        height: takes a bar's height from its case. A case without one was wrong.
        where: tells which cases the panel shows.
    """

    title: str
    height: Take
    where: Callable[[Record], bool] = lambda _: True


@dataclass(frozen=True)
class Plot:
    """A plot has its panels one below the other, with the shapes along their common x axis.

    Attributes:
        about: what the image shows, in words.
        label: the label of the y axes.
        panels: the panels. One that shows no case is left out.
        series: the key whose values are the bars of a shape.
        order: the values of that key, in order. Without them they come as the cases have them.
        panel_height: the height of a panel in inches.
    """

    about: str
    label: str
    panels: Sequence[Panel]
    series: str = "pass"
    order: tuple[str, ...] = ()
    panel_height: float = 3.0


def _is_uniform(case: Record) -> bool:
    return bool(case["routing"] == "uniform")


def _of_projection(projection: str) -> Panel:
    return Panel(
        title=f"{projection} projection: above 1 ours is faster",
        height=median("ratio", "torch"),
        where=lambda case: _is_uniform(case) and case["projection"] == projection,
    )


def _of_experts(peer: str) -> Panel:
    return Panel(
        title=f"transformers' grouped_mm, {peer}: above 1 ours is faster",
        height=median("ratio", peer),
        where=lambda case: _is_uniform(case) and peer in case["errors"],
    )


def _of_block(peer: str, name: str) -> Panel:
    return Panel(
        title=f"transformers' {name}: above 1 ours is faster",
        height=median("ratio", peer),
        where=lambda case: "peer" not in case and peer in case["errors"],
    )


# By part of a GPU run.
PLOTS: dict[str, Plot] = {
    "gemm": Plot(
        about="grouped_gemm against torch._grouped_mm by shape",
        label="torch._grouped_mm / ours",
        panels=(_of_projection("up"), _of_projection("down")),
        order=PASSES,
    ),
    "rows": Plot(
        about="bandwidth of the ops that move rows by shape",
        label="fraction of copy bandwidth",
        panels=(
            Panel(
                title="bytes that must be moved over time, 1 is a device copy",
                height=at("of_copy_ceiling"),
            ),
        ),
        series="op",
        panel_height=3.5,
    ),
    "experts": Plot(
        about="the expert block against transformers' grouped_mm by shape",
        label="grouped_mm / ours",
        panels=(_of_experts("compiled"), _of_experts("eager")),
        order=("forward", "forward+backward"),
    ),
    "blocks": Plot(
        about="the block with its router against transformers' by shape",
        label="transformers / ours",
        panels=(
            _of_block("loop", "loop over experts"),
            _of_block("eager", "grouped_mm, eager"),
            _of_block("compiled", "grouped_mm, compiled"),
        ),
        order=("forward", "forward+backward"),
    ),
}


def draw(plot: Plot, cases: list[Record], plt: Any) -> Any:
    """Return the figure, or None where no panel has a case to show."""
    shown = [(panel, here) for panel in plot.panels if (here := list(filter(panel.where, cases)))]
    if not shown:
        return None
    figure, grid = plt.subplots(
        len(shown),
        figsize=(9, plot.panel_height * len(shown)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for (axes,), (panel, here) in zip(grid, shown, strict=True):
        order = plot.order or tuple(dict.fromkeys(case[plot.series] for case in here))
        heights = {(case["shape"], case[plot.series]): panel.height(case) for case in here}
        _bars(axes, heights, shapes(here), order)
        axes.set_ylabel(plot.label)
        axes.set_title(panel.title, fontsize=10)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    return figure


def _bars(
    axes: Any,
    heights: dict[tuple[str, str], float | None],
    names: Sequence[str],
    series: Sequence[str],
) -> None:
    """Draw a group of bars for each shape name, and a line at 1. A wrong result has no bar."""
    width = 0.8 / len(series)
    for i, name in enumerate(series):
        places = [place + (i - (len(series) - 1) / 2) * width for place in range(len(names))]
        values = [heights.get((shape, name)) or 0.0 for shape in names]
        bars = axes.bar(places, values, width, label=name, zorder=2)
        told = [f"{value:.2f}" if value else "wrong" for value in values]
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.bar_label(bars, told, fontsize=7, padding=2, bbox=paper, zorder=3)
    axes.axhline(1.0, color="black", linewidth=1, zorder=1)
    axes.set_xticks(range(len(names)), names)
    axes.margins(y=0.15)

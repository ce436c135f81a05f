# SPDX-License-Identifier: Apache-2.0
"""The plots of each benchmark, declared, and the one function that draws them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report.columns import Record, Take, at, median
from benchmarks.report.records import PASSES, shapes
from benchmarks.report.tables.sweep import ALIGNED, MISALIGNED, is_aligned, rows_per_expert


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


@dataclass(frozen=True)
class Scatter:
    """A plot has its panels side by side, with a point for each of their cases.

    Attributes:
        about: what the image shows, in words.
        label: the label of the y axes.
        x_label: the label of the x axes.
        x: takes the place along them.
        panels: the panels. One that shows no case is left out.
        series: takes the name of the cases that share a colour.
    """

    about: str
    label: str
    x_label: str
    x: Callable[[Record], float]
    panels: Sequence[Panel]
    series: Callable[[Record], str]


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


def _of_pass(name: str) -> Panel:
    return Panel(
        title=f"{name}: above 1 ours is faster",
        height=median("ratio", "compiled"),
        where=lambda case: case["pass"] == name and bool(case["ratio"]),
    )


def _of_block(peer: str, name: str) -> Panel:
    return Panel(
        title=f"transformers' {name}: above 1 ours is faster",
        height=median("ratio", peer),
        where=lambda case: "peer" not in case and peer in case["errors"],
    )


def _of_bars(name: str) -> Panel:
    return Panel(
        title=f"{name} of a whole block: above 1 ours is faster",
        height=median("height"),
        where=lambda bar: bar["pass"] == name,
    )


# Of all parts that time the whole block. The README shows it.
BLOCK = Plot(
    about="the expert block against compiled grouped_mm and other libraries by shape",
    label="theirs / ours",
    panels=(_of_bars("forward"), _of_bars("forward+backward")),
    series="peer",
    panel_height=2.8,
)

# More names than this would run into each other.
_NAMES_SIDE_BY_SIDE = 8
Shown = list[tuple[Panel, list[Record]]]

# By part of a GPU run.
PLOTS: dict[str, Plot | Scatter] = {
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
    "sweep": Scatter(
        about="the expert block against compiled grouped_mm by the mean rows of an expert",
        label="compiled grouped_mm / ours",
        x_label="mean rows of an expert",
        x=rows_per_expert,
        panels=(_of_pass("forward"), _of_pass("forward+backward")),
        series=lambda case: ALIGNED if is_aligned(case) else MISALIGNED,
    ),
}


def draw(plot: Plot | Scatter, cases: list[Record], plt: Any) -> Any:
    """Return the figure, or None where no panel has a case to show."""
    shown = [(panel, here) for panel in plot.panels if (here := list(filter(panel.where, cases)))]
    if not shown:
        return None
    figure = (_points if isinstance(plot, Scatter) else _panels_of_bars)(plot, shown, plt)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    return figure


def _panels_of_bars(plot: Any, shown: Shown, plt: Any) -> Any:
    # So wide that the numbers above two neighbours do not overlap.
    bars = max(len(shapes(here)) * len({case[plot.series] for case in here}) for _, here in shown)
    figure, grid = plt.subplots(
        len(shown),
        figsize=(max(9.0, 0.38 * bars), plot.panel_height * len(shown)),
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
    return figure


def _points(plot: Any, shown: Shown, plt: Any) -> Any:
    """Draw both axes in logarithms, and a line at 1."""
    figure, grid = plt.subplots(
        1, len(shown), figsize=(10, 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (panel, here) in zip(grid[0], shown, strict=True):
        for name in sorted({plot.series(case) for case in here}):
            of_series = [case for case in here if plot.series(case) == name]
            x, y = ([take(case) for case in of_series] for take in (plot.x, panel.height))
            axes.scatter(x, y, s=18, label=name, zorder=2)
        axes.set_xscale("log")
        axes.set_yscale("log")
        ticks = (0.7, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0)
        axes.set_yticks(ticks, map(str, ticks), minor=False)
        axes.set_yticks([], minor=True)
        axes.axhline(1.0, color="black", linewidth=1, zorder=1)
        axes.set_xlabel(plot.x_label)
        axes.set_title(panel.title, fontsize=10)
    grid[0][0].set_ylabel(plot.label)
    return figure


def _bars(
    axes: Any,
    heights: dict[tuple[str, str], float | None],
    names: Sequence[str],
    series: Sequence[str],
) -> None:
    """Draw a group of bars above each shape name, and a line at 1.

    A wrong result has no bar. What was not compared has no label either.
    """
    width = 0.8 / len(series)
    groups = [[name for name in series if (shape, name) in heights] for shape in names]
    for name in series:
        places = [
            place + (group.index(name) - (len(group) - 1) / 2) * width if name in group else place
            for place, group in enumerate(groups)
        ]
        values = [heights.get((shape, name)) or 0.0 for shape in names]
        bars = axes.bar(places, values, width, label=name, zorder=2)
        told = [
            (f"{value:.2f}" if value else "wrong") if (shape, name) in heights else ""
            for shape, value in zip(names, values, strict=True)
        ]
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.bar_label(bars, told, fontsize=7, padding=2, bbox=paper, zorder=3)
    axes.axhline(1.0, color="black", linewidth=1, zorder=1)
    axes.set_xticks(range(len(names)), names)
    if len(names) > _NAMES_SIDE_BY_SIDE:
        axes.tick_params("x", rotation=30)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
    axes.margins(y=0.15)

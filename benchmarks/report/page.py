# SPDX-License-Identifier: Apache-2.0
"""Writes the pages of tables whole, and fills docs/performance.md between its markers.

docs/results/ has a page for each GPU, one for all CPUs, and one for each part with long tables.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.report.cards import BLOCKS, PEERS, block_bars, cards
from benchmarks.report.columns import Record, markdown
from benchmarks.report.plots import BLOCK, PLOTS, draw
from benchmarks.report.results import Result, cpu_results, cuda_results, part_facts, run_facts
from benchmarks.report.tables import CPU, OWN_PAGES, TABLES

CARD_MARKERS = ("<!-- cards: begin -->", "<!-- cards: end -->")
_GENERATED = "`python -m benchmarks.report` writes this page. [What it shows](../performance.md).\n"


def write(results: Path, page: Path) -> None:
    """Rewrite the page, and the images and the pages of tables beside it."""
    images, folder = page.parent / "images", page.parent / "results"
    write_plots(results, images)
    text = page.read_text(encoding="utf-8")
    page.write_text(between(text, CARD_MARKERS, cards(results)), encoding="utf-8")
    for name, lines in pages(results, images):
        if body := "\n".join(lines):
            folder.mkdir(exist_ok=True)
            (folder / name).write_text(body, encoding="utf-8")


def between(text: str, markers: tuple[str, str], lines: Iterable[str]) -> str:
    """Return the text with the lines between the markers, or as it is where there are no lines."""
    body = "\n".join(lines)
    if not body:
        return text
    before, begin, rest = text.partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not begin or not end:
        raise ValueError(f"the page has no {markers[0]} ... {markers[1]} to write between")
    return f"{before}{begin}\n\n{body}\n{end}{after}"


def pages(results: Path, images: Path) -> Iterator[tuple[str, Iterator[str]]]:
    """Yield the name and the lines of each page of tables."""
    yield "cpu.md", cpu_page(results)
    for device, parts in cuda_results(results).items():
        yield f"{device}.md", device_page(device, parts, images)
        for part in (part for part in OWN_PAGES if part in parts):
            yield _own_page(device, part), _lines_of(device, part, parts[part], images)


def cpu_page(results: Path) -> Iterator[str]:
    """Yield the page with every CPU benchmark: its file, its facts and its table."""
    told = False
    for name, result in cpu_results(results):
        if not told:
            yield f"# CPU\n\n{_GENERATED}"
            told = True
        yield f"## {name}\n\n{run_facts(result['environment'])}\n"
        yield from markdown(CPU, result["cases"])
        yield from _left_out(result["cases"])


def _left_out(cases: list[Record]) -> Iterator[str]:
    """Count the cases that have no ratio because a result was wrong, and say whose it was."""
    wrong = [case["wrong"] for case in cases if "ratio" not in case]
    if wrong:
        whose = Counter(name for names in wrong for name in names)
        counts = ", ".join(f"{name} {count}" for name, count in sorted(whose.items()))
        yield f"Left out, since a result was found wrong: {len(wrong)} cases ({counts}).\n"


def device_page(device: str, parts: dict[str, Result], images: Path) -> Iterator[str]:
    """Yield the page of a device, each plot above the tables of its part if it was drawn."""
    yield f"# {device}\n\n{_GENERATED}"
    told = ""
    for part in (part for part in TABLES if part in parts):
        environment = parts[part]["environment"]
        yield f"## {part}\n"
        # The facts stand once for all parts of a run.
        if (facts := run_facts(environment)) != told:
            yield f"{facts}\n"
        told = facts
        if part not in OWN_PAGES:
            yield from _tables(device, part, parts[part], images)
            continue
        yield from markdown(TABLES[part][0], parts[part]["cases"])
        name = _own_page(device, part)
        yield f"Every shape stands in [{name}]({name}).\n"


def _lines_of(device: str, part: str, result: Result, images: Path) -> Iterator[str]:
    yield f"# {device}: {part}\n"
    yield _GENERATED
    yield f"{run_facts(result['environment'])}\n"
    yield from _tables(device, part, result, images)


def _own_page(device: str, part: str) -> str:
    return f"{device}_{part.replace('-', '_')}.md"


def _tables(device: str, part: str, result: Result, images: Path) -> Iterator[str]:
    """Yield the facts, the plot and the tables of a part."""
    if about := part_facts(result["environment"]):
        yield f"{about}\n"
    image = images / f"{device}_{part}.png"
    if image.exists():
        yield f"![{PLOTS[part].about}](../images/{image.name})\n"
    for table in TABLES[part]:
        yield from markdown(table, result["cases"])


def write_plots(results: Path, images: Path) -> None:
    """Draw the plots into the folder, or nothing where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    for device, parts in cuda_results(results).items():
        drawn = [
            (part, plot, parts[part]["cases"]) for part, plot in PLOTS.items() if part in parts
        ]
        if "experts" in parts:
            drawn.append(("block", BLOCK, block_bars(parts)))
        for part, plot, cases in drawn:
            figure = draw(plot, cases, plt)
            if figure is None:
                continue
            of = [parts[name]["environment"] for name in (part, *BLOCKS, PEERS) if name in parts]
            dates = sorted(
                {environment["date"] for environment in (of if part == "block" else of[:1])}
            )
            figure.suptitle(f"{of[0]['gpu']}, {', '.join(dates)}", fontsize=11)
            images.mkdir(parents=True, exist_ok=True)
            # Without the date of drawing, so that the same numbers make the same file.
            figure.savefig(images / f"{device}_{part}.png", dpi=120, metadata={"Software": ""})
            plt.close(figure)

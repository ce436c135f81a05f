# SPDX-License-Identifier: Apache-2.0
"""Fills the page between its markers, and writes the pages of tables beside it."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.report.columns import Record, markdown
from benchmarks.report.plots import PLOTS, draw
from benchmarks.report.tables import CPU, OWN_PAGES, TABLES

CPU_MARKERS = ("<!-- tables: begin -->", "<!-- tables: end -->")
CUDA_MARKERS = ("<!-- cuda tables: begin -->", "<!-- cuda tables: end -->")
# These facts of a result's environment are about its part. The others are about the whole run.
PART_FACTS = (
    "part", "grouped_mm", "model", "present", "absent", "limit_gb", "repeated", "failed",
    "left out, no time", "gpus of one host",
)  # fmt: skip

Result = dict[str, Any]


def write(results: Path, page: Path) -> None:
    """Rewrite the page, and the images and the pages of tables beside it."""
    images = page.parent / "images"
    write_plots(results, images)
    text = page.read_text(encoding="utf-8")
    text = between(text, CPU_MARKERS, cpu_tables(results))
    text = between(text, CUDA_MARKERS, cuda_tables(results, images))
    page.write_text(text, encoding="utf-8")
    for name, lines in own_pages(results, images):
        path = page.parent / "results" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines), encoding="utf-8")


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


def cpu_tables(results: Path) -> Iterator[str]:
    """Yield the lines of every CPU benchmark: its file, its facts and its table."""
    for file in sorted(results.glob("cpu_*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        yield f"### {file.name}\n\n{_facts(result['environment'])}\n"
        yield from markdown(CPU, result["cases"])
        yield from _left_out(result["cases"])


def _left_out(cases: list[Record]) -> Iterator[str]:
    """Count the cases that have no ratio because a result was wrong, and say whose it was."""
    wrong = [case["wrong"] for case in cases if "ratio" not in case]
    if wrong:
        whose = Counter(name for names in wrong for name in names)
        counts = ", ".join(f"{name} {count}" for name, count in sorted(whose.items()))
        yield f"Left out, since a result was found wrong: {len(wrong)} cases ({counts}).\n"


def cuda_tables(results: Path, images: Path) -> Iterator[str]:
    """Yield the lines of every device, each plot above the tables of its part if it was drawn."""
    for device, parts in cuda_results(results).items():
        told = ""
        for part in (part for part in TABLES if part in parts):
            environment = parts[part]["environment"]
            yield f"### {device}: {part}\n"
            # The facts stand once for all parts of a run.
            if (facts := _facts(environment)) != told:
                yield f"{facts}\n"
            told = facts
            if part not in OWN_PAGES:
                yield from _tables(device, part, parts[part], images, "images")
                continue
            yield from markdown(TABLES[part][0], parts[part]["cases"])
            name = _own_page(device, part)
            yield f"Every shape stands in [results/{name}](results/{name}).\n"


def own_pages(results: Path, images: Path) -> Iterator[tuple[str, Iterator[str]]]:
    """Yield the name and the lines of each page that has the tables of one part."""
    for device, parts in cuda_results(results).items():
        for part in (part for part in OWN_PAGES if part in parts):
            yield _own_page(device, part), _lines_of(device, part, parts[part], images)


def _lines_of(device: str, part: str, result: Result, images: Path) -> Iterator[str]:
    yield f"# {device}: {part}\n"
    yield "`python -m benchmarks.report` writes this page. [What it shows](../performance.md).\n"
    yield f"{_facts(result['environment'])}\n"
    yield from _tables(device, part, result, images, "../images")


def _own_page(device: str, part: str) -> str:
    return f"{device}_{part.replace('-', '_')}.md"


def _tables(device: str, part: str, result: Result, images: Path, folder: str) -> Iterator[str]:
    """Yield the facts, the plot and the tables of a part; `folder` leads to the images."""
    if about := _part_facts(result["environment"]):
        yield f"{about}\n"
    image = images / f"{device}_{part}.png"
    if image.exists():
        yield f"![{PLOTS[part].about}]({folder}/{image.name})\n"
    for table in TABLES[part]:
        yield from markdown(table, result["cases"])


def cuda_results(results: Path) -> dict[str, dict[str, Result]]:
    """Read the results of GPU benchmarks by device, then by part."""
    found: dict[str, dict[str, Result]] = defaultdict(dict)
    for file in sorted(results.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        part = result["environment"].get("part")
        if part:
            found[file.stem.removesuffix(f"_{part.replace('-', '_')}")][part] = result
    return dict(found)


def _facts(environment: dict[str, Any]) -> str:
    return _listed({key: what for key, what in environment.items() if key not in PART_FACTS})


def _part_facts(environment: dict[str, Any]) -> str:
    """List the facts of the part, if it has any."""
    return _listed({key: environment[key] for key in PART_FACTS[1:] if environment.get(key)})


def _listed(facts: dict[str, Any]) -> str:
    shown = dict(facts)
    if "kernel_sha256" in shown:
        shown["kernel_sha256"] = shown["kernel_sha256"][:12]
    for key, value in shown.items():
        if isinstance(value, dict):
            shown[key] = "; ".join(f"{name}: {what}" for name, what in value.items())
        elif isinstance(value, list):
            shown[key] = "; ".join(map(str, value))
    return ", ".join(f"{key} {value}" for key, value in shown.items())


def write_plots(results: Path, images: Path) -> None:
    """Draw the plots into the folder, or nothing where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    for device, parts in cuda_results(results).items():
        for part in (part for part in PLOTS if part in parts):
            environment, cases = parts[part]["environment"], parts[part]["cases"]
            figure = draw(PLOTS[part], cases, plt)
            if figure is None:
                continue
            figure.suptitle(f"{environment['gpu']}, {environment['date']}", fontsize=11)
            images.mkdir(parents=True, exist_ok=True)
            # Without the date of drawing, so that the same numbers make the same file.
            figure.savefig(images / f"{device}_{part}.png", dpi=120, metadata={"Software": ""})
            plt.close(figure)

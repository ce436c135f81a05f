# SPDX-License-Identifier: Apache-2.0
"""Fills the page between its markers."""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.report.plots import PLOTS
from benchmarks.report.tables import TABLES, _table

CPU_MARKERS = ("<!-- tables: begin -->", "<!-- tables: end -->")
CUDA_MARKERS = ("<!-- cuda tables: begin -->", "<!-- cuda tables: end -->")
# What a result's environment says of its part and not of the run.
PART_FACTS = ("part", "grouped_mm", "present", "absent")
# Of the tensors of a CPU case; its cases are routings.
SIZES = tuple("ENDRHIKT")

Result = dict[str, Any]


# CPU


def cpu_tables(results: Path) -> Iterator[str]:
    for file in sorted(results.glob("cpu_*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        yield f"### {file.name}\n\n{_facts(result['environment'])}\n"
        groups: dict[tuple[str, str, str], dict[tuple[int, ...], list[float]]] = {}
        # Without a ratio: a result was wrong, and `wrong` names whose.
        wrong = [case["wrong"] for case in result["cases"] if "ratio" not in case]
        for case in result["cases"]:
            if "ratio" in case:
                key = (case["dtype"], case.get("counts", ""), case["pass"])
                shapes = groups.setdefault(key, defaultdict(list))
                shapes[tuple(case[s] for s in SIZES if s in case)].append(case["ratio"][1])
        rows = []
        for key, shapes in groups.items():
            ratios = [ratio for of_shape in shapes.values() for ratio in of_shape]
            least_shape = min(statistics.geometric_mean(of_shape) for of_shape in shapes.values())
            under = sum(ratio < 0.9 for ratio in ratios)
            means = (statistics.geometric_mean(ratios), least_shape, min(ratios))
            rows.append([*key, len(ratios), *(f"{mean:.3f}" for mean in means), under])
        header = "dtype|counts|pass|cases|geomean|least shape|least case|cases under 0.90"
        yield from _table(header, rows)
        if wrong:
            whose = Counter(name for names in wrong for name in names)
            counts = ", ".join(f"{name} {count}" for name, count in sorted(whose.items()))
            yield f"Left out, since a result was found wrong: {len(wrong)} cases ({counts}).\n"


# CUDA


def cuda_results(results: Path) -> dict[str, dict[str, Result]]:
    """By device, then by part."""
    found: dict[str, dict[str, Result]] = defaultdict(dict)
    for file in sorted(results.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        part = result["environment"].get("part")
        if part:
            found[file.stem.removesuffix(f"_{part.replace('-', '_')}")][part] = result
    return dict(found)


def cuda_tables(results: Path, images: Path | None) -> Iterator[str]:
    """Of every device; the plots that `images` holds are shown above the numbers they are of."""
    for device, parts in cuda_results(results).items():
        told = ""
        for part, rows_of in TABLES.items():
            if part not in parts:
                continue
            result = parts[part]
            yield f"### {device}: {part}\n"
            # Once for all parts of a run.
            if (facts := _facts(result["environment"])) != told:
                yield f"{facts}\n"
            told = facts
            if about := _part_facts(result["environment"]):
                yield f"{about}\n"
            image = None if images is None else images / f"{device}_{part}.png"
            if image is not None and image.exists():
                yield f"![{PLOTS[part][0]}](images/{image.name})\n"
            yield from rows_of(result["cases"])


def _facts(environment: dict[str, Any]) -> str:
    return _listed({key: what for key, what in environment.items() if key not in PART_FACTS})


def _part_facts(environment: dict[str, Any]) -> str:
    """Empty where there is nothing to say."""
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
    if importlib.util.find_spec("matplotlib") is None:
        return
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    for device, parts in cuda_results(results).items():
        for part, (_, draw) in PLOTS.items():
            if part in parts and parts[part]["cases"]:
                images.mkdir(parents=True, exist_ok=True)
                figure = draw(parts[part]["cases"], plt)
                gpu = parts[part]["environment"]["gpu"]
                figure.suptitle(f"{gpu}, {parts[part]['environment']['date']}", fontsize=11)
                # Without the date of drawing, so that the same numbers make the same file.
                figure.savefig(images / f"{device}_{part}.png", dpi=120, metadata={"Software": ""})
                plt.close(figure)


def between(text: str, markers: tuple[str, str], lines: Iterable[str]) -> str:
    """The text with the lines between the markers; as it is where there are no lines."""
    body = "\n".join(lines)
    if not body:
        return text
    before, begin, rest = text.partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not begin or not end:
        raise ValueError(f"the page has no {markers[0]} ... {markers[1]} to write between")
    return f"{before}{begin}\n\n{body}\n{end}{after}"


def write(results: Path, page: Path) -> None:
    """Rewrites the page and the images beside it."""
    images = page.parent / "images"
    write_plots(results, images)
    text = page.read_text(encoding="utf-8")
    text = between(text, CPU_MARKERS, cpu_tables(results))
    text = between(text, CUDA_MARKERS, cuda_tables(results, images))
    page.write_text(text, encoding="utf-8")

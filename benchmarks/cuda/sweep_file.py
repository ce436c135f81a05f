# SPDX-License-Identifier: Apache-2.0
"""The file of a sweep, and what it comes to."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cuda.experts import PASSES, first_line
from benchmarks.cuda.timing import Record
from benchmarks.draws import Draw
from benchmarks.timing import write

# Records of one file agree in these facts.
SAME = ("gpu", "dtype", "torch", "triton", "kernel_sha256", "limit_gb")


class Results:
    """The file of a sweep: what is in it, and what is added."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        """Read the file; ValueError where it was measured otherwise."""
        self.path, self.facts = path, facts
        self.records: list[Record] = []
        self.failed: dict[str, str] = {}
        if not path.exists():
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        before = found["environment"]
        if differing := [key for key in SAME if before.get(key) != facts.get(key)]:
            told = ", ".join(f"{key} {before.get(key)}, now {facts.get(key)}" for key in differing)
            raise ValueError(f"{path} is of {told}: remove it, or use --results")
        self.records = found["cases"]
        # What an earlier seed drew twice.
        earlier = [line for line in before.get("repeated", []) if line not in facts["repeated"]]
        facts["repeated"] = [*earlier, *facts["repeated"]]

    def has(self, draw: Draw) -> bool:
        """Whether both passes of a shape were measured, right or wrong."""
        of_shape = [record for record in self.records if _is_of(record, draw)]
        return {record["pass"] for record in of_shape} >= set(PASSES)

    def add(self, draw: Draw, records: Sequence[Record]) -> None:
        """Add the records of a shape, in place of what there is of it."""
        others = [record for record in self.records if not _is_of(record, draw)]
        self.records = [*others, *records]
        self.write()

    def fail(self, draw: Draw, error: Exception) -> None:
        self.failed[draw.shape.name] = first_line(error)
        self.write()

    def write(self) -> None:
        told = {"failed": self.failed} if self.failed else {}
        write(self.path, {**self.facts, **told}, self.records)


def _is_of(record: Record, draw: Draw) -> bool:
    return (record["shape"], record["routing"]) == (draw.shape.name, draw.routing)


def summary(records: Sequence[Record]) -> Iterator[str]:
    """By pass: how many shapes, the geometric mean of the ratios, and the least of them."""
    for name in PASSES:
        ratios = {
            record["shape"]: next(iter(record["ratio"].values()))[1]
            for record in records
            if record["pass"] == name and record["ratio"]
        }
        if ratios:
            least = ", ".join(
                f"{shape} {ratio:.2f}"
                for shape, ratio in sorted(ratios.items(), key=lambda item: item[1])[:8]
            )
            mean = statistics.geometric_mean(ratios.values())
            yield f"{name}: {len(ratios)} shapes, geometric mean {mean:.3f}, least: {least}"

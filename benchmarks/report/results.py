# SPDX-License-Identifier: Apache-2.0
"""Reads benchmarks/results/*.json, and tells the facts of a run in a line."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# These facts of a result's environment are about its part. The others are about the whole run.
PART_FACTS = (
    "part", "grouped_mm", "model", "present", "absent", "limit_gb", "repeated", "failed",
    "left out, no time", "ended after", "gpus of one host", "ranks",
)  # fmt: skip

Result = dict[str, Any]


def cpu_results(results: Path) -> Iterator[tuple[str, Result]]:
    """Yield the name and the content of each result of a CPU."""
    for file in sorted(results.glob("cpu_*.json")):
        yield file.name, json.loads(file.read_text(encoding="utf-8"))


def cuda_results(results: Path) -> dict[str, dict[str, Result]]:
    """Read the results of GPU benchmarks by device, then by part."""
    found: dict[str, dict[str, Result]] = defaultdict(dict)
    for file in sorted(results.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        part = result["environment"].get("part")
        if part:
            found[file.stem.removesuffix(f"_{part.replace('-', '_')}")][part] = result
    return dict(found)


def run_facts(environment: dict[str, Any]) -> str:
    """List the facts of the whole run."""
    return _listed({key: what for key, what in environment.items() if key not in PART_FACTS})


def part_facts(environment: dict[str, Any]) -> str:
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

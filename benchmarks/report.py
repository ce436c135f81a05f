# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of docs/performance.md from benchmarks/results/cpu_*.json.

python -m benchmarks.report
"""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def tables() -> Iterator[str]:
    for file in sorted((ROOT / "benchmarks" / "results").glob("cpu_*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        environment = result["environment"]
        facts = ", ".join(f"{key} {value}" for key, value in environment.items())
        yield f"### {file.name}\n\n{facts}\n"
        yield "| dtype | counts | pass | cases | geomean | least | under 0.90 |"
        yield "| --- | --- | --- | --- | --- | --- | --- |"
        groups: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        # Without a ratio: a result was wrong, and `wrong` names whose.
        wrong = [case["wrong"] for case in result["cases"] if "ratio" not in case]
        for case in result["cases"]:
            if "ratio" in case:
                key = (case["dtype"], case.get("counts", ""), case["pass"])
                groups[key].append(case["ratio"][1])
        for key, ratios in groups.items():
            mean = statistics.geometric_mean(ratios)
            few = sum(ratio < 0.9 for ratio in ratios)
            cells = [*key, len(ratios), f"{mean:.3f}", f"{min(ratios):.3f}", few]
            yield "| " + " | ".join(map(str, cells)) + " |"
        yield ""
        if wrong:
            whose = Counter(name for names in wrong for name in names)
            counts = ", ".join(f"{name} {count}" for name, count in sorted(whose.items()))
            yield f"Left out, since a result was found wrong: {len(wrong)} cases ({counts}).\n"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    body = "\n".join(tables())
    PAGE.write_text(f"{before}{BEGIN}\n\n{body}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()

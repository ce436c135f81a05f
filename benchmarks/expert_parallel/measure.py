# SPDX-License-Identifier: Apache-2.0
"""A run of the benchmark, as each of its ranks does it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from benchmarks.cuda.timing import device_name, environment, free
from benchmarks.expert_parallel import parts
from benchmarks.expert_parallel.acceptance import aims
from benchmarks.expert_parallel.exchanges import absent
from benchmarks.expert_parallel.ranks import RanksBench
from benchmarks.expert_parallel.records import part_of
from benchmarks.suite import Shape
from benchmarks.timing import write


def measure(bench: RanksBench, shapes: list[Shape], seconds: float, results: Path) -> None:
    """What each rank does; rank 0 prints, and writes the results."""
    until = time.monotonic() + seconds
    on_gpu = bench.device.type == "cuda"
    if not on_gpu:
        bench.seconds, bench.least_turns = 0.0, 2
    bench.warm_up(1.0 if on_gpu else 0.0)
    part = part_of(bench.world_size)
    facts = {**environment(bench), "part": part, "ranks": bench.world_size}
    facts["absent"] = absent(bench)
    if not on_gpu:
        facts["gpu"] = "none: a CPU with gloo"
    records, left_out = [], []
    for label, run in parts.cases(bench, shapes):
        # All ranks stop together.
        if bench.largest([time.monotonic() - until])[0] > 0:
            left_out.append(label)
            continue
        for record in run():
            records.append(record)
            if bench.rank == 0:
                _show(label, record)
        free()
    if bench.rank == 0:
        facts |= {"left out, no time": left_out} if left_out else {}
        name = device_name(bench.device) if on_gpu else "gloo"
        file = results / f"{name}_{part.replace('-', '_')}.json"
        write(file, facts, records)
        print(f"wrote {file}", *(f"absent: {name}: {why}" for name, why in facts["absent"].items()))
        for aim in aims(records):
            print(aim)


def _show(label: str, record: dict[str, Any]) -> None:
    told = {name: middle for name, (_, middle, _) in record["milliseconds"].items()}
    wrong = [f"WRONG: {record['wrong']} {record['errors']}"] if "wrong" in record else []
    print(label, record["T"], record.get("pass", ""), json.dumps(told), *wrong, flush=True)

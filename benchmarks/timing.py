# SPDX-License-Identifier: Apache-2.0
"""Timing two implementations side by side, on a machine that does other things too.

Everything is compared inside one process, taking turns: whatever slows the machine down slows
both. What slows one more than the other, as a busy cache slows who reads more of it, often lasts
for seconds: so the turns of a case are spread over the run, some in each of its rounds, and
each such visit draws its operands anew. A comparison is the ratio peer / ours of each turn, and
its quartiles; the quartiles of the times themselves are kept beside it, and how many CPUs other
processes used meanwhile: two threads that wait for each other lose far more than the share that
is taken from them. Nothing is timed whose result was not found right first.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from testing.tolerances import RELATIVE_NORM, relative_error

OURS, PEER = "moe_ops", "peer"

# Called with the number of the turn; what is not to be timed was prepared before. The turns that are
# timed are followed by WARM_UPS more, which run before them.
WARM_UPS = 2
Contender = Callable[[int], Any]


def environment(threads: int) -> dict[str, Any]:
    """What a reader needs to judge the numbers. Sets the number of threads."""
    torch.set_num_threads(threads)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    """The model, family and number, and the instructions that decide how fast a product is."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in info.read_text().splitlines())
    fields = {key.strip(): value.strip() for key, _, value in lines}
    flags = fields.get("flags", "").split()
    shown = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    numbers = [f"{key[4:]} {fields[key]}" for key in ("cpu family",) if key in fields]
    numbers += [f"model {fields['model']}"] if "model" in fields else []
    return f"{fields.get('model name', platform.machine())} ({', '.join([*numbers, *shown])})"


def worst_error(results: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """The largest ||result - reference|| / ||reference||, against references in fp64."""
    return max(map(relative_error, results, references))


def compare(
    contenders: dict[str, Contender],
    worst_errors: dict[str, float],
    dtype: torch.dtype,
    turns: int,
) -> dict[str, Any]:
    """Times `contenders`, OURS and PEER, in turns; the record of one visit, with every time.

    Where a result is wrong nothing is timed, and `wrong` names whose it is.
    """
    record: dict[str, Any] = {
        "errors": {name: float(f"{e:.2e}") for name, e in worst_errors.items()}
    }
    # A NaN is not within the tolerance.
    wrong = [name for name, error in worst_errors.items() if not error <= RELATIVE_NORM[dtype]]
    if wrong:
        return {**record, "wrong": wrong}
    others = OtherProcesses()
    milliseconds = _take_turns(contenders, turns)
    return {**record, "others": others.cpus(), "milliseconds": milliseconds}


def summary(visits: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The record that is written to the results, of the visits of one case.

    Of a case that was wrong in any visit there is no ratio, and `wrong` names whose result it was.
    """
    errors = [visit["errors"] for visit in visits]
    # max would pass over a NaN.
    worst = {name: max((e[name] for e in errors), key=_nan_last) for name in errors[0]}
    wrong = {name for visit in visits for name in visit.get("wrong", ())}
    timed = ("others", "milliseconds", "wrong")
    record = {**{k: v for k, v in visits[0].items() if k not in timed}, "errors": worst}
    if wrong:
        return {**record, "wrong": [name for name in worst if name in wrong]}
    milliseconds = {
        name: [time for visit in visits for time in visit["milliseconds"][name]] for name in worst
    }
    turns = zip(milliseconds[PEER], milliseconds[OURS], strict=True)
    return {
        **record,
        "others": round(statistics.mean(visit["others"] for visit in visits), 2),
        "milliseconds": {name: _quartiles(times) for name, times in milliseconds.items()},
        "ratio": _quartiles([peer / ours for peer, ours in turns]),
    }


def _nan_last(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _take_turns(contenders: dict[str, Contender], turns: int) -> dict[str, list[float]]:
    names = list(contenders)
    milliseconds: dict[str, list[float]] = {name: [] for name in names}
    for warm_up in range(turns, turns + WARM_UPS):
        for name in names:
            contenders[name](warm_up)
    for turn in range(turns):
        # Each goes first every other turn: the first one finds colder caches.
        for name in names if turn % 2 else reversed(names):
            contender = contenders[name]
            start = time.perf_counter_ns()
            contender(turn)
            milliseconds[name].append((time.perf_counter_ns() - start) / 1e6)
    return milliseconds


class OtherProcesses:
    """How many CPUs they used on average since this object was made; 0 where /proc is missing."""

    def __init__(self) -> None:
        self.start = self._read()

    def cpus(self) -> float:
        (wall, busy, own), (wall_0, busy_0, own_0) = self._read(), self.start
        # The kernel counts in hundredths of a second.
        return max(0.0, round((busy - busy_0 - own + own_0) / max(wall - wall_0, 0.01), 2))

    @staticmethod
    def _read() -> tuple[float, float, float]:
        stat = Path("/proc/stat")
        own = time.process_time()
        if not stat.exists():
            return time.perf_counter(), own, own
        fields = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
        idle = fields[3] + fields[4]
        return time.perf_counter(), (sum(fields) - idle) / os.sysconf("SC_CLK_TCK"), own


def others_now() -> float:
    """How many CPUs other processes use, from a look of a fifth of a second."""
    others = OtherProcesses()
    time.sleep(0.2)
    return others.cpus()


def _quartiles(values: list[float]) -> list[float]:
    if len(values) == 1:
        values = values * 2
    return [float(f"{q:.4g}") for q in statistics.quantiles(values, n=4, method="inclusive")]


class VisitLog:
    """What a run has measured so far, a line for each visit; a run cut short goes on from it.

    Attributes:
        settings: the run's environment but for the date; they are the log's first line.
        turns: of each round, which share the repeats.
    """

    def __init__(self, path: Path, env: dict[str, Any]) -> None:
        self.path = path
        self.settings = {key: value for key, value in env.items() if key != "date"}
        repeats, rounds = env["repeats"], env["rounds"]
        self.turns = [len(range(number, repeats, rounds)) for number in range(rounds)]
        self.visits: dict[tuple[int, str], list[dict[str, Any]]] = {}

    def open(self, resume: bool) -> None:
        """Empties it, or reads what is there; ValueError where that was measured otherwise."""
        lines = self.path.read_text().splitlines(True) if resume and self.path.exists() else []
        # A run that is killed may leave half a line.
        entries = [json.loads(line) for line in lines if line.endswith("\n")]
        if entries and entries[0] != self.settings:
            raise ValueError(f"{self.path} is of {entries[0]}, not {self.settings}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.settings) + "\n")
        for entry in entries[1:]:
            self.append(*entry)

    def append(self, number: int, case: dict[str, Any], visits: list[dict[str, Any]]) -> None:
        """Of a round, what it found of a case, a record for each pass."""
        self.visits[number, json.dumps(case)] = visits
        with self.path.open("a") as file:
            file.write(json.dumps([number, case, visits]) + "\n")

    def has(self, number: int, case: dict[str, Any]) -> bool:
        return (number, json.dumps(case)) in self.visits

    def records(self, case: dict[str, Any]) -> list[dict[str, Any]]:
        """For the results, one for each pass; none before every round has visited the case."""
        if not all(self.has(number, case) for number in range(len(self.turns))):
            return []
        rounds = [self.visits[number, json.dumps(case)] for number in range(len(self.turns))]
        return [summary(visits) for visits in zip(*rounds, strict=True)]


def write(path: Path, env: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """One record a line, so that a diff of two runs can be read."""
    lines = ",\n".join(json.dumps(record) for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"environment": {json.dumps(env)},\n"cases": [\n{lines}\n]}}\n')

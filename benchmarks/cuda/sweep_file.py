# SPDX-License-Identifier: Apache-2.0
"""The file of a sweep, what it comes to, and how files of several GPUs are joined."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks import aims, suite
from benchmarks.cuda.experts import PASSES, first_line
from benchmarks.cuda.timing import OURS, Record
from benchmarks.draws import Draw
from benchmarks.timing import write

# Records of one file agree in these facts.
SAME = ("gpu", "dtype", "torch", "triton", "kernel_sha256", "limit_gb")
# And in these not, where several GPUs of one host measured them.
OF_GPU = ("date", "clock now", "ceilings")
# Where a file names what there was no time for.
LEFT_OUT = "left out, no time"
# Where it names the last case of a run that was ended before it could tell what it left out.
ENDED_AFTER = "ended after"
# How many GPUs of one host measured a file's cases; of each host, where there were several.
GPUS = "gpus of one host"
# Which peers' libraries a run found, by version, and which it did not find, and why.
PRESENT, ABSENT = "present", "absent"
# How many shapes the summary names.
MOST_NAMED = 8


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
        measured = {record["shape"] for record in self.records}
        earlier_failures = before.get("failed", {}).items()
        self.failed = {name: why for name, why in earlier_failures if name not in measured}
        # What an earlier seed drew twice.
        earlier = [line for line in before.get("repeated", []) if line not in facts["repeated"]]
        facts["repeated"] = [*earlier, *facts["repeated"]]

    def has(self, draw: Draw) -> bool:
        """Whether both passes of a shape were measured, right or wrong."""
        of_shape = [record for record in self.records if _is_of(record, draw)]
        return {record["pass"] for record in of_shape} >= set(PASSES)

    def add(self, draw: Draw, records: Sequence[Record]) -> None:
        """Add the records of a shape, in place of what there is of it."""
        self.failed.pop(draw.shape.name, None)
        others = [record for record in self.records if not _is_of(record, draw)]
        self.records = [*others, *records]
        self.write()

    def fail(self, draw: Draw, error: Exception) -> None:
        self.failed[draw.shape.name] = first_line(error)
        self.write()

    def write(self) -> None:
        told = {"failed": self.failed} if self.failed else {}
        write(self.path, {**self.facts, **told}, in_order(self.records))


def _is_of(record: Record, draw: Draw) -> bool:
    return (record["shape"], record["routing"]) == (draw.shape.name, draw.routing)


def in_order(records: Sequence[Record]) -> list[Record]:
    """The records by seed and number, or as the named shapes stand; a shape's stay together."""
    named = {shape.name: i for i, shape in enumerate((*suite.SUITE, *suite.NAMED))}

    def place(record: Record) -> tuple[int, ...]:
        seed, _, number = record["shape"].partition("/")
        if seed.isdecimal() and number.isdecimal():
            return int(seed), int(number)
        return (named.get(record["shape"], len(named)),)

    return sorted(records, key=place)


def join(paths: Sequence[Path], path: Path, gpus: int | None = None) -> list[Record]:
    """Write to one file what several runs on the GPUs of one host measured; return its records.

    What one run had no time for, or failed at, is not told if another measured it. Nor is a library
    that one run lacked and another had. A file may itself be joined, of another host.

    Args:
        paths: of the runs.
        path: of the file.
        gpus: how many GPUs the runs were on that are not joined yet. None: each on its own.

    Raises:
        ValueError: the files differ in a fact other than `OF_GPU`, or two have the same case, or
            cases have no shape.
    """
    results = [json.loads(each.read_text(encoding="utf-8")) for each in paths]
    if any("shape" not in case for result in results for case in result["cases"]):
        raise ValueError(f"{paths[0].name}: its cases have no shapes, so they cannot be shared")
    told = [dict(result["environment"]) for result in results]
    repeated = [each.pop("repeated", []) for each in told]
    failed = [each.pop("failed", {}) for each in told]
    left_out = [each.pop(LEFT_OUT, []) for each in told]
    ended_after = [each.pop(ENDED_AFTER) for each in told if ENDED_AFTER in each]
    of_hosts = [each.pop(GPUS) for each in told if GPUS in each]
    if single := len(paths) - len(of_hosts):
        of_hosts.append(gpus or single)
    libraries = _libraries(told)
    facts: dict[str, Any] = {}
    for key in dict.fromkeys(key for each in told for key in each):
        values: list[Any] = [each.get(key) for each in told]
        if all(value == values[0] for value in values):
            facts[key] = values[0]
        elif key not in OF_GPU:
            raise ValueError(f"the files differ in {key}: {', '.join(map(str, values))}")
        elif isinstance(values[0], dict):
            facts[key] = {name: _flat([value[name] for value in values]) for name in values[0]}
        else:
            facts[key] = _flat(values)
    labels = [label for result in results for label in {_label(c) for c in result["cases"]}]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"several files have {', '.join(twice)}")
    facts |= libraries
    facts[GPUS] = of_hosts if len(of_hosts) > 1 else of_hosts[0]
    if ended_after:
        facts[ENDED_AFTER] = ended_after
    if any(repeated):
        facts["repeated"] = list(dict.fromkeys(line for lines in repeated for line in lines))
    records = in_order([case for result in results for case in result["cases"]])
    measured = {
        label
        for result, why in zip(results, failed, strict=True)
        for label in map(_label, result["cases"])
        if label not in why
    }
    why_failed = {name: why for each in failed for name, why in each.items()}
    why_failed = {name: why for name, why in why_failed.items() if name not in measured}
    if why_failed:
        facts["failed"] = why_failed
    missing = [name for name in chain(*left_out) if name not in measured | why_failed.keys()]
    if missing:
        facts[LEFT_OUT] = list(dict.fromkeys(missing))
    write(path, facts, records)
    return records


def _flat(values: Sequence[Any]) -> list[Any]:
    """A joined file has a list of its runs' values."""
    return [each for value in values for each in (value if isinstance(value, list) else [value])]


def _libraries(told: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Take from the runs' facts which libraries there were: what one run had, all had together."""
    found = [(each.pop(PRESENT), each.pop(ABSENT, {})) for each in told if PRESENT in each]
    if not found:
        return {}
    present: dict[str, str] = {}
    for versions, _ in found:
        for name, version in versions.items():
            if present.setdefault(name, version) != version:
                raise ValueError(f"the files differ in {name}: {present[name]}, {version}")
    reasons = {name: why for _, reasons in found for name, why in reasons.items()}
    return {
        PRESENT: present,
        ABSENT: {name: why for name, why in reasons.items() if name not in present},
    }


def _label(record: Record) -> str:
    """As a case is named where it failed or was left out."""
    return f"{record['peer']} {record['shape']}" if "peer" in record else str(record["shape"])


def summary(records: Sequence[Record]) -> Iterator[str]:
    """What a sweep comes to.

    By pass how many shapes, the geometric mean of the ratios and the least; then how many shapes
    take more memory than they may, and which the most.
    """
    for name in PASSES:
        ratios = {
            record["shape"]: next(iter(record["ratio"].values()))[1]
            for record in records
            if record["pass"] == name and record["ratio"]
        }
        if ratios:
            least = ", ".join(
                f"{shape} {ratio:.2f}"
                for shape, ratio in sorted(ratios.items(), key=lambda item: item[1])[:MOST_NAMED]
            )
            mean = statistics.geometric_mean(ratios.values())
            below = sum(ratio < 1 for ratio in ratios.values())
            yield (
                f"{name}: {len(ratios)} shapes, geometric mean {mean:.3f}, below 1: {below}, "
                f"least: {least}"
            )
    peaks = _peaks(records)
    if peaks:
        above = {shape: both for shape, both in peaks.items() if aims.exceeds_peak(*both)}
        most = sorted(above.items(), key=lambda item: -item[1][0] / item[1][1])[:MOST_NAMED]
        named = ", ".join(
            f"{shape} {ours / theirs:.2f}x ({ours:.0f} to {theirs:.0f} MiB)"
            for shape, (ours, theirs) in most
        )
        yield (
            f"peak: {len(above)} of {len(peaks)} shapes exceed {aims.PEAK_FACTOR}x of the peer's "
            f"plus {aims.PEAK_MIB:.0f} MiB" + (f", most: {named}" if named else "")
        )


def _peaks(records: Sequence[Record]) -> dict[str, tuple[float, float]]:
    """By shape, the MiB at most, ours and the peer's, where both were measured."""
    found = {}
    for record in records:
        mib = {who: each["peak"] for who, each in record.get("mib", {}).items() if each}
        peers = [peak for who, peak in mib.items() if who != OURS]
        if OURS in mib and peers:
            found[record["shape"]] = (mib[OURS], peers[0])
    return found

# SPDX-License-Identifier: Apache-2.0
"""Turns the cases of a benchmark into the records that become a table's rows."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from benchmarks.report.columns import Record, Take, at

PASSES = ("forward", "dX", "dW")
# The sizes of a CPU case. Cases of the same sizes differ in their routing.
SIZES = tuple("ENDRHIKT")

Cases = list[Record]


def where(**values: object) -> Callable[[Cases], Cases]:
    """Keep the cases that have these values."""
    return lambda cases: [
        case for case in cases if all(case[key] == value for key, value in values.items())
    ]


def among(key: str, *values: object) -> Callable[[Cases], Cases]:
    """Keep the cases that have one of these values."""
    return lambda cases: [case for case in cases if case[key] in values]


def own(cases: Cases) -> Cases:
    """Keep the cases that name no peer: they are run in one process with torch's ways."""
    return [case for case in cases if "peer" not in case]


def with_peer(cases: Cases) -> Cases:
    """Keep the cases that are of another library, and put its numbers under "theirs"."""
    return [
        {
            **case,
            "theirs": {
                "milliseconds": case["milliseconds"].get(case["peer"]),
                "mib": case.get("mib", {}).get(case["peer"], {}),
            },
        }
        for case in cases
        if "peer" in case
    ]


def by_pass(cases: Cases) -> Iterator[Record]:
    """Group the cases by pass."""
    for name in PASSES:
        yield {"pass": name, "group": [case for case in cases if case["pass"] == name]}


def by_value(key: str) -> Callable[[Cases], Iterator[Record]]:
    """Group the cases by the value of a key, in the order of the cases."""

    def grouped(cases: Cases) -> Iterator[Record]:
        for value in dict.fromkeys(case[key] for case in cases):
            yield {key: value, "group": [case for case in cases if case[key] == value]}

    return grouped


def by_shape(cases: Cases) -> Iterator[Record]:
    """Make a record of each shape and routing, which has the case of every pass."""
    of_shape: dict[tuple[str, str], dict[str, Record]] = defaultdict(dict)
    for case in cases:
        of_shape[case["shape"], case["routing"]][case["pass"]] = case
    for of_pass in of_shape.values():
        yield {**next(iter(of_pass.values())), "of_pass": of_pass}


def over_group(reduce: Callable[[list[float]], float], take: Take) -> Take:
    """Take one number of a whole group; None where no case of it has the value."""

    def reduced(record: Record) -> float | None:
        found = [value for case in record["group"] if (value := take(case)) is not None]
        return reduce(found) if found else None

    return reduced


def by_implementation(cases: Cases) -> Iterator[Record]:
    """Make a record of the memory of each implementation in each case."""
    for case in cases:
        for who, mib in case.get("mib", {}).items():
            yield {**case, "implementation": who, "memory": mib}


def cpu_groups(cases: Cases) -> Iterator[Record]:
    """Group the median ratios of a CPU benchmark by dtype, counts and pass, then by shape.

    A case without a ratio had a wrong result and is in no group.
    """
    groups: dict[tuple[str, str, str], dict[tuple[int, ...], list[float]]] = {}
    for case in cases:
        if "ratio" in case:
            key = (case["dtype"], case.get("counts", ""), case["pass"])
            shapes = groups.setdefault(key, defaultdict(list))
            shapes[tuple(case[size] for size in SIZES if size in case)].append(case["ratio"][1])
    for (dtype, counts, name), shapes in groups.items():
        yield {
            "dtype": dtype,
            "counts": counts,
            "pass": name,
            "ratios": [ratio for of_shape in shapes.values() for ratio in of_shape],
            "means": [statistics.geometric_mean(of_shape) for of_shape in shapes.values()],
        }


def by_kernel(cases: Cases) -> Iterator[Record]:
    """Make a record of each launch of a kernel, which has the case of every shape."""
    found = {(case["kernel"], case["nth"], case["shape"]): case for case in cases}
    names = shapes(cases)
    launches = in_order(
        [(case["kernel"], case["nth"]) for case in cases if case["shape"] == shape]
        for shape in names
    )
    for kernel, nth in launches:
        of_shape = {shape: found.get((kernel, nth, shape)) for shape in names}
        yield {"kernel": kernel, "nth": nth, "of_shape": of_shape}


def shapes(cases: Cases) -> list[str]:
    """List the names of the shapes in the order of the cases."""
    return list(dict.fromkeys(case["shape"] for case in cases))


def in_order(sequences: Iterable[list[tuple[str, int]]]) -> list[tuple[str, int]]:
    """Merge sequences: an item that is new in one stands after the item that it follows there."""
    merged: list[tuple[str, int]] = []
    for sequence in sequences:
        place = 0
        for item in sequence:
            if item in merged:
                place = merged.index(item) + 1
            else:
                merged.insert(place, item)
                place += 1
    return merged


def steps(cases: Cases) -> Iterator[Record]:
    """Make a record of each implementation's step in each shape.

    Its backward is the time of the whole step less that of the forward.
    """
    for shape in shapes(own(cases)):
        of_pass = {case["pass"]: case for case in own(cases) if case["shape"] == shape}
        medians = {
            name: {who: median for who, (_, median, _) in case["milliseconds"].items()}
            for name, case in of_pass.items()
        }
        forward, step = (medians.get(name, {}) for name in ("forward", "forward+backward"))
        for who in dict.fromkeys([*forward, *step]):
            both = who in forward and who in step
            yield {
                "shape": shape,
                "implementation": who,
                "forward": forward.get(who),
                "backward": step[who] - forward[who] if both else None,
                "forward+backward": step.get(who),
                "memory": at("forward+backward", "mib", who)(of_pass),
            }

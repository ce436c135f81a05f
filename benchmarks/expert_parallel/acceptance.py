# SPDX-License-Identifier: Apache-2.0
"""What expert parallelism has to reach, and what a run's records say of it.

On two GPUs it is compared with torch's collectives, with the link and with one GPU. On more, with the
speed that was published for eight H200 on this shape: LigerCute (CUTLASS and NVSHMEM), 233 TF/s a GPU
forward and 209 backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.expert_parallel.records import (
    BLOCK,
    BOTH,
    DISPATCH,
    EXACT,
    EXCHANGE,
    FEW_TOKENS,
    FORWARD,
    FUNCTIONAL,
    LINK,
    MAIN,
    ONE_GPU,
    SYMMETRIC,
)

_OVER = "functional collectives' time over ours"
# What was published, and what would be better.
_FORWARD_TFLOPS, _BACKWARD_TFLOPS = (233, 300), (209, 270)


class Aim(NamedTuple):
    """A ratio or a speed, what it is to reach at least, and better; None: it was not measured."""

    what: str
    shape: str
    reached: float | None
    must: float
    goal: float | None = None

    def __str__(self) -> str:
        told = f"{self.shape}: {self.what}: "
        if self.reached is None:
            return f"{told}not measured (must {self.must})"
        said = "reached" if self.reached >= self.must else "MISSED"
        goal = "" if self.goal is None else f", goal {self.goal}"
        return f"{told}{told_number(self.reached)} {said} (must {self.must}{goal})"


def told_number(value: float) -> str:
    """Tell a ratio to two places, a speed to none."""
    return f"{value:.0f}" if value > 10 else f"{value:.2f}"


def aims(records: list[dict[str, Any]]) -> Iterator[Aim]:
    """Yield every aim, in the order of the records."""
    yield from _of_two([record for record in records if record["W"] == 2])
    yield from _of_more([record for record in records if record["W"] > 2])


def _of_more(records: list[dict[str, Any]]) -> Iterator[Aim]:
    of_pass = {
        record["pass"]: (record["milliseconds"].get(SYMMETRIC), record["tflops"].get(SYMMETRIC))
        for record in records
        if record["what"] == BLOCK and record["shape"] == MAIN
    }
    forward, both = (of_pass.get(name, (None, None)) for name in (FORWARD, BOTH))
    if of_pass:
        yield Aim("forward TF/s a GPU", MAIN, forward[1], *_FORWARD_TFLOPS)
        yield Aim("backward TF/s a GPU", MAIN, _without(both, forward), *_BACKWARD_TFLOPS)


def _without(both: tuple[Any, float | None], forward: tuple[Any, float | None]) -> float | None:
    """The speed of the backward alone, from quartiles of the time and the speed of either."""
    if both[1] is None or forward[1] is None:
        return None
    (_, time, _), (_, less, _) = both[0], forward[0]
    return (both[1] * time - forward[1] * less) / (time - less)


def _of_two(records: list[dict[str, Any]]) -> Iterator[Aim]:
    for record in records:
        shape = record["shape"]
        times = {name: middle for name, (_, middle, _) in record["milliseconds"].items()}
        ours = times.get(SYMMETRIC)
        functional = min((times[n] for n in (FUNCTIONAL, EXACT) if n in times), default=None)
        if record["what"] == EXCHANGE and record["T"] > FEW_TOKENS:
            yield Aim(f"dispatch + combine, {_OVER}", shape, _over(functional, ours), 2.0)
            dispatch = times.get(f"{SYMMETRIC} {DISPATCH}")
            yield Aim("dispatch over the link", shape, _over(times.get(LINK), dispatch), 0.7, 0.85)
        if record["what"] == BLOCK and shape == MAIN:
            of_pass = record["pass"]
            yield Aim(f"block {of_pass}, {_OVER}", shape, _over(functional, ours), 1.2)
            if of_pass == BOTH:
                reached = _over(times.get(ONE_GPU), ours)
                yield Aim(f"{of_pass} TF/s over one GPU", shape, reached, 0.75, 0.85)


def _over(theirs: float | None, ours: float | None) -> float | None:
    return None if theirs is None or ours is None else theirs / ours

# SPDX-License-Identifier: Apache-2.0
"""What expert parallelism has to reach, and what a run's records say of it."""

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
    FUNCTIONAL,
    LINK,
    MAIN,
    ONE_GPU,
    SYMMETRIC,
)


class Aim(NamedTuple):
    """A ratio, what it is to reach at least, and what would be better; None: it was not measured."""

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
        return f"{told}{self.reached:.2f} {said} (must {self.must}{goal})"


def aims(records: list[dict[str, Any]]) -> Iterator[Aim]:
    """Yield every aim, in the order of the records."""
    for record in records:
        shape = record["shape"]
        times = {name: middle for name, (_, middle, _) in record["milliseconds"].items()}
        ours = times.get(SYMMETRIC)
        functional = min((times[n] for n in (FUNCTIONAL, EXACT) if n in times), default=None)
        if record["what"] == EXCHANGE and record["T"] > FEW_TOKENS:
            yield Aim("dispatch + combine over functional", shape, _over(functional, ours), 2.0)
            dispatch = times.get(f"{SYMMETRIC} {DISPATCH}")
            yield Aim("dispatch over the link", shape, _over(times.get(LINK), dispatch), 0.7, 0.85)
        if record["what"] == BLOCK and shape == MAIN:
            of_pass = record["pass"]
            yield Aim(f"block {of_pass} over functional", shape, _over(functional, ours), 1.2)
            if of_pass == BOTH:
                reached = _over(times.get(ONE_GPU), ours)
                yield Aim(f"{of_pass} TF/s over one GPU", shape, reached, 0.75, 0.85)


def _over(theirs: float | None, ours: float | None) -> float | None:
    return None if theirs is None or ours is None else theirs / ours

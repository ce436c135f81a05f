# SPDX-License-Identifier: Apache-2.0
"""Take the rates from one shape of a run, and judge the computed times of the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks.expert_parallel.costs import Costs, Layout, Machine, Rates, rate_of_experts
from benchmarks.expert_parallel.records import (
    BLOCK,
    BOTH,
    COMBINE,
    DISPATCH,
    EXCHANGE,
    EXPERTS,
    FEW_TOKENS,
    FORWARD,
    FUNCTIONAL,
    LINK,
    SYMMETRIC,
)
from benchmarks.suite import NAMED, SUITE, Shape

Record = dict[str, Any]
SHAPES = {shape.name: shape for shape in (*SUITE, *NAMED)}
WITHIN = 0.2
# The transport that is judged: the first that a run has. The second sends its padding too.
TRANSPORTS = (SYMMETRIC, FUNCTIONAL)


class Case(NamedTuple):
    """A prediction beside its measurement, in seconds."""

    shape: str
    what: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


class Measured:
    """The times of a shape on a transport, in seconds."""

    def __init__(self, records: list[Record], shape: str) -> None:
        of_shape = [record for record in records if record["shape"] == shape]
        few, full = (
            next(r for r in of_shape if r["what"] == EXCHANGE and (r["T"] <= FEW_TOKENS) == is_few)
            for is_few in (True, False)
        )
        blocks = {r["pass"]: r for r in of_shape if r["what"] == BLOCK}
        self.transport = next(t for t in TRANSPORTS if t in full["milliseconds"])
        self.world_size, self.num_tokens = full["W"], full["T"]
        # A copy takes a time to start, which is no matter of its bytes.
        sent = full["bytes"][DISPATCH] - few["bytes"][DISPATCH]
        self.link_bandwidth = sent / (_seconds(full, LINK) - _seconds(few, LINK))
        self.overhead, self.exchange = (
            {part: _seconds(r, f"{self.transport} {part}") for part in (DISPATCH, COMBINE)}
            for r in (few, full)
        )
        self.block = {name: _seconds(r, self.transport) for name, r in blocks.items()}
        self.experts = {name: _seconds(r, EXPERTS) for name, r in blocks.items()}

    def layout(self, shape: Shape) -> Layout:
        shape = replace(shape, num_tokens=self.num_tokens)
        # Ranks of one host alone are measured.
        padded = self.transport != TRANSPORTS[0]
        return Layout(shape, self.world_size, self.world_size, padded)


def _seconds(record: Record, name: str) -> float:
    return record["milliseconds"][name][1] / 1e3


def calibrate(measured: Measured, shape: Shape, machine: Machine) -> tuple[Machine, Rates]:
    """The machine with the link that was measured, and the rates of this shape.

    They give this shape's times, unless an exchange took less than its parts one after the other.
    """
    layout = measured.layout(shape)
    machine = replace(machine, host_size=layout.host_size, within=measured.link_bandwidth)
    # Of these, local and link times do not depend on the rates.
    costs = Costs(layout, machine, Rates(1, 1, 0, 0, 1, 1))
    shares = {}
    for part in (DISPATCH, COMBINE):
        is_dispatch = part == DISPATCH
        left = measured.exchange[part] - measured.overhead[part] - costs.local_seconds(is_dispatch)
        if left <= 0:
            raise ValueError(
                f"{shape.name}: expected {part} to take longer than its overhead and its copies, "
                f"got {measured.exchange[part] * 1e6:.0f} us; calibrate on a larger shape"
            )
        # Copies may hide behind the link, but nothing is faster than it.
        shares[part] = min(costs.link_seconds(is_dispatch) / left, 1.0)
    speeds = [
        rate_of_experts(layout, machine, name == BOTH, measured.experts[name])
        for name in (FORWARD, BOTH)
    ]
    return machine, Rates(*shares.values(), *measured.overhead.values(), *speeds)


def judge(
    records: list[Record],
    calibrated_on: str,
    machine: Machine,
    rates_of: list[Record] | None = None,
) -> Iterator[Case]:
    """Every time of the other shapes, and the blocks of the calibrated one, computed and measured.

    rates_of: another run, which gives the rates; then every time is judged.
    """
    given = Measured(rates_of or records, calibrated_on)
    machine, rates = calibrate(given, SHAPES[calibrated_on], machine)
    for name in dict.fromkeys(record["shape"] for record in records):
        measured = Measured(records, name)
        costs = Costs(measured.layout(SHAPES[name]), machine, rates)
        if rates_of or name != calibrated_on:
            yield Case(name, DISPATCH, costs.dispatch, measured.exchange[DISPATCH])
            yield Case(name, COMBINE, costs.combine, measured.exchange[COMBINE])
        for of_pass, seconds in measured.block.items():
            yield Case(name, f"block {of_pass}", costs.block(of_pass == BOTH), seconds)

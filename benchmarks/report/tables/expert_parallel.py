# SPDX-License-Identifier: Apache-2.0
"""The tables of experts spread over ranks."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.expert_parallel.acceptance import aims, told_number
from benchmarks.expert_parallel.records import (
    BLOCK,
    COMBINE,
    DISPATCH,
    EXACT,
    EXCHANGE,
    FUNCTIONAL,
    LINK,
    SYMMETRIC,
)
from benchmarks.report.columns import Column, Record, Table, at, keys, spread
from benchmarks.report.records import where


def _ways(cases: list[Record]) -> Iterator[Record]:
    """Make a record of each way of an exchange: its parts, and the link's copy."""
    for case in where(what=EXCHANGE)(cases):
        times = case["milliseconds"]
        for way in (SYMMETRIC, FUNCTIONAL, EXACT):
            if way not in times:
                continue
            parts = {part: f"{way} {part}" for part in (DISPATCH, COMBINE)}
            yield {
                **case,
                "way": way,
                "both": times[way][1],
                "over ours": case["ratio"].get(way),
                "over link": case["ratio"].get(f"link / {way}"),
                "us": {part: times[name][1] for part, name in parts.items()},
                "speed": {part: case["gbs"][name] for part, name in parts.items()},
            }


def _blocks(cases: list[Record]) -> Iterator[Record]:
    """Make a record of each way of a block."""
    for case in where(what=BLOCK)(cases):
        ours = next(iter(case["milliseconds"]), None)
        for way, (_, middle, _) in case["milliseconds"].items():
            name = way.removeprefix(f"{ours} ")
            share = case.get("communication") if way == ours else None
            ratio = case["ratio"].get(name)
            yield {**case, "way": way, "us": middle, "over ours": ratio, "share": share}


def _aims(cases: list[Record]) -> Iterator[Record]:
    for aim in aims(cases):
        yield aim._asdict()


def _us(milliseconds: float) -> str:
    return f"{milliseconds * 1e3:.0f}"


EXCHANGES = Table(
    about=(
        "us to dispatch T tokens of each of W ranks, to combine them, and both; GB/s of the bytes that "
        "cross a rank's link, filled rows alone; a copy of as many bytes to a peer over the dispatch; "
        "the way's time over that of ours, the first. The slowest rank counts."
    ),
    rows=_ways,
    columns=(
        *keys("shape", "W", "T", "way"),
        Column(DISPATCH, at("us", DISPATCH), _us),
        Column("GB/s", at("speed", DISPATCH), ".0f"),
        Column(COMBINE, at("us", COMBINE), _us),
        Column("GB/s", at("speed", COMBINE), ".0f"),
        Column("both", "both", _us),
        Column("copy's GB/s", at("gbs", LINK), ".0f"),
        Column("of the copy", "over link", spread),
        Column("over ours", "over ours", spread),
    ),
)

BLOCKS = Table(
    about=(
        "The block without its router, T tokens a rank: us, TF/s of a GPU (6 T K H I in forward, twice "
        "that in backward), the way's time over that of ours, and the share of dispatch and combine."
    ),
    rows=_blocks,
    columns=(
        *keys("shape", "W", "T", "pass", "way"),
        Column("us", "us", _us),
        Column("TF/s", lambda case: case["tflops"][case["way"]], ".0f"),
        Column("over ours", "over ours", spread),
        Column("communication", "share", ".0%"),
    ),
)

AIMS = Table(
    about="What is to be reached, with the symmetric transport: ratios, or TF/s.",
    rows=_aims,
    skip_empty=True,
    columns=(
        *keys("shape", "what"),
        Column("reached", "reached", told_number),
        Column("must", "must", told_number),
        Column("goal", "goal", told_number),
    ),
)

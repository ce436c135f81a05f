# SPDX-License-Identifier: Apache-2.0
"""The figures on README's first screen are those of the committed results."""

import re
import statistics
from collections.abc import Iterable
from typing import Any

import pytest

from benchmarks.report.cards import BOTH, FORWARD
from benchmarks.report.records import own
from benchmarks.report.results import cuda_results
from testing.pages import ROOT

Case = dict[str, Any]
PARTS = cuda_results(ROOT / "benchmarks" / "results")["h200"]
SUITE, SWEEP = own(PARTS["experts"]["cases"]), PARTS["sweep"]["cases"]
UNIFORM = [case for case in SUITE if case["routing"] == "uniform"]
PEERS = PARTS["experts-peers"]["cases"]
SONICMOE = [case for case in PEERS if case["peer"] == "sonicmoe"]
WORDS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def ratios(cases: Iterable[Case], name: str, peer: str = "compiled") -> list[float]:
    """Return the medians of the other's time over ours in one pass. A wrong result has none."""
    measured = [case["ratio"] for case in cases if case["pass"] == name and "ratio" in case]
    return [ratio[peer][1] for ratio in measured if peer in ratio]


def told(found: list[float]) -> str:
    return f"{min(found):.2f} to {max(found):.2f}x"


def number_of_shapes(cases: Iterable[Case]) -> int:
    return len({(case["shape"], case.get("routing")) for case in cases})


def says() -> dict[str, str]:
    """By what it is about, each piece of text that README must have."""
    suite, sweep = ratios(UNIFORM, BOTH), ratios(SWEEP, BOTH)
    forward, both = (ratios(SONICMOE, name, "sonicmoe") for name in (FORWARD, BOTH))
    (tuned_forward,), (tuned_both,) = (
        ratios(PEERS, name, "sonicmoe autotuned") for name in (FORWARD, BOTH)
    )
    versions = PARTS["experts-peers"]["environment"]["present"]
    scattermoe, liger = (ratios(PEERS, BOTH, peer) for peer in ("scattermoe", "liger"))
    others = " or ".join(WORDS[n] for n in sorted({len(scattermoe), len(liger)}))
    tuned, theirs = number_of_shapes(UNIFORM), number_of_shapes(SONICMOE)
    share = "all" if theirs == tuned else WORDS[theirs]
    return {
        "the number of tuned shapes": f"The first {WORDS[tuned]} shapes are those",
        "the suite": f"a forward with its backward is {told(suite)} as fast",
        "the number of drawn shapes": f"On {number_of_shapes(SWEEP)} shapes drawn at random",
        "the sweep": f"it is {told(sweep)} as fast",
        "the sweep's mean": f"{statistics.geometric_mean(sweep):.3f}x in the geometric mean",
        "SonicMoE's version": f"{versions['sonicmoe']} in its default configurations",
        "the number of SonicMoE's shapes": f"on {share} of the first {WORDS[tuned]} shapes",
        "SonicMoE": f"{told(forward)} our time in forward and {told(both)} with the backward",
        "SonicMoE, autotuned": f"took ten minutes, {tuned_forward:.2f} and {tuned_both:.2f}x.",
        "scattermoe": f"scattermoe {versions['scattermoe']} takes {told(scattermoe)} our time",
        "Liger": f"Liger {versions['liger']} {told(liger)}",
        "the number of their shapes": f"each on {others} of them",
    }


@pytest.mark.parametrize("what", says())
def test_readme_tells_what_was_measured(what):
    """After a new measurement this fails, and says what README has to say."""
    readme = re.sub(r"\s+", " ", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert says()[what] in readme, f'README.md on {what}: expected "{says()[what]}"'

# SPDX-License-Identifier: Apache-2.0
"""The part that compares a width with the next one that is a multiple of 8, on a CPU."""

import math

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import suite
from benchmarks.cuda import widths
from benchmarks.cuda.experts import PASSES, Comparison
from benchmarks.cuda.timing import OURS, Bench
from benchmarks.suite import Shape

CEILINGS = {"dense_tflops": 790.0, "copy_tbs": 4.3, "read_tbs": 4.4}


def bench():
    return Bench(torch.device("cpu"), True, seconds=0.0, least_turns=2, ceilings=CEILINGS)


def test_a_width_stands_beside_the_next():
    torch.manual_seed(0)
    ((_, run),) = widths.cases(bench(), [])
    records = list(run())
    assert [record["pass"] for record in records] == list(PASSES)
    for record in records:
        assert "wrong" not in record, record
        assert (record["H"], record["next_H"], record["I"], record["next_I"]) == (31, 32, 17, 24)
        assert set(record["milliseconds"]) == {OURS, widths.NEXT}


def test_what_is_wrong_is_not_timed(monkeypatch):
    class Wrong(Comparison):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            if widths.NEXT in self.implementations:
                self.errors[PASSES[0]][widths.NEXT] = math.nan

    monkeypatch.setattr(widths, "Comparison", Wrong)
    forward, both = widths.run_widths(bench(), suite.TINY_WIDTHS[0])
    assert forward["wrong"] == [widths.NEXT]
    assert forward["ratio"] == {}
    assert set(both["ratio"]) == {widths.NEXT}


def test_every_shape_has_a_width_that_tma_cannot_describe():
    for shape in (*suite.WIDTHS, *suite.TINY_WIDTHS):
        following = widths.next_widths(shape)
        assert following != shape
        for width, rounded in (
            (shape.hidden_size, following.hidden_size),
            (shape.intermediate_size, following.intermediate_size),
        ):
            assert rounded % 8 == 0
            assert 0 <= rounded - width < 8
    assert widths.next_widths(Shape("", 1, 8, 16, 1, 1)) == Shape("", 1, 8, 16, 1, 1)

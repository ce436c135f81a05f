# SPDX-License-Identifier: Apache-2.0
"""The benchmark of quantised experts: its flow on a CPU, and that wrong results have no ratio."""

import json

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import suite
from benchmarks.cuda import quantised
from benchmarks.cuda.__main__ import BY_NAME, PARTS, QUANTISED, run_part
from benchmarks.cuda.timing import OURS, Bench
from benchmarks.report.columns import markdown
from benchmarks.report.tables import TABLES
from moe_ops.quantization.formats import FORMATS

TABLES_OF = ("lora", "decode", "dequantise", "stack")
CEILINGS = {"dense_tflops": 790.0, "copy_tbs": 4.3, "read_tbs": 4.0}


def bench():
    return Bench(torch.device("cpu"), tiny=True, seconds=0.0, least_turns=2, ceilings=CEILINGS)


def test_tiny_run():
    torch.manual_seed(0)
    records, missing = run_part(PARTS[QUANTISED](bench(), []), float("inf"))
    assert missing == {}
    json.dumps(records, allow_nan=False)
    found = [(record["what"], record["format"]) for record in records]
    expected = [("dequantise", f) for f in FORMATS for _ in suite.PROJECTIONS]
    expected += [("lora", f) for f in FORMATS for _ in ("forward", "both")]
    expected += [("decode", f) for f in FORMATS]
    assert found == [*expected, ("stack", "nf4")]
    for record in records:
        assert "wrong" not in record, record
        if record["what"] in ("lora", "decode"):
            assert set(record["ratio"]) == {quantised.BF16}
    assert records[-1]["losses"][1] < records[-1]["losses"][0]
    assert records[-1]["tokens_per_second"] > 0
    # Each record is a row of one table.
    rows = {
        table: [line for line in markdown(table, records) if line.startswith("| tiny")]
        for table in TABLES[QUANTISED]
    }
    counts = [sum(record["what"] == what for record in records) for what in TABLES_OF]
    assert [len(lines) for lines in rows.values()] == counts
    ours, theirs = records[len(FORMATS) * 2]["milliseconds"].values()
    assert f"| {ours[1]:.2f} | {theirs[1]:.2f} |" in next(iter(rows.values()))[0]


def test_it_runs_by_name_alone():
    assert QUANTISED in BY_NAME


def test_bounds_are_of_the_bytes_that_are_moved():
    shape = suite.TINY_SUITE[0]
    torch.manual_seed(0)
    *_, both = quantised.run_lora(bench(), shape, "nf4")
    weights = [quantised.quantised(bench(), shape, p, "nf4") for p in suite.PROJECTIONS]
    moved = sum(weight.nbytes + 2 * weight.shape.numel() for weight in weights)
    assert both["bytes"] == 2 * moved
    assert both["bound_milliseconds"] == pytest.approx(2 * moved / 4.3e9, rel=1e-2)


def test_a_wrong_decoder_has_no_ratio(monkeypatch):
    torch.manual_seed(0)
    values_of = quantised.values_of
    monkeypatch.setattr(quantised, "values_of", lambda *given: values_of(*given) * 1.5)
    (record,) = quantised.run_decode(bench(), suite.TINY_SUITE[0], "int4")
    assert record["wrong"] == [OURS]
    assert record["ratio"] == {}

# SPDX-License-Identifier: Apache-2.0
"""The comparison of losses trains the same adapters on every base."""

import json
import sys

import pytest

pytest.importorskip("peft", reason="the peft extra is not installed")

import compare_formats
from moe_ops.quantization.formats import FORMATS
from training import text as texts


@pytest.mark.slow
def test_compares_every_format(no_network, monkeypatch, tmp_path, capsys):
    figures, plot = tmp_path / "losses.json", tmp_path / "losses.png"
    arguments = ["--steps", "2", "--base-steps", "1", "--json", figures, "--plot", plot]
    monkeypatch.setattr(sys, "argv", ["compare_formats.py", *map(str, arguments)])
    monkeypatch.setattr(texts, "NUM_HELDOUT_WINDOWS", 16)
    # As many steps as are drawn in one point.
    monkeypatch.setattr(compare_formats, "SMOOTHING", 2)
    compare_formats.main()
    bases = json.loads(figures.read_text())["bases"]
    assert list(bases) == ["bfloat16", "bfloat16, another seed", *FORMATS]
    # The same adapters and the same batch. Only the values of the experts differ.
    first = [bases[name]["train"][0] for name in ("bfloat16", *FORMATS)]
    assert max(first) - min(first) < 0.05
    assert len(set(first)) == len(first)
    assert all(len(base["train"]) == 2 for base in bases.values())
    assert plot.stat().st_size > 1000
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(bases)

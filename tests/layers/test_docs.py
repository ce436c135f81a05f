# SPDX-License-Identifier: Apache-2.0
"""The code of docs/layers.md runs, and its table of models is the code's."""

import functools
from types import SimpleNamespace

import pytest
import torch

from moe_ops.layers import MoE
from testing.pages import DOCS, has_only_python_blocks, run_python_blocks

PAGE = DOCS / "layers.md"


def test_every_code_block_runs(monkeypatch):
    pytest.importorskip("transformers", reason="the transformers extra is not installed")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    # tests/layers/test_moe.py compiles with Inductor. The page need not do so again.
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(compile_, backend="aot_eager"))
    assert has_only_python_blocks(PAGE)
    run_python_blocks(PAGE)


def test_table_lists_the_known_models():
    table = PAGE.read_text(encoding="utf-8").partition("| model_type |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    listed = {name.strip() for row in rows for name in row.split(",")}
    with pytest.raises(ValueError, match="to be one of") as error:
        MoE.from_config(SimpleNamespace(model_type=None))
    known = str(error.value).partition("one of ")[2].partition(", got")[0]
    assert listed == set(known.split(", "))

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from moe_ops.configs import cache
from moe_ops.configs.kernel_config import PASSES
from testing.pages import DOCS, run_python_blocks

PAGE = DOCS / "tuning.md"


@pytest.mark.slow
def test_every_code_block_runs(capsys, monkeypatch):
    """They run as on a machine without a GPU."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run_python_blocks(PAGE)
    assert capsys.readouterr().out == f"{cache.directory()}\n"


def test_every_field_is_explained():
    text = PAGE.read_text(encoding="utf-8")
    for config in PASSES.values():
        assert [name for name in config().to_dict() if f"`{name}`" not in text] == []

# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

import pytest
import torch

from moe_ops.configs import cache
from moe_ops.configs.kernel_config import PASSES

PAGE = Path(__file__).parents[2] / "docs" / "tuning.md"
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_every_code_block_runs(capsys, monkeypatch):
    """In order, in one namespace, as a reader would paste them who has no GPU."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    namespace: dict[str, object] = {}
    text = PAGE.read_text(encoding="utf-8")
    for block in PYTHON_BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(PAGE), "exec"), namespace)
    assert capsys.readouterr().out == f"{cache.directory()}\n"


def test_every_field_is_explained():
    text = PAGE.read_text(encoding="utf-8")
    for config in PASSES.values():
        assert [name for name in config().to_dict() if f"`{name}`" not in text] == []

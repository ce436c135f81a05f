# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_every_code_block_runs(tmp_path, monkeypatch):
    """In order, in one namespace, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = PAGE.read_text(encoding="utf-8")
    blocks = list(PYTHON_BLOCK.finditer(text))
    assert len(blocks) == text.count("```") // 2, "a block that is not run"
    namespace: dict[str, object] = {}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(PAGE), "exec"), namespace)

# SPDX-License-Identifier: Apache-2.0
"""Runs the Python blocks of a documentation page."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
_PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_python_blocks(page: Path) -> dict[str, object]:
    """Run them in order in one namespace, as a reader would paste them, and return the namespace.

    An error's traceback names the line of the page.
    """
    text = page.read_text(encoding="utf-8")
    blocks = list(_PYTHON_BLOCK.finditer(text))
    assert blocks, f"{page} has no Python block"
    namespace: dict[str, object] = {}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(page), "exec"), namespace)
    return namespace


def has_only_python_blocks(page: Path) -> bool:
    """Return whether run_python_blocks runs every fenced block of the page."""
    text = page.read_text(encoding="utf-8")
    return len(_PYTHON_BLOCK.findall(text)) == text.count("```") // 2

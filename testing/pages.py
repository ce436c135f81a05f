# SPDX-License-Identifier: Apache-2.0
"""Runs the Python blocks of a documentation page.

A block that cannot run in the tests has a line before it that says why, which readers do not see:

    <!-- not run: downloads 60 GB -->
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>.+?) -->\n+)?^```python\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """One Python block.

    Attributes:
        line: the number of lines above its code.
        code: its text.
        why: the reason why it is not run, or None.
    """

    line: int
    code: str
    why: str | None


def python_blocks(page: Path) -> Iterator[Block]:
    """Yield the Python blocks of a page in order."""
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        yield Block(text.count("\n", 0, match.start("code")), match["code"], match["why"])


def pages_with_python() -> list[Path]:
    """Return the pages of docs/ and of the root that have Python blocks."""
    pages = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
    return [page for page in pages if any(python_blocks(page))]


def run_python_blocks(page: Path) -> dict[str, object]:
    """Run them in order in one namespace, as a reader would paste them, and return the namespace.

    An error's traceback names the line of the page.
    """
    blocks = [block for block in python_blocks(page) if block.why is None]
    assert blocks, f"{page} has no Python block to run"
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)
    return namespace


def has_only_python_blocks(page: Path) -> bool:
    """Return whether every fenced block of the page is Python."""
    text = page.read_text(encoding="utf-8")
    return len(list(python_blocks(page))) == text.count("```") // 2

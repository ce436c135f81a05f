# SPDX-License-Identifier: Apache-2.0
"""The table of points in docs/unsloth.md names tests that exist, and has a row for each point."""

import re
from pathlib import Path

from testing.pages import DOCS

ROOT = DOCS.parent
NAMED = re.compile(r"(tests/[\w/]+(?:\.py)?)|::(\w+)")
TABLE = (DOCS / "unsloth.md").read_text(encoding="utf-8").partition("| point | what |")[2]
ROWS = [
    [cell.strip() for cell in line.split("|")[1:-1]]
    for line in TABLE.splitlines()
    if re.match(r"\| *[\d-]", line) and not line.startswith("| ---")
]


def test_every_point_has_a_row():
    assert {row[0] for row in ROWS} - {"-"} == {str(point) for point in range(1, 28)}


def test_every_named_test_exists():
    missing = []
    for *_, shown_by in ROWS:
        file: Path | None = None
        for path, function in NAMED.findall(shown_by):
            file = ROOT / path if path else file
            assert file is not None, shown_by
            if not file.exists():
                missing.append(path)
            elif function and f"def {function}(" not in file.read_text(encoding="utf-8"):
                missing.append(f"{file.relative_to(ROOT)}::{function}")
    assert not missing

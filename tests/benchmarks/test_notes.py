# SPDX-License-Identifier: Apache-2.0
"""The links of docs/notes and docs/performance.md work, and the files that they name exist."""

import re

from testing.pages import DOCS

ROOT = DOCS.parent
NOTES = DOCS / "notes"
PAGES = sorted(NOTES.glob("*.md"))


def test_links_lead_somewhere():
    found, broken = 0, []
    for page in [DOCS / "performance.md", *PAGES]:
        links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
        broken += [(page.name, link) for link in links if not (page.parent / link).exists()]
        found += len(links)
    assert found > 10
    assert broken == []


def test_files_that_are_named_exist():
    folders = [ROOT / "src" / "moe_ops", ROOT / "benchmarks", ROOT / "tests"]
    known = [str(path) for folder in folders for path in folder.rglob("*")]
    found, missing = 0, []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"\b[\w/]+\.(?:py|json)\b|\b(?:src|configs)/[\w/]+\w", text)
        missing += [
            (page.name, name)
            for name in named
            if not any(path.endswith(f"/{name}") for path in known)
        ]
        found += len(named)
    assert found > 10
    assert missing == []


def test_the_index_lists_every_page():
    index = (NOTES / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| \[(\w+\.md)\]\(\1\)", index, re.MULTILINE))
    assert listed == {page.name for page in PAGES} - {"README.md"}

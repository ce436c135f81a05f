# SPDX-License-Identifier: Apache-2.0
"""Every Python block of README and docs is run by a test, or says why it is not."""

import functools
import re
from pathlib import Path

import pytest
import torch

from moe_ops import cli
from testing.pages import DOCS, ROOT, pages_with_python, python_blocks, run_python_blocks

# How a test names a page: DOCS, a slash, and the quoted name; a folder's name likewise before it.
NAMED = re.compile(r'\b(ROOT|DOCS)((?: / "[^"]+")+)')


def test_every_page_is_run():
    """A test that runs pages names their paths."""
    tests = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    runs = [text for text in tests if "run_python_blocks(" in text]
    named = {
        {"ROOT": ROOT, "DOCS": DOCS}[base].joinpath(*re.findall(r'"([^"]+)"', parts))
        for text in runs
        for base, parts in NAMED.findall(text)
    }
    pages = {
        page
        for page in pages_with_python()
        if any(block.why is None for block in python_blocks(page))
    }
    assert {"README.md", "start.md", "lora.md"} <= {page.name for page in pages}
    assert pages - named == set()


def test_marks_that_are_read():
    """A mark that is written in another way would leave its block running, or would mark nothing."""
    for page in pages_with_python():
        marks = len(re.findall("not run:", page.read_text(encoding="utf-8")))
        assert marks == sum(block.why is not None for block in python_blocks(page)), page


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", DOCS / "start.md"], ids=lambda page: page.name
)
def test_page_runs(page: Path, monkeypatch):
    # The ops compile with Inductor in tests/core. A page need not do so again.
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(compile_, backend="aot_eager"))
    torch.manual_seed(0)
    run_python_blocks(page)


def test_blocks_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n```python\nx = 1\n```\n\n"
        "<!-- not run: needs a GPU -->\n\n```python\nx = 2\n```\n\n```\nx = 3\n```\n"
    )
    assert [(block.line, block.code, block.why) for block in python_blocks(page)] == [
        (3, "x = 1\n", None),
        (9, "x = 2\n", "needs a GPU"),
    ]
    assert run_python_blocks(page)["x"] == 1


def test_links_of_the_readme_lead_somewhere():
    """`make site` checks those of the other pages. README is no page of the site."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text)
    assert ("docs/scaling.md", "transports") in links
    for name, anchor in links:
        assert (ROOT / name).exists(), name
        if anchor:
            page = (ROOT / name).read_text(encoding="utf-8")
            headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", heading).lower() for heading in headings]
            assert anchor in [slug.replace(" ", "-") for slug in slugs], f"{name}#{anchor}"


def test_commands_that_pages_name_exist(capsys):
    pages = [
        path for path in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")] if path.name != "CHANGELOG.md"
    ]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z][\w-]+)", text, re.MULTILINE))
    assert {"demo", "test", "docs"} <= named
    assert named <= targets
    modules = set(re.findall(r"python -m (benchmarks[\w.]*)", text))
    assert "benchmarks.report" in modules
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    commands = set(re.findall(r"python -m moe_ops ([a-z]+)", text))
    assert cli.main([]) == 0
    assert commands == set(re.findall(r"^    ([a-z]+) ", capsys.readouterr().out, re.MULTILINE))

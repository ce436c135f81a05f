# SPDX-License-Identifier: Apache-2.0
"""Settings of the documentation site; `make docs` builds it in build/site."""

import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

import moe_ops  # noqa: E402
from docs import docstrings  # noqa: E402

project = "moe_ops"
author = "the authors of moe_ops"
release = moe_ops.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
templates_path: list[str] = []
# `make docs` tells what a page is made from. Each page stands where GitHub shows it too.
exclude_patterns = ["_static"]

html_theme = "furo"
html_title = f"moe_ops {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

myst_heading_anchors = 4
myst_links_external_new_tab = True
# Pygments has no lexer for the shell's and the schemas' placeholders, and none is needed.
highlight_language = "text"

maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}

nitpicky = True
# Types of other projects. Their inventories are on the network, and a build fetches nothing.
nitpick_ignore_regex = [
    (r"py:.*", r"Tensor|(torch|transformers|peft|collections|typing|types|pathlib|datetime)\..*"),
    # Our own types that annotations name and no page describes.
    (r"py:.*", r"moe_ops\..*\.(Packed|KernelConfig|Activation)"),
]

# Pages of the repository's root, and the pages here that show them.
ROOT_PAGES = {"CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog"}


def show_root_pages(_app: Any, docname: str, source: list[str]) -> None:
    """Put the root's pages in the place of their stand-ins, and lead links to the stand-ins."""
    for name, page in ROOT_PAGES.items():
        if docname == page:
            text = (DOCS.parent / name).read_text(encoding="utf-8")
            source[0] = re.sub(r"\]\((?:docs/)?", "](", text)
        up = "../" * docname.count("/")
        for there in (name, f"{up}../{name}"):
            source[0] = source[0].replace(f"]({there}", f"]({up}{page}.md")


# The pages that stand below a page in the sidebar.
BELOW = {"ops/README": "*", "notes/README": "*", "performance": "results/*"}


def list_the_folder(_app: Any, docname: str, source: list[str]) -> None:
    """Append the hidden list of the pages below a page; GitHub's readers need none."""
    if pages := BELOW.get(docname):
        source[0] += f"\n```{{toctree}}\n:hidden:\n:glob:\n\n{pages}\n```\n"


def setup(app: Any) -> None:
    """Register what Sphinx calls."""
    app.connect("source-read", show_root_pages)
    app.connect("source-read", list_the_folder)
    app.connect("autodoc-process-docstring", docstrings.process)

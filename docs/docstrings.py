# SPDX-License-Identifier: Apache-2.0
"""Turns our docstrings into reStructuredText for Sphinx.

Our docstrings are plain text: code between single backticks, indented equations, and sections of
Google's style. reStructuredText would read a name such as `tune_` as a link, and `a * b` as the
begin of emphasis.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

SECTIONS = ("Args", "Attributes", "Raises", "Returns", "Yields")
_SECTION = re.compile(rf"({'|'.join(SECTIONS)}):")
# "name (what): meaning"; the what may hold parentheses, as the shapes of tensors do.
_ITEM = re.compile(r"([\w*., ]+?)(?: \((.*?)\))?: (.*)", re.DOTALL)
_LIST = re.compile(r"[-*] ")


def restructured(lines: list[str]) -> list[str]:
    """Return the lines of a docstring, whose indentation is already taken off, as RST."""
    out: list[str] = []
    for block in _blocks(lines):
        section = _SECTION.fullmatch(block[0])
        if section:
            out += [f"**{section[1]}**", "", *_items(block[1:])]
        elif block[0].startswith(" ") and not _LIST.match(block[0].lstrip()):
            out += ["::", "", *(f"    {line}" for line in block)]
        else:
            out += _paragraph(block)
        out.append("")
    return out


def _paragraph(block: list[str]) -> list[str]:
    """Return a paragraph or a list, and as a list what stands indented below a paragraph."""
    if any(_LIST.match(line.lstrip()) for line in block):
        return [_text(line) for line in block]
    head = [line for line in block if not line.startswith(" ")]
    items = list(_items(block[len(head) :]))
    return [*map(_text, head), *([""] if items else []), *items]


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Yield what blank lines separate. A section is one block, blank lines in it left out."""
    block: list[str] = []
    for line in lines:
        in_section = bool(block) and _SECTION.fullmatch(block[0]) is not None
        ends = (bool(line) and not line.startswith(" ")) if in_section else not line
        if block and (ends or _SECTION.fullmatch(line)):
            yield block
            block = []
        if line:
            block.append(line)
    if block:
        yield block


def _items(lines: list[str]) -> Iterator[str]:
    """Yield a list of a section's entries, one for each line that is indented least."""
    indent = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    entries: list[str] = []
    for line in lines:
        if line[indent : indent + 1] == " " and entries:
            entries[-1] += f" {line.strip()}"
        else:
            entries.append(line.strip())
    for entry in entries:
        item = _ITEM.fullmatch(entry)
        if item is None:
            yield f"* {_text(entry)}"
            continue
        what = f" ({_text(item[2])})" if item[2] else ""
        yield f"* ``{item[1]}``{what}: {_text(item[3])}"


def _text(text: str) -> str:
    """Mark the code of a text, and escape what reStructuredText would read as marks."""
    indent = text[: len(text) - len(text.lstrip())]
    mark = _LIST.match(text.lstrip())
    start = indent + (mark[0] if mark else "")
    parts = re.split(r"`+([^`]+)`+", text[len(start) :])
    return start + "".join(
        f"``{part}``" if index % 2 else re.sub(r"([\\*_|])", r"\\\1", part)
        for index, part in enumerate(parts)
    )


def process(
    _app: Any, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]
) -> None:
    """Rewrite the lines in place, as Sphinx's event autodoc-process-docstring asks."""
    lines[:] = restructured(lines)

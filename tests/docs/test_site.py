# SPDX-License-Identifier: Apache-2.0
"""What the documentation site is made with: docstrings as RST, and the picture."""

import re
import xml.etree.ElementTree as ET

import torch

import moe_ops
from docs import picture
from docs.docstrings import restructured
from testing.pages import DOCS


def test_the_api_page_has_every_public_name():
    listed = re.findall(
        r"^\.\. auto(?:function|class):: moe_ops\.(\w+)$",
        (DOCS / "api.md").read_text(),
        re.MULTILINE,
    )
    assert set(listed) == set(moe_ops.__all__)


def test_sections_become_lists():
    docstring = """Compute a thing.

    y = a * b

Letters: T num_tokens.

Args:
    input_ (Tensor (T, H), float): Rows of `x_`,
        in order.
    top_k: Slots.

Returns:
    Something else.
Source: a paper."""
    assert restructured(docstring.splitlines()) == [
        "Compute a thing.",
        "",
        "::",
        "",
        "        y = a * b",
        "",
        "Letters: T num\\_tokens.",
        "",
        "**Args**",
        "",
        "* ``input_`` (Tensor (T, H), float): Rows of ``x_``, in order.",
        "* ``top_k``: Slots.",
        "",
        "**Returns**",
        "",
        "* Something else.",
        "",
        "Source: a paper.",
        "",
    ]


def test_a_list_under_a_paragraph():
    assert restructured(["Parameters:", "    weight (E, H).", "", "- one", "  more"]) == [
        "Parameters:",
        "",
        "* weight (E, H).",
        "",
        "- one",
        "  more",
        "",
    ]


def test_the_picture_shows_what_the_op_computes():
    topk_ids = torch.tensor(picture.TOPK_IDS)
    token_counts, gather_indices, _ = moe_ops.routing_indices(topk_ids, picture.NUM_EXPERTS)
    assert picture.gather_indices() == gather_indices.tolist()
    root = ET.fromstring(picture.picture())
    texts = ["".join(node.itertext()) for node in root.iter() if node.tag.endswith("}text")]
    assert [text for text in texts if text.endswith(" rows")] == [
        f"{count} rows" for count in token_counts.tolist()
    ]


def test_nothing_lies_outside_the_picture():
    root = ET.fromstring(picture.picture())
    boxes = [node for node in root.iter() if node.tag.endswith("}rect")]
    assert len(boxes) == 2 * len(picture.TOPK_IDS) * (1 + picture.TOP_K) + picture.NUM_EXPERTS
    for box in boxes:
        x, y, width, height = (float(box.attrib[key]) for key in ("x", "y", "width", "height"))
        assert min(x, y) >= 0
        assert x + width <= picture.LABELS
        assert y + height <= picture.HEIGHT

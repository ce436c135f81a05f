# SPDX-License-Identifier: Apache-2.0
"""The code of docs/quantised.md runs, and its table of formats is the code's."""

import json
import re

from moe_ops.quantization import quantize_weight
from moe_ops.quantization.formats import FORMATS
from testing.pages import DOCS, has_only_python_blocks, run_python_blocks

PAGE = DOCS / "quantised.md"


def test_every_code_block_runs():
    assert has_only_python_blocks(PAGE)
    run_python_blocks(PAGE)


def test_the_losses_are_the_committed_ones():
    """The table has them, and each format is nearer to bf16 than another seed is."""
    path = DOCS.parent / "demo" / "lora_formats.json"
    bases = json.loads(path.read_text(encoding="utf-8"))["bases"]
    text = PAGE.read_text(encoding="utf-8")
    for name, base in bases.items():
        assert f"| {name} | {base['heldout_before']:.3f} | {base['heldout_after']:.3f} |" in text
    plain = bases["bfloat16"]["heldout_after"]
    chance = abs(bases["bfloat16, another seed"]["heldout_after"] - plain)
    assert all(abs(bases[format]["heldout_after"] - plain) < chance for format in FORMATS)


def test_the_table_has_every_format():
    text = PAGE.read_text(encoding="utf-8")
    found = dict(re.findall(r"^\| `(\w+)` \| ([^|]*?) \|", text, re.MULTILINE))
    assert list(found) == list(FORMATS)
    docstring = quantize_weight.__doc__
    assert docstring is not None
    for format, bits in found.items():
        (row,) = (line for line in docstring.splitlines() if f"| `{format}`" in line)
        stated = row.split("|")[-2]
        assert re.findall(r"\d+\.\d+", bits) == re.findall(r"\d+\.\d+|\d+(?= or)", stated)

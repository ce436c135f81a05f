# SPDX-License-Identifier: Apache-2.0
"""A released op's schema may only gain defaults, and defaulted arguments at its end."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moe_ops._core.library import SCHEMAS

RELEASED = sorted((Path(__file__).parents[2] / "op_schemas" / "released").glob("*.yaml"))
CURRENT = {name: schema.schema for name, schema in SCHEMAS.items()}


def broken(released: dict[str, str], current: dict[str, str]) -> list[str]:
    """What a caller of the released ops would notice, one line an op; name -> schema string."""
    parse: Any = torch._C.parse_schema
    found = []
    for name, old in released.items():
        if name not in current:
            found.append(f"{name}: removed")
            continue
        new = current[name]
        parsed_old = parse(f"moe::{name}{old}")
        parsed_new = parse(f"moe::{name}{new}")
        # To the parser a SymInt is an int, but an op that takes ints compiles anew for every size.
        symbolic = re.findall(r"SymInt \w+", old)
        if not parsed_new.is_backward_compatible_with(parsed_old) or any(
            argument not in new for argument in symbolic
        ):
            found.append(f"{name}: {old} became {new}")
    return found


@pytest.mark.parametrize("file", RELEASED, ids=lambda file: file.stem)
def test_current_schemas_keep_what_was_released(file):
    released = yaml.safe_load(file.read_text())
    assert released
    assert broken(released, CURRENT) == []


def test_a_release_is_kept():
    """The parametrised test above would otherwise pass with nothing to compare."""
    assert RELEASED


def changed(name: str, old: str, new: str) -> dict[str, str]:
    assert old in CURRENT[name]
    return {**CURRENT, name: CURRENT[name].replace(old, new)}


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("permute", "Tensor gather_indices", "Tensor indices"),
        ("permute", "SymInt top_k", "int top_k"),
        ("permute", "Tensor gather_indices, SymInt top_k", "SymInt top_k, Tensor gather_indices"),
        ("permute", ", Tensor? scatter_indices=None", ""),
        ("permute", "SymInt top_k,", "SymInt top_k, bool strict,"),
        ("permute", "Tensor? scatter_indices=None", "Tensor scatter_indices"),
        ("permute", "-> Tensor", "-> (Tensor output, Tensor rows)"),
        ("unpermute", "top_k=1", "top_k=2"),
        ("unpermute", "SymInt top_k=1", "SymInt top_k"),
    ],
    ids=[
        "renamed", "no longer symbolic", "reordered", "removed", "new one required",
        "no longer optional", "another return", "another default", "default removed",
    ],
)  # fmt: skip
def test_a_breaking_change_is_found(name, old, new):
    after = changed(name, old, new)
    if new == "SymInt top_k":
        # An argument without a default cannot follow one with: the parser itself refuses.
        after[name] = after[name].replace("=None", "")
    assert broken(CURRENT, after) == [f"{name}: {CURRENT[name]} became {after[name]}"]


def test_a_removed_op_is_found():
    current = {name: schema for name, schema in CURRENT.items() if name != "permute"}
    assert broken(CURRENT, current) == ["permute: removed"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("scatter_indices=None)", "scatter_indices=None, bool strict=False)"),
        ("SymInt top_k,", "SymInt top_k=1,"),
    ],
    ids=["defaulted argument at the end", "new default"],
)
def test_a_compatible_change_is_none(old, new):
    assert broken(CURRENT, changed("permute", old, new)) == []

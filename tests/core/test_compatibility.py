# SPDX-License-Identifier: Apache-2.0
"""A released op's schema may only gain defaults, and defaulted arguments at its end.

Nothing is released yet, so the tests release a copy of the schemas themselves.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_ops._core.library import SCHEMAS
from moe_ops._core.schema import load_all
from testing.release import (
    ROOT,
    ReleaseError,
    broken,
    main,
    pending_version,
    problems,
    release,
    released_folder,
    releases,
)

CURRENT = {name: schema.schema for name, schema in SCHEMAS.items()}
PENDING = pending_version()


def test_current_schemas_keep_what_was_released():
    assert problems(SCHEMAS, releases()) == []


@pytest.fixture
def tree(tmp_path):
    """Copy the op schemas to a tree in which nothing is released."""
    (tmp_path / "src" / "moe_ops").mkdir(parents=True)
    shutil.copy(ROOT / "src" / "moe_ops" / "_version.py", tmp_path / "src" / "moe_ops")
    ignored = shutil.ignore_patterns("released", "__pycache__")
    shutil.copytree(ROOT / "op_schemas", tmp_path / "op_schemas", ignore=ignored)
    return tmp_path


def problems_of(tree: Path) -> list[str]:
    return problems(load_all(tree / "op_schemas"), releases(tree))


def edit(tree: Path, op: str, change: Callable[[dict[str, Any]], object]) -> None:
    file = tree / "op_schemas" / f"{op}.yaml"
    document = yaml.safe_load(file.read_text())
    change(document)
    file.write_text(yaml.safe_dump(document, sort_keys=False))


def test_a_release_has_every_op(tree):
    file = release(PENDING, tree)
    assert file == tree / "op_schemas" / "released" / f"{PENDING}.yaml"
    assert yaml.safe_load(file.read_text()) == CURRENT
    assert problems_of(tree) == []


@pytest.mark.parametrize("op", SCHEMAS)
def test_an_op_that_the_release_lacks_is_found(tree, op):
    file = release(PENDING, tree)
    kept = yaml.safe_load(file.read_text())
    del kept[op]
    file.write_text(yaml.safe_dump(kept))
    (problem,) = problems_of(tree)
    assert problem == f"{PENDING}: {op}: since {SCHEMAS[op].since}, but not in the release"


def test_an_op_of_a_later_version_need_not_be_in_the_release(tree):
    file = release(PENDING, tree)
    file.write_text(yaml.safe_dump({k: v for k, v in CURRENT.items() if k != "permute"}))
    edit(tree, "permute", lambda document: document.update(since="99.1"))
    assert problems_of(tree) == []
    file.write_text(yaml.safe_dump(CURRENT))
    assert problems_of(tree) == [f"{PENDING}: permute: since 99.1, but in the release"]


@pytest.mark.parametrize("op", SCHEMAS)
def test_renaming_an_argument_of_any_op_is_found(tree, op):
    release(PENDING, tree)
    first = SCHEMAS[op].arguments[0].name
    # The change is made in every file, because another op may name the argument in a `like`.
    for file in (tree / "op_schemas").glob("*.yaml"):
        file.write_text(re.sub(rf"\b{first}\b", f"{first}_renamed", file.read_text()))
    found = [p for p in problems_of(tree) if p.startswith(f"{PENDING}: {op}: ")]
    assert len(found) == 1
    assert found[0].startswith(f"{PENDING}: {op}: {CURRENT[op]} became ")


def reorder(document: dict[str, Any]) -> None:
    old, new = "Tensor topk_ids, Tensor topk_weights", "Tensor topk_weights, Tensor topk_ids"
    assert old in document["schema"]
    document["schema"] = document["schema"].replace(old, new)
    arguments = document["arguments"]
    names = list(arguments)
    at = names.index("topk_ids")
    names[at : at + 2] = ["topk_weights", "topk_ids"]
    document["arguments"] = {name: arguments[name] for name in names}


def another_default(document: dict[str, Any]) -> None:
    assert "activation='silu'" in document["schema"]
    document["schema"] = document["schema"].replace("activation='silu'", "activation='gelu'")


@pytest.mark.parametrize("change", [reorder, another_default])
def test_an_incompatible_schema_is_found_and_not_released(tree, change):
    release(PENDING, tree)
    edit(tree, "fused_experts", change)
    (problem,) = problems_of(tree)
    assert problem.startswith(f"{PENDING}: fused_experts: {CURRENT['fused_experts']} became ")
    (tree / "src" / "moe_ops" / "_version.py").write_text('__version__ = "99.1.0.dev0"')
    with pytest.raises(ReleaseError, match="fused_experts"):
        release("99.1.0", tree)
    assert list(releases(tree)) == [PENDING]


def test_a_compatible_schema_is_released_beside_the_first(tree):
    release(PENDING, tree)
    old = "str? kernel_config=None)"
    edit(tree, "fused_experts", lambda d: d.update(
        schema=d["schema"].replace(old, f"{old[:-1]}, bool strict=False)"),
        arguments={**d["arguments"], "strict": {"doc": "Something new."}},
    ))  # fmt: skip
    (tree / "src" / "moe_ops" / "_version.py").write_text('__version__ = "99.1.0.dev0"')
    release("99.1.0", tree)
    assert set(releases(tree)) == {PENDING, "99.1.0"}
    assert releases(tree)[PENDING] == CURRENT
    assert problems_of(tree) == []


@pytest.mark.parametrize(
    ("version", "why"),
    [
        ("", "three numbers"),
        ("0.1", "three numbers"),
        ("v0.1.0", "three numbers"),
        (f"{PENDING}.dev0", "three numbers"),
        ("98.7.6", f"expected VERSION={PENDING}"),
    ],
)
def test_another_version_is_not_released(tree, capsys, version, why):
    assert main([version], tree) == 1
    assert why in capsys.readouterr().out
    assert not released_folder(tree).exists()


def test_nothing_is_released_twice(tree, capsys):
    release(PENDING, tree)
    before = releases(tree)
    assert main([PENDING], tree) == 1
    assert f"{PENDING} was released" in capsys.readouterr().out
    assert releases(tree) == before


def test_make_release_checks_before_it_writes():
    """`make -n` says what the target would run, and in which order."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "-n", "release", "VERSION=1.2.3", f"PYTHON={sys.executable}"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    steps = ["docs/ops", "-m testing.gpu_report --strict", '-m testing.release "1.2.3"']
    places = [done.stdout.find(step) for step in steps]
    assert min(places) >= 0
    assert places == sorted(places)


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
        # The parser itself refuses an argument without a default behind one that has a default.
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

# SPDX-License-Identifier: Apache-2.0
"""`make release` on a copy of the tree: what it writes, builds and checks."""

import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from testing import distributions
from testing.release import (
    ReleaseError,
    dated_changelog,
    main,
    pending_version,
    publish,
    released_folder,
)

ROOT = Path(__file__).resolve().parents[2]
VERSION = pending_version()
ISOLATED = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false")


def git(tree: Path, *arguments: str) -> None:
    subprocess.run(["git", *ISOLATED, *arguments], cwd=tree, capture_output=True, check=True)


@pytest.fixture
def tree(tmp_path):
    """Copy the tree into a repository of its own, in which nothing is released."""
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", "released", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache",
        ".hypothesis",
    )  # fmt: skip
    shutil.copytree(ROOT, tree, ignore=ignored)
    # The tree of a release itself has nothing unreleased.
    (tree / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n- All of it.\n")
    git(tree, "init", "--quiet")
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--message", "A tree")
    return tree


@pytest.mark.slow
def test_a_release(tree, capsys):
    assert main([VERSION], tree) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert f'git commit -m "Release {VERSION}"\n    git tag -a v{VERSION}' in said
    assert "_version.py CHANGELOG.md op_schemas" in said
    changelog = (tree / "CHANGELOG.md").read_text()
    dated = rf"# Changelog\n\n## {VERSION} \(\d{{4}}-\d\d-\d\d\)\n\n- All of it.\n"
    assert re.fullmatch(dated, changelog)
    assert (tree / "src/moe_ops/_version.py").read_text().rstrip().endswith(f'"{VERSION}"')
    kept = released_folder(tree) / f"{VERSION}.yaml"
    wheel = tree / "dist" / f"torch_moe_ops-{VERSION}-py3-none-any.whl"
    sdist = tree / "dist" / f"torch_moe_ops-{VERSION}.tar.gz"
    assert {path.name for path in (tree / "dist").iterdir()} == {wheel.name, sdist.name}
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(f"moe_ops/op_schemas/released/{VERSION}.yaml") == kept.read_bytes()
    # Every test of the tree is in the sdist.
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    tests = {str(path.relative_to(tree)) for path in (tree / "tests").rglob("*.py")}
    assert tests
    assert tests <= held
    # The tree is not clean now, and the version is no longer pending twice.
    assert main([VERSION], tree) == 1


def test_a_changed_tree_is_not_released(tree, capsys):
    (tree / "README.md").write_text("changed")
    assert main([VERSION], tree) == 1
    assert "expected a clean tree, got ' M README.md'" in capsys.readouterr().out
    assert not released_folder(tree).exists()


def test_a_failed_build_leaves_the_tree_as_it_was(tree):
    """A file that the build refuses: the version and the schemas are taken back."""
    (tree / "setup.py").write_text("raise SystemExit('no build today')\n")
    git(tree, "commit", "--quiet", "--all", "--message", "Break the build")
    files = [tree / "src/moe_ops/_version.py", tree / "CHANGELOG.md"]
    before = [file.read_text() for file in files]
    with pytest.raises(RuntimeError, match="no build today"):
        publish(VERSION, tree)
    assert [file.read_text() for file in files] == before
    assert not (released_folder(tree) / f"{VERSION}.yaml").exists()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("## 0.0.1\n\n- New.\n", "got none"),
        ("## Unreleased\n\n- New.\n\n## Unreleased\n", "got 2"),
        ("## Unreleased\n\n## 0.0.1\n\n- New.\n", "got one with nothing below"),
    ],
)
def test_a_release_says_what_is_new(text, found):
    with pytest.raises(ReleaseError, match=found):
        dated_changelog(text, VERSION)


def test_what_the_files_lack_is_named(tmp_path):
    wheel, sdist = tmp_path / "x-1.0-cp311-linux.whl", tmp_path / "x-1.0.tar.gz"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tests/test_x.py", "")
    with tarfile.open(sdist, "w"):
        pass
    found = distributions.problems(wheel, sdist, "1.0")
    assert f"{wheel.name}: expected a pure Python wheel" in found
    assert f"{wheel.name}: holds tests/test_x.py" in found
    assert f"{wheel.name}: lacks moe_ops/op_schemas/released/1.0.yaml" in found
    assert f"{sdist.name}: lacks tests/conftest.py" in found

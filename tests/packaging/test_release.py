# SPDX-License-Identifier: Apache-2.0
"""`make release` on a copy of the tree: what it writes, builds and checks."""

import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from testing import distributions
from testing.release import main, pending_version, publish, released_folder

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
        ".hypothesis", "shared",
    )  # fmt: skip
    shutil.copytree(ROOT, tree, ignore=ignored)
    git(tree, "init", "--quiet")
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--message", "A tree")
    return tree


@pytest.mark.slow
def test_a_release(tree, capsys):
    assert main([VERSION], tree) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert f'git commit -m "Release {VERSION}"\n    git tag -a v{VERSION}' in said
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
    before = (tree / "src/moe_ops/_version.py").read_text()
    with pytest.raises(RuntimeError, match="no build today"):
        publish(VERSION, tree)
    assert (tree / "src/moe_ops/_version.py").read_text() == before
    assert not (released_folder(tree) / f"{VERSION}.yaml").exists()


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

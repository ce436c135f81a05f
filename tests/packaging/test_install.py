# SPDX-License-Identifier: Apache-2.0
"""The package builds and installs in every supported way, and each installation runs an op.

Each installation has an environment of its own, which sees no moe_ops but the one installed there.
Nothing is fetched.
"""

import json
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from testing.fresh_python import checked, fresh_python, pip_install, run, site_packages

ROOT = Path(__file__).resolve().parents[2]
BUILD_FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md")
SCHEMA_FILES = sorted(path.name for path in (ROOT / "op_schemas").glob("*.yaml"))

# The installed environment's Python runs this outside the source tree.
PROBE = """
import importlib.metadata, importlib.resources, json
import torch
import moe_ops
schemas = importlib.resources.files("moe_ops.op_schemas")
rows = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
slots = torch.tensor([5, 0, 2, 4, 1, 3])
print(json.dumps({
    "file": moe_ops.__file__,
    "schemas": str(schemas),
    "schema_files": sorted(item.name for item in schemas.iterdir() if item.name.endswith(".yaml")),
    "typed": importlib.resources.files("moe_ops").joinpath("py.typed").is_file(),
    "version": moe_ops.__version__,
    "installed_version": importlib.metadata.version("torch-moe-ops"),
    "permuted": torch.ops.moe.permute(rows, slots, 2).tolist(),
}))
"""
PERMUTED = [[[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]][slot // 2] for slot in (5, 0, 2, 4, 1, 3)]


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    """Copy what a build reads, so builds leave nothing here and do not meet each other."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, tree / name)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "op_schemas"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    return tree


@pytest.fixture
def python(tmp_path: Path) -> Path:
    return fresh_python(tmp_path)


def build(kind: str, python: Path, tree: Path) -> Path:
    """Call the build backend as a front end does, and return the wheel or sdist."""
    out = tree / "out"
    script = f"import setuptools.build_meta as b; print('built', b.build_{kind}({str(out)!r}))"
    return out / checked(python, "-c", script, cwd=tree).rsplit("built ", 1)[1].strip()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["wheel", "sdist", "editable", "editable strict"])
def test_installed_package_runs_an_op(
    way: str, python: Path, source_tree: Path, tmp_path: Path
) -> None:
    if way in {"wheel", "sdist"}:
        artifact = build(way, python, source_tree)
        pip_install(python, artifact, cwd=tmp_path)
        shutil.rmtree(source_tree)  # an installation that leaned on it would fail from here on
        package = site_packages(python) / "moe_ops"
        expected = package, package / "op_schemas"
    elif way == "editable":
        pip_install(python, "-e", source_tree, cwd=tmp_path)
        package = source_tree / "src" / "moe_ops"
        expected = package, package / "op_schemas"
    else:
        strict = ("--config-settings", "editable_mode=strict")
        pip_install(python, *strict, "-e", source_tree, cwd=tmp_path)
        (package,) = (source_tree / "build").glob("__editable__*/moe_ops")
        expected = package, package / "op_schemas"

    # The parent of a clone, which is called moe_ops and is no package.
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "moe_ops").mkdir(parents=True)
    seen = json.loads(checked(python, "-c", PROBE, cwd=elsewhere).splitlines()[-1])

    assert Path(seen["file"]) == expected[0] / "__init__.py"
    assert Path(seen["schemas"]) == expected[1]
    assert seen["schema_files"] == SCHEMA_FILES
    assert seen["typed"]
    assert seen["version"] == seen["installed_version"]
    assert seen["permuted"] == PERMUTED


def test_wheel_holds_the_package_and_nothing_else(python: Path, source_tree: Path) -> None:
    with zipfile.ZipFile(build("wheel", python, source_tree)) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    source = source_tree / "src"
    modules = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    schemas = {
        f"moe_ops/{path.relative_to(source_tree)}"
        for pattern in ("*.yaml", "*.py")
        for path in (source_tree / "op_schemas").rglob(pattern)
    }
    tables = {
        str(path.relative_to(source)) for path in source.glob("moe_ops/configs/tables/*.json")
    }
    assert tables
    assert names == modules | schemas | tables | {"moe_ops/py.typed"}


# Each edits a well-formed op_schemas/permute.yaml: what to replace, by what, and the key and a word
# of the reason that the message must give.
MALFORMED = {
    "unknown dtype": ("dtype: index", "dtype: integerish", "arguments.gather_indices.dtype", "integerish"),
    "unknown letter": ("shape: [R]", "shape: [Q]", "arguments.gather_indices.shape", "'Q'"),
    "unknown key": ("since:", "sinse:", "sinse", "unknown key"),
    "bad expression": ("R: T * top_k", "R: T *", "let.R", "not an expression"),
    "not YAML": ("dims: {", "dims: {{", "whole file", "not valid YAML"),
}  # fmt: skip


def malform(tree: Path, case: str) -> tuple[str, str]:
    old, new, key, reason = MALFORMED[case]
    file = tree / "op_schemas" / "permute.yaml"
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    return key, reason


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_schema_fails_the_build(case: str, source_tree: Path) -> None:
    key, reason = malform(source_tree, case)
    script = "import setuptools.build_meta as b; b.build_wheel('out')"
    done = run(sys.executable, "-c", script, cwd=source_tree)
    assert done.returncode != 0
    assert not list(source_tree.glob("out/*.whl"))
    message = done.stderr.strip()
    assert message.startswith("moe_ops: malformed op schema: ")
    for part in ("permute.yaml", key, reason):
        assert part in message
    assert "Traceback" not in message


def test_malformed_schema_fails_pip_install(
    python: Path, source_tree: Path, tmp_path: Path
) -> None:
    key, reason = malform(source_tree, "unknown dtype")
    done = run(
        *(python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", source_tree),
        cwd=tmp_path,
    )
    assert done.returncode != 0
    (line,) = (line for line in done.stderr.splitlines() if "malformed op schema" in line)
    assert "permute.yaml" in line
    assert key in line
    assert reason in line
    assert (
        "No module named 'moe_ops'"
        in run(python, "-I", "-c", "import moe_ops", cwd=tmp_path).stderr
    )

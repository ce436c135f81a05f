# SPDX-License-Identifier: Apache-2.0
"""The GPU suite writes a report with a hash of what it loads. No GPU is needed here."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_ops._core.library import OPS
from testing import gpu_recorder as recorder
from testing import gpu_report as report
from testing.import_closure import source_file

ROOT = report.ROOT
PACKAGE = ROOT / "src" / "moe_ops"


@pytest.fixture
def tree(tmp_path):
    """Copy all of this tree that the hash reads."""
    for name in ("src", "op_schemas", "testing", "benchmarks", "tests/gpu"):
        ignored = shutil.ignore_patterns("__pycache__", "results", "*.egg-info")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    return tmp_path


def covered_files(root: Path) -> dict[str, Path]:
    """Return the files that the hash covers, by the names of their digests."""
    return {
        name: root / name if "/" in name else source_file(root, name) or root
        for name in report.digests(root)
    }


def good_report(root: Path = ROOT) -> dict[str, Any]:
    return {
        "kernel_sha256": report.kernel_sha256(root),
        "gpu": "none", "torch": "2", "triton": "3", "skipped": {"a reason": 1},
        "counts": {"passed": 3, "failed": 0, "skipped": 1},
        "failures": [],
    }  # fmt: skip


def test_hash_covers_every_implementation_that_the_table_names():
    functions = [f for op in OPS.values() for f in op.implementations.values()]
    modules = {f.partition(":")[0] if isinstance(f, str) else f.__module__ for f in functions}
    # What several ops share is one floor down, or beside the plain op's.
    names = {"pytorch", "triton", "dequantize", "quantized", "routing"}
    assert {module.rpartition(".")[2] for module in modules} == names
    assert modules <= set(report.module_digests())


def test_hash_covers_every_file_that_has_a_kernel():
    with_kernels = {file for file in PACKAGE.rglob("*.py") if "@triton.jit" in file.read_text()}
    assert with_kernels
    assert with_kernels <= set(covered_files(ROOT).values())


def test_hash_covers_the_core_the_schemas_and_the_tables():
    expected = [*PACKAGE.glob("_core/*.py"), *PACKAGE.glob("configs/tables/*.json")]
    expected += (ROOT / "op_schemas").glob("*.yaml")
    assert len(expected) > 20
    assert set(expected) <= set(covered_files(ROOT).values())


def test_hash_covers_what_the_suite_loads():
    """Without a GPU, that is what all modules of the suite and all implementations import."""
    script = """
import importlib.util, json, pathlib
from moe_ops._core.library import OPS
from testing.gpu_recorder import loaded_modules
for file in pathlib.Path("tests/gpu").glob("test_*.py"):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
for op in OPS.values():
    for name in op.implementations:
        op._load(name)
print(json.dumps(sorted(loaded_modules())))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120,
        check=False, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    # The hash missed fp8 when it went by the names of files.
    assert {"moe_ops", "moe_ops.fp8", "moe_ops.ops.permute.triton"} <= loaded
    assert loaded <= set(report.module_digests())


def with_other_texts(value: Any, key: str = "") -> Any:
    """Return a schema document with every text for readers changed."""
    if key == "advice":
        return {"any": "something else"}
    if isinstance(value, dict):
        return {k: with_other_texts(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [with_other_texts(entry) for entry in value]
    return "something else" if key in report.TEXTS else value


def with_other_docstrings(source: str) -> str:
    """Return the same code in another layout, without comments and with other docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            if ast.get_docstring(node) is not None:
                del node.body[0]
            node.body.insert(0, ast.Expr(ast.Constant("Something else.")))
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n# a comment\n"


def test_comments_docstrings_texts_and_layout_change_nothing(tree):
    before = report.digests(tree)
    for file in covered_files(tree).values():
        text = file.read_text()
        if file.suffix == ".py":
            changed = with_other_docstrings(text)
        elif file.suffix == ".yaml":
            changed = yaml.safe_dump(with_other_texts(yaml.safe_load(text)), sort_keys=False)
        else:
            changed = json.dumps(json.loads(text), indent=7)
        assert changed != text
        file.write_bytes(changed.replace("\n", "\r\n").encode())
    assert report.digests(tree) == before
    assert report.outdated({"kernel_sha256": report.kernel_sha256()}, tree) is None


def test_a_change_of_any_covered_file_is_seen(tree):
    before, hash_before = report.digests(tree), report.kernel_sha256(tree)
    for file in covered_files(tree).values():
        text = file.read_text()
        if file.suffix == ".py":
            changed = text + "\nCHANGED = 1\n"
        elif file.suffix == ".yaml":
            changed = yaml.safe_dump({**yaml.safe_load(text), "flops": "1"}, sort_keys=False)
        else:
            changed = json.dumps({**json.loads(text), "changed": 1})
        file.write_text(changed)
    after = report.digests(tree)
    assert set(after) == set(before)
    assert [name for name in before if before[name] == after[name]] == []
    assert "not what was tested" in str(report.outdated({"kernel_sha256": hash_before}, tree))


def test_a_release_of_the_same_code_changes_nothing(tree):
    before = report.kernel_sha256(tree)
    file = tree / "src" / "moe_ops" / "_version.py"
    file.write_text(file.read_text().replace(".dev0", ""))
    assert report.kernel_sha256(tree) == before


def test_a_file_that_a_launcher_imports_in_a_function_is_seen(tree):
    launcher = tree / "src" / "moe_ops" / "ops" / "permute" / "triton.py"
    launcher.write_text(launcher.read_text() + "\ndef more():\n    from moe_ops import added\n")
    without = report.kernel_sha256(tree)
    added = tree / "src" / "moe_ops" / "added.py"
    added.write_text("x = 1\n")
    assert "moe_ops.added" in report.digests(tree)
    first = report.kernel_sha256(tree)
    added.write_text("x = 2\n")
    assert len({without, first, report.kernel_sha256(tree)}) == 3
    added.rename(added.with_name("renamed.py"))
    assert report.kernel_sha256(tree) == without


def test_an_op_that_nothing_imports_yet_is_seen(tree):
    """The closure starts at the implementation table, wherever that is filled."""
    folder = tree / "src" / "moe_ops" / "ops" / "added"
    folder.mkdir()
    (folder / "op.py").write_text('op.implement("triton", "moe_ops.ops.added.launch:added")')
    (folder / "launch.py").write_text("x = 1\n")
    assert {f"moe_ops.ops.added.{module}" for module in ("op", "launch")} <= set(
        report.digests(tree)
    )


def test_a_file_that_nothing_loads_is_not_covered(tree):
    before = report.kernel_sha256(tree)
    (tree / "src" / "moe_ops" / "ops" / "permute" / "unused.py").write_text("x = 1\n")
    assert report.kernel_sha256(tree) == before


OUTDATED = {"kernel_sha256": "0" * 64}
NONE_PASSED = {"counts": {"passed": 0, "failed": 0, "skipped": 9}}
ONE_FAILED = {"counts": {"passed": 3, "failed": 1, "skipped": 0}, "failures": ["test_x"]}


@pytest.mark.parametrize(
    ("change", "status", "strict_status", "says"),
    [
        ({}, 0, 0, "3 passed, 0 failed, 1 skipped on none"),
        (OUTDATED, 0, 1, "the code is not what was tested"),
        (NONE_PASSED, 1, 1, "ERROR: the GPU report: no test passed"),
        (ONE_FAILED, 1, 1, "ERROR: the GPU report: 1 tests failed: test_x"),
        (OUTDATED | ONE_FAILED, 1, 1, "1 tests failed: test_x"),
    ],
    ids=["good", "outdated", "none passed", "failed", "outdated and failed"],
)
def test_check_of_a_report(tmp_path, capsys, change, status, strict_status, says):
    file = tmp_path / "report.json"
    file.write_text(json.dumps(good_report() | change))
    assert report.main([], file) == status
    output = capsys.readouterr().out
    assert says in output
    assert ("WARNING" in output) == ("kernel_sha256" in change)
    assert ("ERROR" in output) == bool(status)
    assert report.main(["--strict"], file) == strict_status
    output = capsys.readouterr().out
    assert says in output
    assert "WARNING" not in output
    assert ("ERROR" in output) == bool(strict_status)


def test_check_without_a_report_fails(tmp_path, capsys):
    assert report.main([], tmp_path / "report.json") == 1
    assert "does not exist" in capsys.readouterr().out


# This suite stands for tests/gpu. It runs with the plugin as conftest.py registers it.
SUITE = {
    "conftest.py": """
from pathlib import Path
import pytest
from testing import gpu_recorder as recorder
recorder.REPORT = Path(__file__).parent / "report.json"
recorder.machine = lambda: {"gpu": "none"}

def pytest_configure(config):
    path = recorder.report_path()
    if path is not None:
        config.pluginmanager.register(recorder.plugin(config, path))
""",
    "test_some.py": """
import pytest

def test_passes():
    pass

@pytest.mark.skip(reason="a reason")
def test_skips():
    pass

@pytest.mark.parametrize("i", [0, 1])
def test_skips_too(i):
    pytest.skip("another reason")
""",
}
FAILING = "def test_fails():\n    assert False\n"
BROKEN_TEARDOWN = """
import pytest

@pytest.fixture
def broken():
    yield
    raise ValueError

def test_passes_then_breaks(broken):
    pass
"""
LOADING = """
import sys
import types

def test_loads():
    sys.modules["moe_ops.no_file"] = types.ModuleType("moe_ops.no_file")
"""
CRASHING = "import os\n\ndef test_crashes():\n    os._exit(3)\n"


def run_suite(folder: Path, *arguments: str, **files: str) -> tuple[dict[str, Any] | None, str]:
    for name, content in {**SUITE, **{f"{n}.py": c for n, c in files.items()}}.items():
        (folder / name).write_text(content)
    path = folder / "out" / "report.json"
    environment = {
        **os.environ, recorder.ENVIRONMENT_VARIABLE: str(path), "PYTHONPATH": str(ROOT),
        # Without hypothesis and the like the start takes a third of the time.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "xdist.plugin",
    }  # fmt: skip
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_TESTRUNUID"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(arguments or [str(folder)])],
        # A run that ends before its first test says why on stderr.
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False, timeout=120,
    )  # fmt: skip
    written = json.loads(path.read_text()) if path.exists() else None
    return written, done.stdout


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_complete_run_is_reported(tmp_path, workers):
    written, output = run_suite(tmp_path, *workers, str(tmp_path))
    assert written is not None, output
    assert written["counts"] == {"passed": 1, "failed": 0, "skipped": 3}
    assert written["skipped"] == {"a reason": 1, "another reason": 2}
    assert written["failures"] == []
    assert written["kernel_sha256"] == report.kernel_sha256()
    assert written["gpu"] == "none"
    assert "report written" in output


def test_failures_are_reported(tmp_path):
    written, output = run_suite(
        tmp_path, "-n", "2", str(tmp_path),
        test_fails=FAILING, test_teardown=BROKEN_TEARDOWN, test_crash=CRASHING,
    )  # fmt: skip
    assert written is not None, output
    assert written["counts"]["failed"] == 3
    names = [failure.split("::")[-1] for failure in written["failures"]]
    assert names == ["test_crashes", "test_fails", "test_passes_then_breaks"]
    assert report.failures(written)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["-k", "passes", "."], "selection"),
        (["--deselect", "test_some.py::test_skips", "."], "selection"),
        (["test_some.py"], "not of tests/gpu"),
        (["test_some.py::test_passes"], "not of tests/gpu"),
        (["-x", "."], "did not run"),
        (["--collect-only", "."], "did not run"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_incomplete_run_is_not_reported(tmp_path, arguments, why):
    written, output = run_suite(tmp_path, *arguments, test_fails=FAILING, test_z=FAILING)
    assert written is None
    assert "no report written" in output
    assert why in output


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_run_that_loads_what_the_hash_does_not_cover_is_not_reported(tmp_path, workers):
    written, output = run_suite(tmp_path, *workers, str(tmp_path), test_loads=LOADING)
    assert written is None
    assert "the report's hash does not cover: moe_ops.no_file" in output


def test_module_that_cannot_be_collected_is_no_complete_run(tmp_path):
    written, _ = run_suite(tmp_path, ".", test_broken="import nothing_of_that_name\n")
    assert written is None

# SPDX-License-Identifier: Apache-2.0
"""The report of the GPU suite and its check; needs no GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from testing import gpu_recorder as recorder
from testing import gpu_report as report

ROOT = report.ROOT
PACKAGE = ROOT / "src" / "moe_ops"


@pytest.fixture
def tree(tmp_path):
    """A tree with the kernels of this one."""
    for file in report.kernel_files():
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    return tmp_path


def good_report(root: Path) -> dict[str, Any]:
    return {
        "kernel_sha256": report.kernel_sha256(root),
        "counts": {"passed": 3, "failed": 0, "skipped": 1},
        "failures": [],
    }


def test_hash_covers_every_file_that_has_a_kernel():
    covered = set(report.kernel_files())
    with_kernels = {file for file in PACKAGE.rglob("*.py") if "@triton.jit" in file.read_text()}
    assert with_kernels
    assert with_kernels <= covered
    assert set(PACKAGE.rglob("triton.py")) <= covered
    assert not [file for file in covered if file.name in {"op.py", "pytorch.py"}]


def test_good_report_passes(tree):
    assert report.problems(good_report(tree), tree) == []


def test_any_change_of_any_kernel_file_fails(tree):
    written = good_report(tree)
    for file in report.kernel_files(tree):
        before = file.read_bytes()
        file.write_bytes(before + b"\n# changed\n")
        (problem,) = report.problems(written, tree)
        assert "not those that were tested" in problem
        file.write_bytes(before)
    assert report.problems(written, tree) == []


@pytest.mark.parametrize(
    "change", ["src/moe_ops/_triton/kernels/more.py", "src/moe_ops/ops/permute/kernels_hopper.py"]
)
def test_a_new_or_a_renamed_kernel_file_fails(tree, change):
    written = good_report(tree)
    (tree / change).write_text("")
    assert report.problems(written, tree)
    (tree / change).unlink()
    assert not report.problems(written, tree)
    first = report.kernel_files(tree)[0]
    first.rename(first.with_name("renamed.py"))
    assert report.problems(written, tree)


def test_line_ends_do_not_matter(tree):
    written = good_report(tree)
    for file in report.kernel_files(tree):
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert report.problems(written, tree) == []


def test_report_with_failures_or_without_passes_fails(tree):
    written = good_report(tree)
    written["counts"] = {"passed": 0, "failed": 0, "skipped": 9}
    assert report.problems(written, tree) == ["no test passed"]
    written["counts"] = {"passed": 3, "failed": 1, "skipped": 0}
    written["failures"] = ["test_x"]
    assert report.problems(written, tree) == ["1 tests failed: test_x"]


# A suite that stands for tests/gpu, run with the plugin as conftest.py registers it.
SUITE = {
    "conftest.py": """
from pathlib import Path
import pytest
from testing import gpu_recorder as recorder
recorder.REPORT = Path(__file__).parent / "report.json"
recorder.machine = lambda: {"gpu": "none"}

def pytest_configure(config):
    path = recorder.report_path()
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(recorder.Recorder(config, path))
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
CRASHING = "import os\n\ndef test_crashes():\n    os._exit(3)\n"


def run_suite(folder: Path, *arguments: str, **files: str) -> tuple[dict[str, Any] | None, str]:
    for name, content in {**SUITE, **{f"{n}.py": c for n, c in files.items()}}.items():
        (folder / name).write_text(content)
    path = folder / "out" / "report.json"
    environment = {
        **os.environ, recorder.ENVIRONMENT_VARIABLE: str(path), "PYTHONPATH": str(ROOT),
        # A start without hypothesis and the like takes a third of the time.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "xdist.plugin",
    }  # fmt: skip
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_TESTRUNUID"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(arguments or [str(folder)])],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120,
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
    assert report.problems(written)


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


def test_module_that_cannot_be_collected_is_no_complete_run(tmp_path):
    written, _ = run_suite(tmp_path, ".", test_broken="import nothing_of_that_name\n")
    assert written is None

# SPDX-License-Identifier: Apache-2.0
"""The distribution is torch-moe-ops, and another project's moe-ops beside it is named."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_ops import _distribution

ROOT = Path(__file__).resolve().parents[2]
THEIRS = "moe_ops/__init__.py,sha256=x,1\nmoe_ops-0.1.0.dist-info/METADATA,,\n"
EDITABLE = "__editable__.moe_ops-0.1.0.pth,sha256=x,1\nmoe_ops-0.1.0.dist-info/METADATA,,\n"


def installed(folder: Path, record: str, name: str = "moe_ops-0.1.0.dist-info") -> Path:
    site_packages = folder / "site-packages"
    (site_packages / name).mkdir(parents=True)
    (site_packages / name / "RECORD").write_text(record)
    return site_packages


def test_the_other_project_is_found(tmp_path):
    site_packages = installed(tmp_path, THEIRS)
    found = _distribution.other_distribution(["/no/such/folder", str(site_packages)])
    assert found == str(site_packages / "moe_ops-0.1.0.dist-info")


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("moe_ops-0.1.0.dist-info", EDITABLE),
        ("torch_moe_ops-0.1.0.dist-info", THEIRS),
        ("moe_ops_cli-1.0.dist-info", THEIRS),
    ],
)
def test_what_is_no_other_project(name, record, tmp_path):
    assert _distribution.other_distribution([str(installed(tmp_path, record, name))]) is None


def test_the_import_and_env_say_so_in_one_line(tmp_path):
    """Without the other project nothing is said: tests/cli/test_main.py reads env's stderr."""
    site_packages = installed(tmp_path, THEIRS)
    done = subprocess.run(
        [sys.executable, "-m", "moe_ops", "env"],
        env={**os.environ, "PYTHONPATH": str(site_packages)},
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert line.startswith("moe_ops: another project's distribution moe-ops is installed too (")
    assert str(site_packages) in line
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("moe-ops "))
    assert "pip uninstall moe-ops" in line


def test_no_page_installs_the_other_project():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "pyproject.toml"]
    guilty = [
        f"{page.relative_to(ROOT)}: {match[0]}"
        for page in pages
        for match in re.finditer(r"pip install [^\n`]*\bmoe[_-]ops\b|\"moe_ops\[", page.read_text())
        if "torch-moe-ops" not in match[0]
    ]
    assert guilty == []


def test_paths_that_are_no_strings(monkeypatch):
    """Python's import passes over them, and so does this."""
    monkeypatch.setattr(sys, "path", [*sys.path, Path("/tmp/x-packages"), None])
    assert _distribution.other_distribution() is None

# SPDX-License-Identifier: Apache-2.0
"""A build of a tree with a release ships what was released."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from testing.release import pending_version, release

ROOT = Path(__file__).resolve().parents[2]


def test_released_schemas_are_in_the_wheel(tmp_path):
    """test_install.py builds the tree as it is, which has no release before the first one."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("src", "op_schemas"):
        ignored = shutil.ignore_patterns("released", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    file = release(pending_version(tmp_path), tmp_path)
    script = "import setuptools.build_meta as b; b.build_wheel('out')"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("out/*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(f"moe_ops/op_schemas/released/{file.name}") == file.read_bytes()

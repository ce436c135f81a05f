# SPDX-License-Identifier: Apache-2.0
"""Corrupt counts and indices never make a kernel touch what lies next to a tensor."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from testing.every_op import TRITON_INDEX_OPS
from testing.interpreted import pytestmark  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
sides = pytest.mark.parametrize("side", ["end", "start"])


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "testing.guarded_calls", *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@sides
def test_an_access_out_of_bounds_would_be_found(side):
    assert call(side, "oob").returncode == -signal.SIGSEGV


@sides
def test_corrupt_indices_stay_in_bounds(side):
    done = call(side, *TRITON_INDEX_OPS)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    lines = done.stdout.splitlines()
    assert lines[-1] == "done"
    assert [line.split()[0] for line in lines[:-1]] == TRITON_INDEX_OPS
    assert all(int(line.split()[1]) > 0 for line in lines[:-1])

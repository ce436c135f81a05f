# SPDX-License-Identifier: Apache-2.0
"""Corrupt counts and indices give unspecified values, never an access out of bounds."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from testing.every_op import TRITON_INDEX_OPS, WITH_TRITON
from testing.on_device import memory_slot

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
# Each tensor has an allocation of its own, so no other tensor lies next to it.
ENVIRONMENT = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
FOUND = 86


def call(names: list[str], *wrapper: str) -> subprocess.CompletedProcess[str]:
    command = [*wrapper, sys.executable, "-m", "testing.corrupt_calls", *names]
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=400
    )


@functools.cache
def sanitizer() -> list[str]:
    """Return the command line of compute-sanitizer, or skip the test where it does not work."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not on PATH")
    command = [program, "--tool", "memcheck", "--error-exitcode", str(FOUND)]
    done = call(["oob"], *command)
    output = done.stdout + done.stderr
    if done.returncode != FOUND or "Invalid __global__ write" not in output:
        pytest.skip(f"compute-sanitizer does not work on this machine: {_reason(output)}")
    return command


def _reason(output: str) -> str:
    errors = [line.strip("= \n") for line in output.splitlines() if "rror" in line]
    return errors[0] if errors else f"it said {output[-200:]!r}"


@pytest.mark.parametrize("name", TRITON_INDEX_OPS)
def test_does_not_end_the_process(name):
    done = call([name])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("done\n")


@pytest.mark.parametrize("name", TRITON_INDEX_OPS)
def test_compute_sanitizer_finds_nothing(name):
    # compute-sanitizer keeps a sixth of the GPU's memory for itself.
    with memory_slot():
        done = call([name], *sanitizer())
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "done\n" in done.stdout
    assert "ERROR SUMMARY: 0 errors" in done.stdout + done.stderr


def test_every_op_with_indices_is_called():
    assert set(WITH_TRITON) - set(TRITON_INDEX_OPS) == {"topk_routing", "dequantize_weight"}

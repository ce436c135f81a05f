# SPDX-License-Identifier: Apache-2.0
"""Kernels that are compiled for GPUs that are not here, and the table that tells of them."""

import json
import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels, which TRITON_INTERPRET=1 interprets", allow_module_level=True)
pytest.importorskip("triton", exc_type=ImportError)

from benchmarks import architectures
from benchmarks.architectures import LIMITS, blocks_per_sm
from benchmarks.report.columns import markdown
from benchmarks.report.tables.compiled import COMPILED
from testing.compiled import GPUS, Resources


def kernel(warps=8, shared=0, registers=32):
    return Resources("some_kernel", warps, shared, 0, registers, ptx="")


@pytest.mark.parametrize(
    ("capability", "given", "expected"),
    [
        # 128 registers of 256 threads are half of an SM's.
        ((9, 0), kernel(registers=128), 2),
        ((9, 0), kernel(registers=129), 1),
        # A warp gets registers by 256: 33 for each thread are given as 40.
        ((9, 0), kernel(warps=1, registers=33), 32),
        ((9, 0), kernel(warps=4, registers=33), 12),
        # All of the shared memory that one block may have; two halves do not fit: 1 KiB is reserved.
        ((9, 0), kernel(shared=227 * 1024), 1),
        ((9, 0), kernel(shared=114 * 1024), 1),
        ((9, 0), kernel(shared=113 * 1024), 2),
        ((8, 6), kernel(), 6),
        ((8, 6), kernel(warps=1), 16),
        ((7, 5), kernel(warps=4, shared=32 * 1024), 2),
    ],
)
def test_blocks_of_an_sm(capability, given, expected):
    assert blocks_per_sm(given, LIMITS[capability]) == expected


def test_every_architecture_has_limits():
    assert {device.capability for device in GPUS.values()} == set(LIMITS)
    for device in GPUS.values():
        assert device.shared_memory <= LIMITS[device.capability].shared


@pytest.mark.slow
def test_the_command_and_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(architectures, "SIZES", {"decode-8": ("inference",)})
    output = tmp_path / "compiled.json"
    monkeypatch.setattr("sys.argv", ["", "--only", "sm_80", "--output", str(output)])
    architectures.main()
    assert "sm_80: " in capsys.readouterr().out
    cases = json.loads(output.read_text())["cases"]
    assert {case["kernel"] for case in cases} >= {"_expert_up_kernel", "grouped_gemm_kernel"}
    assert all(case["blocks"] >= 1 for case in cases)
    lines = list(markdown(COMPILED, cases))
    (row,) = (line for line in lines if line.startswith("| sm_80 "))
    products = [c for c in cases if c["kernel"] in {"_expert_up_kernel", "grouped_gemm_kernel"}]
    assert f"| {len(cases)} |" in row
    assert f"| {max(c['registers'] for c in products)} |" in row

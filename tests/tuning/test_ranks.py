# SPDX-License-Identifier: Apache-2.0
"""Ranks of torch.distributed tune together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from testing.tuning_fakes import TASKS

ROOT = Path(__file__).parents[2]
KEYS = [task.problem.key for task in TASKS]


RANK = """
import json, os, sys
import torch.distributed as dist
from testing.tuning_fakes import TASKS, Clock, tune_on_cpu

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
fails = sys.argv[2:] == ["1", "fail"]
clock = Clock(lambda config: config.BLOCK_M / (0 if fails else 1))
try:
    found = tune_on_cpu(clock)
except (RuntimeError, ZeroDivisionError) as error:
    print(json.dumps(str(error)))
else:
    print(json.dumps([len(clock.timed), {key: config.to_dict() for key, config in found.items()}]))
dist.destroy_process_group()
"""


def run_ranks(tmp_path, behaviour, folders):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path / behaviour), str(rank), behaviour],
            env={**os.environ, "MOE_OPS_CACHE_DIR": str(folder)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, folder in enumerate(folders)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    for process, (_, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.mark.slow
def test_ranks_share_the_work(tmp_path):
    """Two nodes have disks of their own. Each finds everything in its cache afterwards."""
    folders = [tmp_path / "node0", tmp_path / "node1"]
    (timed_0, found_0), (timed_1, found_1) = run_ranks(tmp_path, "work", folders)
    assert (timed_0, timed_1) == (3, 3)
    assert found_0 == found_1
    assert list(found_0) == KEYS
    assert [result[0] for result in run_ranks(tmp_path, "again", folders)] == [0, 0]


@pytest.mark.slow
def test_a_rank_that_fails_fails_all(tmp_path):
    messages = run_ranks(tmp_path, "fail", [tmp_path, tmp_path])
    assert messages == [
        "moe_ops.tune: rank 1 failed: ZeroDivisionError: division by zero",
        "division by zero",
    ]

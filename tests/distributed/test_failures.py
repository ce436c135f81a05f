# SPDX-License-Identifier: Apache-2.0
"""A rank that dies ends the job, and a group can be made again."""

import subprocess
import sys
import time

import pytest

from testing.ranks import ROOT

pytestmark = pytest.mark.slow

# Rank 1 dies between two steps; the rank that is left says so within the group's timeout.
RANK = """
import os, sys, torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from moe_ops.distributed import expert_parallel
from moe_ops.layers import Experts
from testing.ranks import init

rank, how = int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
torch.manual_seed(0)
whole = Experts(4, 8, 16)
hidden, ids, weights = torch.randn(5, 8), torch.arange(10).reshape(5, 2) % 4, torch.ones(5, 2)


def step():
    experts = Experts(4, 8, 16)
    experts.load_state_dict(whole.state_dict())
    expert_parallel(experts, init_device_mesh("cpu", (2,)))
    return experts, experts(hidden, ids, weights)


init(sys.argv[1], rank, 2, timeout=20)
experts, first = step()
torch.testing.assert_close(first, whole(hidden, ids, weights))
if how == "again":
    distributed.destroy_process_group()
    init(sys.argv[1] + ".2", rank, 2, timeout=20)
    _, second = step()
    assert torch.equal(first, second)
    distributed.destroy_process_group()
    print("done")
elif rank == 1:
    os._exit(3)
else:
    print("alive", flush=True)
    experts(hidden, ids, weights)
"""


def run(tmp_path, how):
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path / "store"), str(rank), how],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip


def test_a_rank_that_dies_ends_the_job_with_a_message(tmp_path):
    first, second = run(tmp_path, "dies")
    assert first.stdout is not None
    assert first.stdout.readline() == "alive\n"
    start = time.monotonic()
    _, err = first.communicate(timeout=60)
    assert time.monotonic() - start < 40
    assert first.returncode != 0
    assert "Error" in err.splitlines()[-1], err
    assert second.wait(timeout=60) == 3


def test_a_group_that_was_destroyed_and_made_again(tmp_path):
    for process in run(tmp_path, "again"):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.splitlines()[-1] == "done"

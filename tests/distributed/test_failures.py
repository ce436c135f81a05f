# SPDX-License-Identifier: Apache-2.0
"""A rank that dies ends the job, and a group can be made again."""

import subprocess
import sys
import time

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from testing.ep_problem import assert_equals_one_process, parallel_copy, problem
from testing.ranks import ROOT, init

pytestmark = pytest.mark.slow

# Rank 1 dies between two steps.
RANK = """
import os, sys, torch
from torch.distributed.device_mesh import init_device_mesh
from moe_ops.distributed import expert_parallel
from moe_ops.layers import Experts
from testing.ranks import init

rank = int(sys.argv[2])
torch.set_num_threads(1)
init(sys.argv[1], rank, 2, timeout=20)
experts = expert_parallel(Experts(4, 8, 16), init_device_mesh("cpu", (2,)))
hidden, ids, weights = torch.randn(5, 8), torch.arange(10).reshape(5, 2) % 4, torch.ones(5, 2)
experts(hidden, ids, weights)
if rank == 1:
    os._exit(3)
print("alive", flush=True)
experts(hidden, ids, weights)
"""


def test_a_rank_that_dies_ends_the_job_with_a_message(tmp_path):
    """The rank that is left says so within the group's timeout."""
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path / "store"), str(rank)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    )  # fmt: skip
    assert first.stdout is not None
    assert first.stdout.readline() == "alive\n"
    start = time.monotonic()
    _, err = first.communicate(timeout=60)
    assert time.monotonic() - start < 40
    assert first.returncode != 0
    assert "Error" in err.splitlines()[-1], err
    assert second.wait(timeout=60) == 3


def check_made_again(rank, world_size, folder):
    from moe_ops.layers import Experts

    whole = Experts(4, 16, 24, dtype=torch.float64)
    given = problem(rank, [5, 5], 4)
    found = []
    for turn in range(2):
        parallel = parallel_copy(whole, init_device_mesh("cpu", (world_size,)))
        found.append(assert_equals_one_process(whole, parallel, given))
        if turn == 0:
            distributed.destroy_process_group()
            init(f"{folder}/store", rank, world_size)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_a_group_that_was_destroyed_and_made_again(ranks, tmp_path):
    ranks(2).run_last(check_made_again, folder=str(tmp_path))

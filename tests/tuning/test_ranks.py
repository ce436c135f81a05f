# SPDX-License-Identifier: Apache-2.0
"""Ranks of torch.distributed tune together."""

import json
import os
from unittest import mock

import pytest
from torch import distributed

from testing.tuning_fakes import TASKS, Clock, tune_on_cpu

pytestmark = pytest.mark.slow
KEYS = [task.problem.key for task in TASKS]


def tuned(clock, folder):
    """Tune with the cache in the folder; return what was found, as JSON."""
    with mock.patch.dict(os.environ, {"MOE_OPS_CACHE_DIR": folder}):
        found = tune_on_cpu(clock)
    return json.dumps({key: config.to_dict() for key, config in found.items()})


def check_the_work_is_shared(rank, world_size, folders):
    first, again = Clock(), Clock()
    found = [""] * world_size
    distributed.all_gather_object(found, tuned(first, folders[rank]))
    assert len(first.timed) == 3
    assert found[0] == found[1]
    assert list(json.loads(found[0])) == KEYS
    assert tuned(again, folders[rank]) == found[0]
    assert not again.timed


def test_ranks_share_the_work(ranks, tmp_path):
    """Two nodes have disks of their own. Each finds everything in its cache afterwards."""
    folders = [str(tmp_path / "node0"), str(tmp_path / "node1")]
    ranks(2).run(check_the_work_is_shared, folders=folders)


def check_one_fails(rank, world_size, folder):
    clock = Clock(lambda config: config.BLOCK_M / (1 - rank))
    with pytest.raises((RuntimeError, ZeroDivisionError)) as raised:
        tuned(clock, folder)
    assert str(raised.value) == [
        "moe_ops.tune: rank 1 failed: ZeroDivisionError: division by zero",
        "division by zero",
    ][rank]  # fmt: skip


def test_a_rank_that_fails_fails_all(ranks, tmp_path):
    ranks(2).run(check_one_fails, folder=str(tmp_path))

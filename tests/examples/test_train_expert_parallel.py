# SPDX-License-Identifier: Apache-2.0
"""The example of expert parallelism learns, and goes on after a kill, on another number of ranks."""

import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_expert_parallel.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (distributed.is_available() and distributed.is_gloo_available()),
        reason="this torch has no gloo",
    ),
]


def start(num_ranks, folder, *options):
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(num_ranks), EXAMPLE, "--checkpoints", folder,
            "--save-every", "4", *options,
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def workers_of(pid):
    """Return the processes that torchrun has started."""
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def losses(text):
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+)  loss (\S+)", text)}


@pytest.mark.parametrize("num_ranks", [3, 5, 32])
def test_refuses_ranks_that_do_not_divide_the_batch(num_ranks, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", str(num_ranks))
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--checkpoints", str(tmp_path)])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert f"divides the global batch of 16, got {num_ranks};" in capsys.readouterr().err


def test_is_killed_and_resumes_with_the_same_curve(tmp_path):
    whole = start(1, tmp_path / "whole", "--steps", "12")
    out, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err
    want = losses(out)
    assert list(want) == list(range(12))
    assert want[11] < want[0]

    killed = start(4, tmp_path / "killed", "--steps", "12")
    assert killed.stdout is not None
    text = ""
    for line in killed.stdout:
        text += line
        if line.startswith("step 6 "):
            # The next step has begun.
            for process in workers_of(killed.pid):
                os.kill(process, signal.SIGKILL)
            break
    killed.communicate(timeout=60)
    assert killed.returncode != 0
    got = losses(text)
    assert list(got) == list(range(7))

    resumed = start(2, tmp_path / "killed", "--steps", "12")
    out, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, err
    # Four steps were saved.
    assert list(losses(out)) == list(range(4, 12))
    for step, loss in {**got, **losses(out)}.items():
        assert loss == pytest.approx(want[step], abs=2e-5), step

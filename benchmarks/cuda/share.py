# SPDX-License-Identifier: Apache-2.0
"""Shares shapes among the GPUs of one host, a process for each GPU."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.cuda.experts import ROOT


def check_gpus(parser: argparse.ArgumentParser, gpus: int) -> None:
    """End the program if the host has fewer GPUs than --gpus says."""
    if gpus > 1 and gpus > (there := torch.cuda.device_count()):
        parser.error(f"--gpus: expected at most the {there} GPUs of this host, got {gpus}")


def share(
    command: Sequence[str], option: str, names: Sequence[str], gpus: int, part: str
) -> tuple[int, list[Path]]:
    """Run the command once for each GPU, with its share of the names; wait for all.

    Args:
        command: takes --device and --results beside the option.
        option: names shapes, separated by commas.
        names: of all shapes.
        gpus: how many share them.
        part: whose results are kept, in build/.

    Returns:
        code: the highest exit status.
        files: the part's results, one for each GPU that wrote any.
    """
    folders = [ROOT / "build" / f"{part}_gpus" / str(gpu) for gpu in range(gpus)]
    running = [
        subprocess.Popen(
            [
                *command, f"{option}={','.join(names[gpu::gpus])}", f"--device=cuda:{gpu}",
                f"--results={folder}",
            ],
            cwd=ROOT,
        )
        for gpu, folder in enumerate(folders)
        if names[gpu::gpus]
    ]  # fmt: skip
    codes = [process.wait() for process in running]
    name = part.replace("-", "_")
    return max(codes), [
        file for folder in folders for file in sorted(folder.glob(f"*_{name}.json"))
    ]

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
    command: Sequence[str],
    option: str,
    names: Sequence[str],
    gpus: int,
    part: str,
    goes_on: bool = False,
) -> tuple[int, list[Path]]:
    """Run the command once for each GPU, with its share of the names; wait for all.

    Args:
        command: takes --device and --results beside the option.
        option: names shapes, separated by commas.
        names: of all shapes.
        gpus: how many share them.
        part: whose results are kept, in build/.
        goes_on: whether the command goes on from what an earlier run left there. Else that is
            removed, so that it does not stand in for a process that ends before it writes.

    Returns:
        code: 0 if every process returned that; negative for one that a signal ended.
        files: the part's results, one for each GPU that wrote any.
    """
    folders = [ROOT / "build" / f"{part}_gpus" / str(gpu) for gpu in range(gpus)]
    name = part.replace("-", "_")
    if not goes_on:
        for folder in folders:
            for file in folder.glob(f"*_{name}.json"):
                file.unlink()
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
    return next((code for code in codes if code != 0), 0), [
        file for folder in folders for file in sorted(folder.glob(f"*_{name}.json"))
    ]

# SPDX-License-Identifier: Apache-2.0
"""Experts spread over ranks: dispatch, combine and the block, on several GPUs or on a CPU.

    python -m benchmarks.expert_parallel [--ranks 4] [--shapes qwen3-30b,dsv3] [--seconds 460]

It starts the ranks itself, one for each GPU. It measures every transport of ep_dispatch and
ep_combine that is there, an all-to-all with the routing's own sizes, one GPU that holds all experts,
and a copy to a peer, in turns, and writes benchmarks/results/<gpu>_expert_parallel_<ranks>.json. The ratios
that are asked for are printed at the end. Run from the root of the repository. `--device cpu` runs
small sizes with gloo, which tests the program and measures nothing.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import suite
from benchmarks.expert_parallel.measure import measure
from benchmarks.expert_parallel.ranks import start
from benchmarks.expert_parallel.records import NAMES, NUM_TOKENS, RANKS
from benchmarks.suite import Shape

RESULTS = Path(__file__).resolve().parents[1] / "results"
SHAPES = {
    shape.name: replace(shape, num_tokens=NUM_TOKENS)
    for shape in (*suite.SUITE, *suite.NAMED)
    if shape.name in NAMES
}
# What a CPU does in a moment.
TINY = {
    shape.name: shape
    for shape in (Shape("tiny", 12, 32, 16, 4, 2), Shape("tiny-wide", 20, 64, 16, 8, 3))
}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.expert_parallel", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=int, help="default: the number of GPUs; 2 on a CPU")
    parser.add_argument("--shapes", type=lambda text: text.split(","), help="default: all")
    parser.add_argument("--seconds", type=float, default=460, help="of the whole run")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results")
    args = parser.parse_args(arguments)
    known = SHAPES if args.device == "cuda" else TINY
    args.shapes = args.shapes or list(known)
    if unknown := set(args.shapes) - set(known):
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    gpus = torch.cuda.device_count() if args.device == "cuda" else 2
    args.ranks = args.ranks or gpus
    if args.ranks not in RANKS or (args.device == "cuda" and args.ranks > gpus):
        *less, most = RANKS
        expected = f"{', '.join(map(str, less))} or {most}"
        parser.error(f"--ranks: {expected}, each with a GPU of its own; there are {gpus}")
    if args.device == "cpu" and args.results is None:
        parser.error("without a GPU nothing is measured: --results says where to put that")
    args.results = args.results or RESULTS
    args.shapes = [known[name] for name in args.shapes]
    if bad := [shape.name for shape in args.shapes if shape.num_experts % args.ranks]:
        parser.error(f"--ranks: {args.ranks} does not divide the experts of {', '.join(bad)}")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = _parse(arguments)
    start(measure, args.ranks, args.device, args.shapes, args.seconds, args.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

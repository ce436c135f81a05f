# SPDX-License-Identifier: Apache-2.0
"""moe_ops' Triton kernels on a GPU, against torch's.

    python -m benchmarks.cuda [--only gemm,rows] [--shapes qwen3-30b,olmoe] [--seconds 460]

Each part writes benchmarks/results/<gpu>_<part>.json after each case, from which `python -m
benchmarks.report` makes tables and plots. What does not fit into the seconds is left out, and the
file says so. The parts decode-block, host, model, quantised and widths run where --only names them.
The sweep over drawn shapes has a command of its own, `python -m benchmarks.cuda.sweep`.

With --gpus N, so many GPUs of the host share the shapes of one part, each in a process of its own, and
their files are joined. Not for what the host bounds: the processes share it.

Run from the root of the repository. `TRITON_INTERPRET=1 MOE_OPS_IMPLEMENTATION=triton python -m
benchmarks.cuda --device cpu --tiny --results DIR` runs all usual parts without a GPU, measuring
nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch

from benchmarks import suite
from benchmarks.cuda import (
    blocks,
    decode,
    decode_block,
    dispatch,
    experts,
    first_call,
    gemm,
    host,
    lora,
    model,
    peers,
    quantised,
    routing,
    rows,
    widths,
)
from benchmarks.cuda.share import check_gpus, share
from benchmarks.cuda.sweep_file import ENDED_AFTER, LEFT_OUT, join
from benchmarks.cuda.timing import (
    OURS,
    Bench,
    Case,
    Record,
    ceilings,
    device_name,
    environment,
    free,
)
from benchmarks.suite import Shape
from benchmarks.timing import write

RESULTS = Path(__file__).resolve().parents[1] / "results"
logger = logging.getLogger("moe_ops.benchmarks")

PEERS, BLOCKS, HOST, MODEL = "experts-peers", "blocks", "host", "model"
DECODE_BLOCK, QUANTISED, WIDTHS = "decode-block", "quantised", "widths"
PARTS: dict[str, Callable[[Bench, list[Shape]], Iterator[Case]]] = {
    "gemm": gemm.cases,
    "rows": rows.cases,
    "routing": routing.cases,
    "decode": decode.cases,
    DECODE_BLOCK: decode_block.cases,
    "dispatch": dispatch.cases,
    HOST: host.cases,
    "first-call": first_call.cases,
    "experts": experts.cases,
    "experts-kernels": experts.kernels_cases,
    "experts-first-call": first_call.experts_cases,
    "lora": lora.cases,
    BLOCKS: functools.partial(blocks.cases, until=math.inf),
    MODEL: model.cases,
    QUANTISED: quantised.cases,
    WIDTHS: widths.cases,
    # Last, since it takes what time there is.
    PEERS: functools.partial(peers.cases, until=math.inf),
}
# Measured only where --only names them: a run of all parts would not fit into its time.
BY_NAME = (DECODE_BLOCK, HOST, MODEL, QUANTISED, WIDTHS)
# Measured by shape, so that GPUs can share the shapes.
SHARED = ("gemm", "rows", "experts", "experts-kernels", PEERS)
# What is compiled before anything is measured, by several processes.
AHEAD: dict[str, Callable[[Bench, list[Shape]], dict[str, Callable[[], None]]]] = {
    "experts": experts.jobs_ahead,
    "lora": lora.jobs_ahead,
    HOST: host.jobs_ahead,
    BLOCKS: blocks.jobs_ahead,
}
# What a part's results say of the part.
FACTS: dict[str, Callable[[], Mapping[str, object]]] = {
    "experts": experts.grouped_mm_facts,
    DECODE_BLOCK: experts.grouped_mm_facts,
    HOST: experts.grouped_mm_facts,
    MODEL: model.facts,
    PEERS: peers.facts,
    BLOCKS: blocks.facts,
}


def run_part(
    cases: Iterable[Case],
    until: float,
    save: Callable[[dict[str, Any], list[Record]], None] | None = None,
) -> tuple[list[Record], dict[str, Any]]:
    """The records, and what is missing among them and why: empty where all went well.

    Args:
        cases: of the part.
        until: when (time.monotonic) no further case begins.
        save: takes what is missing and the records, after each case: a run may be ended from outside.
    """
    records: list[Record] = []
    left_out, failed = [], {}
    for label, run in cases:
        if time.monotonic() > until:
            left_out.append(label)
            continue
        try:
            for record in run():
                records.append(record)
                print("  ", label, *_shown(record), flush=True)
        except Exception as error:
            # What it cost to come here is worth the rest of the numbers.
            logger.exception("%s failed", label)
            failed[label] = f"{type(error).__name__}: {error}".split("\n", maxsplit=1)[0]
        free()
        if save is not None:
            save({ENDED_AFTER: label, **_told(failed=failed)}, records)
    missing = _told(**{LEFT_OUT: left_out, "failed": failed})
    if save is not None:
        save(missing, records)
    return records, missing


def _told(**missing: Sized) -> dict[str, Any]:
    return {name: what for name, what in missing.items() if what}


def save_part(
    file: Path, facts: Mapping[str, object], missing: Mapping[str, object], records: list[Record]
) -> None:
    write(file, {**facts, **missing}, records)


_TOLD = (
    "what", "op", "routing", "pass", "implementation", "kernel", "share", "triton_cache", "tbs",
    "of_floor", "of_bare_op", "launches", "allocations", "seconds", "mib", "tokens",
    "checkpoints", "tokens_per_second", "peak_mib", "first_step_seconds",
)  # fmt: skip


def _shown(record: Record) -> Iterator[object]:
    for key in _TOLD:
        if key in record:
            yield record[key]
    if OURS in record.get("tflops", {}):
        yield f"{record['tflops'][OURS]:.0f} TF/s"
    for quartiles in ("ratio", "host_us", "host_ratio"):
        if quartiles in record:
            yield {name: median for name, (_, median, _) in record[quartiles].items()}
    if "wrong" in record:
        yield f"WRONG: {record['wrong']}: {record['errors']} {record.get('failed', '')}"


def _parse() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda", description=(__doc__ or "").splitlines()[0]
    )
    usual = [part for part in PARTS if part not in BY_NAME]
    parser.add_argument("--only", type=names, default=usual, help=f"of {','.join(PARTS)}")
    parser.add_argument("--shapes", type=names, help="of the suite; default: all")
    parser.add_argument(
        "--peers", type=names, default=list(peers.PEERS), help=f"of {','.join(peers.PEERS)}"
    )
    parser.add_argument("--seconds", type=float, default=460, help="of the whole run")
    parser.add_argument("--case-seconds", type=float, default=0.8, help="of one comparison")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--gpus", type=int, default=1, help="that share the shapes of one part")
    parser.add_argument("--tiny", action="store_true", help="sizes for Triton's interpreter")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results")
    parser.add_argument(
        "--compilers", type=int, default=8, help="processes that compile ahead; 0: none"
    )
    args = parser.parse_args()
    known = [shape.name for shape in (suite.TINY_SUITE if args.tiny else suite.SUITE)]
    args.shapes = args.shapes or known
    for given, allowed in ((args.only, PARTS), (args.shapes, known), (args.peers, peers.PEERS)):
        if unknown := set(given) - set(allowed):
            parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(allowed)}")
    if torch.device(args.device).type != "cuda" and args.results is None:
        parser.error("without a GPU nothing is measured: --results says where to put that")
    args.results = args.results or RESULTS
    if args.gpus > 1 and (len(args.only) != 1 or args.only[0] not in SHARED):
        parser.error(
            f"--gpus: expected --only to name one of {', '.join(SHARED)}, got {','.join(args.only)}"
        )
    check_gpus(parser, args.gpus)
    return args


def _share(args: argparse.Namespace) -> int:
    """Let each GPU measure its share of the shapes, then join what they wrote."""
    (part,) = args.only
    command = [
        sys.executable, "-m", "benchmarks.cuda", f"--only={part}", f"--seconds={args.seconds}",
        f"--case-seconds={args.case_seconds}", f"--compilers={args.compilers}",
        f"--peers={','.join(args.peers)}", *(["--tiny"] if args.tiny else []),
    ]  # fmt: skip
    code, files = share(command, "--shapes", args.shapes, args.gpus, part)
    if files:
        path = args.results / files[0].name
        join(files, path)
        print(f"wrote {path}")
    return code


def main() -> int:
    args = _parse()
    if args.gpus > 1:
        return _share(args)
    until = time.monotonic() + args.seconds
    torch.manual_seed(0)
    device = torch.device(args.device)
    bench = Bench(device, args.tiny, args.case_seconds)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        bench.seconds, bench.least_turns = 0.0, 2
    shapes = [s for s in (*suite.SUITE, *suite.TINY_SUITE) if s.name in args.shapes]
    facts = environment(bench)
    if device.type == "cuda" and args.compilers and "gemm" in args.only:
        print("compiling", flush=True)
        gemm.compile_ahead(bench, shapes, args.compilers)
    jobs: dict[str, Callable[[], None]] = {}
    ahead = AHEAD | {PEERS: functools.partial(peers.jobs_ahead, until=until, names=args.peers)}
    for part, jobs_of in ahead.items():
        jobs |= jobs_of(bench, shapes) if part in args.only else {}
    if device.type == "cuda" and args.compilers and jobs:
        print("compiling the experts, the layers and the peers", flush=True)
        experts.compile_ahead(jobs, args.compilers)
    warm_up_seconds = 2.0 if device.type == "cuda" else 0.0
    bench.warm_up(warm_up_seconds)
    bench.ceilings = ceilings(bench)
    facts["ceilings"] = bench.ceilings
    print(json.dumps(facts), flush=True)

    name, complete = device_name(device), True
    parts = PARTS | {
        PEERS: functools.partial(peers.cases, until=until, names=args.peers),
        BLOCKS: functools.partial(blocks.cases, until=until),
    }
    for part, cases_of in parts.items():
        if part not in args.only:
            continue
        print(part, flush=True)
        bench.warm_up(warm_up_seconds / 4)
        file = args.results / f"{name}_{part.replace('-', '_')}.json"
        told = FACTS[part]() if part in FACTS else {}
        save = functools.partial(save_part, file, {**facts, "part": part, **told})
        records, missing = run_part(cases_of(bench, shapes), until, save)
        complete &= not missing and not any("wrong" in record for record in records)
        told = {**told, **missing}
        print(f"wrote {file}", *(f"{what}: {which}" for what, which in told.items()), flush=True)

    if len(args.only) == 1:
        # Its ceilings stand in its own file.
        return 0 if complete else 1
    bench.warm_up(warm_up_seconds)
    measured = {"start": bench.ceilings, "end": ceilings(bench)}
    records = [{"when": when, **reached} for when, reached in measured.items()]
    write(args.results / f"{name}_ceilings.json", {**facts, "part": "ceilings"}, records)
    print(json.dumps(measured))
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())

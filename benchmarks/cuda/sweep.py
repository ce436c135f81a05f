# SPDX-License-Identifier: Apache-2.0
"""The whole expert block on shapes drawn from a seed, against compiled grouped_mm.

    python -m benchmarks.cuda.sweep [--seed 0] [--shapes 48] [--limit-gb 60] [--deadline 480]
    python -m benchmarks.cuda.sweep --named [--gpus 4]
    python -m benchmarks.cuda.sweep --join FILE FILE [--gpus 2]

It writes benchmarks/results/<gpu>_sweep.json (or _named.json) after each shape. A shape that stands
there is not measured again, so a run that was cut short goes on. Each batch of shapes is compiled
by several processes before it is measured. A shape that has begun is finished after the deadline:
leave it half a minute.

With --gpus N, so many GPUs of the host share the shapes, each in a process of its own (--only,
--device, --results). Their files are joined (--join), and stay in build/ for a run that goes on.
With --join, --gpus says how many GPUs the files are of, where a GPU measured several.

Without a GPU, `--device cpu --tiny --results DIR` runs its flow and measures nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import suite
from benchmarks.cuda import experts, gpt_oss
from benchmarks.cuda.ahead import compile_within
from benchmarks.cuda.experts import BOTH, COMPILED, EAGER, PASSES, Block, Implementation
from benchmarks.cuda.gpt_oss import GptOssBlock
from benchmarks.cuda.sampled import SampledComparison
from benchmarks.cuda.share import check_gpus, share
from benchmarks.cuda.sweep_file import Results, join, summary
from benchmarks.cuda.timing import (
    OURS,
    Bench,
    Record,
    ceilings,
    device_name,
    environment,
    free,
)
from benchmarks.draws import GB, Draw, draw_shapes, num_bytes, sizes
from benchmarks.suite import Shape

RESULTS = Path(__file__).resolve().parents[1] / "results"
logger = logging.getLogger("moe_ops.benchmarks")

# Of a comparison: the least turns, and seconds of device time in which there may be more.
TURNS, CASE_SECONDS = 12, 0.3
# Of what a shape needs, for what it takes at most while it is compiled.
MARGIN = 1.5


# One shape


def make_block(bench: Bench, shape: Shape) -> Block:
    return GptOssBlock(bench, shape) if shape.is_gpt_oss else Block(bench, shape)


def implementations_of(block: Block, backend: str | None) -> dict[str, Implementation]:
    """Ours, and transformers' grouped_mm, compiled for these sizes where there is a backend."""
    if isinstance(block, GptOssBlock):
        module = gpt_oss.grouped_mm_module(block)
    else:
        module = experts.grouped_mm_module(block)
    found = {OURS: gpt_oss.ours(block)}
    if backend is None:
        found[EAGER] = experts.grouped_mm(block, module)
    else:
        compiled = experts.compiled(module, dynamic=False, backend=backend)
        found[COMPILED] = experts.grouped_mm(block, compiled)
    return found


def backend_of(bench: Bench) -> str | None:
    """On the CPU it would compile C++ for nothing."""
    return "inductor" if bench.device.type == "cuda" else None


def run_shape(
    bench: Bench, draw: Draw, backend: str | None = None, gpu: str | None = None
) -> list[Record]:
    """The records of both passes.

    Args:
        bench: where and how long.
        draw: the shape and its routing.
        backend: compiles grouped_mm; by default Inductor on a GPU.
        gpu: whose configurations are told, by a name that `explain` knows; this GPU's if None.
    """
    # Without it Dynamo goes over to dynamic sizes after the first shape.
    torch._dynamo.reset()
    shape = draw.shape
    block = make_block(bench, shape)
    found = implementations_of(block, backend or backend_of(bench))
    (peer,) = set(found) - {OURS}
    comparison = SampledComparison(block, block.route(draw.routing), found)
    told = configurations(shape, gpu) if gpu or bench.device.type == "cuda" else {}
    records = []
    for name in PASSES:
        record = comparison.measure(name, {peer: (peer, OURS)})
        of_shape = {
            "shape": shape.name,
            "routing": draw.routing,
            "T": shape.num_tokens,
            "H": shape.hidden_size,
            "I": shape.intermediate_size,
            "E": shape.num_experts,
            "K": shape.top_k,
            "pass": name,
        }
        records.append({**of_shape, **record, **({"configs": told} if name == BOTH else {})})
    return records


def configurations(shape: Shape, gpu: str | None = None) -> dict[str, str]:
    """By product, where its configuration comes from and which kernel computes it.

    Empty where `explain` cannot say it.
    """
    from moe_ops.cli import explain

    parser = argparse.ArgumentParser("explain")
    explain.add_arguments(parser)
    given = {
        "hidden-size": shape.hidden_size,
        "intermediate-size": shape.intermediate_size,
        "num-experts": shape.num_experts,
        "top-k": shape.top_k,
        "num-tokens": shape.num_tokens,
        **({"gpu": gpu} if gpu else {}),
    }
    arguments = [f"--{name}={value}" for name, value in given.items()]
    if shape.is_gpt_oss:
        arguments += ["--bias", "--transposed"]
    try:
        (text,) = explain.explain(parser.parse_args([*arguments, "--json"]), parser)
    except SystemExit as error:
        logger.warning("%s is not explained: %s", shape.name, error)
        return {}
    return {
        f"{row['projection']} {row['kind']}": f"{row['source']}, {row['kernel']}"
        for row in json.loads(text)["products"]
    }


def compile_shape(bench: Bench, draw: Draw) -> None:
    """Leaves in the caches on disk what Triton and Inductor compile for a shape."""
    block = make_block(bench, draw.shape)
    found = implementations_of(block, backend_of(bench))
    experts.run_once(block, block.route(draw.routing), found.values())
    del block, found
    free()


# All shapes


def run(
    bench: Bench,
    draws: Sequence[Draw],
    results: Results,
    until: float,
    compilers: int,
    compile_batch: Callable[..., None] = compile_within,
) -> list[str]:
    """Measure what the results have not, until `until` (time.monotonic); the names of the rest."""
    waiting = [draw for draw in draws if not results.has(draw)]
    batch = max(1, 2 * compilers)
    for start in range(0, len(waiting), batch):
        of_batch = waiting[start : start + batch]
        if compilers and bench.device.type == "cuda" and time.monotonic() < until:
            jobs = {
                draw.shape.name: (
                    functools.partial(compile_shape, bench, draw),
                    MARGIN * num_bytes(draw.shape),
                )
                for draw in of_batch
            }
            free_bytes, _ = torch.cuda.mem_get_info(bench.device)
            begin = time.monotonic()
            compile_batch(jobs, compilers, free_bytes, until)
            print(f"compiled {len(jobs)} shapes: {time.monotonic() - begin:.0f} s", flush=True)
        for i, draw in enumerate(of_batch):
            if time.monotonic() > until:
                return [each.shape.name for each in waiting[start + i :]]
            begin = time.monotonic()
            try:
                records = run_shape(bench, draw)
            except Exception as error:
                # What it cost to come here is worth the rest of the numbers.
                logger.exception("%s failed", draw.shape.name)
                results.fail(draw, error)
            else:
                results.add(draw, records)
                print(*_line(records), f"{time.monotonic() - begin:.0f} s", flush=True)
            free()
    return []


def _line(records: Sequence[Record]) -> Iterator[str]:
    """One shape, for the eye: its sizes, and by pass ours, the ratio and the peak memories."""
    first = records[0]
    shape = Shape(first["shape"], *(first[key] for key in "THIEK"))
    yield f"{shape.name} {first['routing']} {sizes(shape)}:"
    for record in records:
        ours = record["milliseconds"].get(OURS, [math.nan] * 3)[1]
        ratio = [f"{middle:.2f}x" for _, middle, _ in record["ratio"].values()]
        wrong = f"WRONG {record['wrong']} {record['errors']}" if "wrong" in record else ""
        yield " ".join([record["pass"], f"{ours:.3f} ms", *ratio, wrong]).strip() + ","
        peaks = {who: mib["peak"] for who, mib in record.get("mib", {}).items() if mib}
        if peaks:
            yield f"peak {peaks} MiB,"


# The command


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda.sweep", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shapes", type=int, default=48, help="how many are drawn")
    parser.add_argument("--limit-gb", type=float, default=60, help="what exceeds it is drawn again")
    parser.add_argument("--named", action="store_true", help="named models in place of draws")
    parser.add_argument("--only", type=lambda text: text.split(","), help="of these, by name")
    parser.add_argument("--deadline", type=float, default=480, help="seconds")
    parser.add_argument("--turns", type=int, default=TURNS, help="of each comparison, at least")
    parser.add_argument("--compilers", type=int, default=8, help="processes of a GPU; 0: none")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--gpus", type=int, default=1, help="of this host, that share the shapes")
    parser.add_argument("--tiny", action="store_true", help="sizes for Triton's interpreter")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results")
    parser.add_argument(
        "--join",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="measure nothing, make one file of these",
    )
    args = parser.parse_args()
    if args.join:
        if len({path.name for path in args.join}) > 1:
            parser.error("the files of one part have one name")
        return args
    if torch.device(args.device).type != "cuda" and args.results is None:
        parser.error("without a GPU nothing is measured: --results says where to put that")
    check_gpus(parser, args.gpus)
    args.draws, args.repeated = _draws(args)
    known = [draw.shape.name for draw in args.draws]
    if unknown := set(args.only or ()) - set(known):
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    if args.only:
        args.draws = [draw for draw in args.draws if draw.shape.name in args.only]
    return args


def _draws(args: argparse.Namespace) -> tuple[list[Draw], list[str]]:
    if args.named or args.tiny:
        shapes = suite.TINY_SUITE if args.tiny else suite.NAMED
        return [Draw(shape, "uniform") for shape in shapes], []
    return draw_shapes(args.seed, args.shapes, args.limit_gb * GB)


def main() -> int | str:
    until = time.monotonic()
    args = _parse()
    if args.join:
        return _join(args)
    if args.gpus > 1:
        return _share(args)
    until += args.deadline
    torch.manual_seed(0)
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    bench = Bench(device, args.tiny, CASE_SECONDS if on_gpu else 0.0, args.turns)
    part = "named" if args.named else "sweep"
    facts = {**environment(bench), "part": part, "repeated": args.repeated}
    facts |= experts.grouped_mm_facts()
    if not args.named:
        facts["limit_gb"] = args.limit_gb
    path = (args.results or RESULTS) / f"{device_name(device)}_{part}.json"
    try:
        results = Results(path, facts)
    except ValueError as error:
        return f"{error}"
    if on_gpu:
        torch.cuda.set_device(device)
        bench.warm_up(2.0)
    facts["ceilings"] = bench.ceilings = ceilings(bench)
    free()
    print(json.dumps(facts), flush=True)
    left = run(bench, args.draws, results, until, args.compilers)
    if left:
        print(f"left, no time: {', '.join(left)}")
    if results.failed:
        print(f"failed: {results.failed}")
    return 1 if _tell(results.records) or left or results.failed else 0


def _tell(records: Sequence[Record]) -> list[str]:
    """Print the summary, and return the shapes whose results were wrong."""
    print(*summary(records), sep="\n")
    wrong = [record["shape"] for record in records if "wrong" in record]
    if wrong:
        print(f"wrong: {wrong}")
    return wrong


def _share(args: argparse.Namespace) -> int | str:
    """Let each GPU measure its share of the shapes, then join what they wrote."""
    part = "named" if args.named else "sweep"
    given = {
        "--seed": args.seed,
        "--shapes": args.shapes,
        "--limit-gb": args.limit_gb,
        "--deadline": args.deadline,
        "--turns": args.turns,
        "--compilers": args.compilers,
    }
    command = [sys.executable, "-m", "benchmarks.cuda.sweep", *(["--named"] if args.named else [])]
    command += [f"{name}={value}" for name, value in given.items()]
    names = [draw.shape.name for draw in args.draws]
    code, args.join = share(command, "--only", names, args.gpus, part, goes_on=True)
    return (_join(args) if args.join else 0) or code


def _join(args: argparse.Namespace) -> int | str:
    path = (args.results or RESULTS) / args.join[0].name
    try:
        _tell(join(args.join, path, args.gpus if args.gpus > 1 else None))
    except (OSError, ValueError) as error:
        return f"{error}"
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Compute what expert parallelism costs, on a CPU and without a network.

    python -m benchmarks.expert_parallel.simulate judge FILE [--calibrate qwen3-30b] [--rates FILE]
    python -m benchmarks.expert_parallel.simulate plan [--write docs/scaling.md]

`judge` takes the rates from one shape of a result of `python -m benchmarks.expert_parallel`, computes
every other time of it, and says whether all are within 20% of what was measured. With `--rates` they
come from another run, such as one on fewer GPUs. `plan` computes what
8, 64 and 1,024 GPUs need, with the assumptions beside it. costs.py has the formulas.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.expert_parallel.calibration import (
    SHAPES,
    WITHIN,
    Measured,
    Record,
    calibrate,
    judge,
)
from benchmarks.expert_parallel.costs import (
    Costs,
    Layout,
    Machine,
    Rates,
    fsdp_bytes,
    rate_of_experts,
)
from benchmarks.expert_parallel.records import BOTH, FORWARD, MAIN, NAMES, NUM_TOKENS
from benchmarks.report.columns import Column, Table, markdown
from benchmarks.report.page import between

RESULTS = Path(__file__).resolve().parents[1] / "results"
MARKERS = ("<!-- costs: begin -->", "<!-- costs: end -->")
MEASURED = "h200_expert_parallel_2.json"
CAPACITY_FACTOR = 1.25
# GPUs, and how many of them share a layer's experts; FSDP2 shards over the others.
MESHES = ((8, 8), (64, 8), (64, 64), (1024, 8), (1024, 64))
# One H200 of a DGX H200. Its memory as benchmarks/results/h200_ceilings.json has it.
MACHINE = Machine(host_size=8, within=450e9, between=50e9, memory=4.3e12)
SHARE, OVERHEAD = 0.7, 20e-6

_H200 = "[NVIDIA H200](https://www.nvidia.com/en-us/data-center/h200/)"
_DGX = (
    "[DGX H100/H200 guide](https://docs.nvidia.com/dgx/dgxh100-user-guide/"
    "introduction-to-dgxh100.html)"
)


@dataclass(frozen=True)
class Mesh:
    """A shape on so many GPUs."""

    num_gpus: int
    costs: Costs

    @property
    def shape(self) -> str:
        return self.costs.layout.shape.name

    @property
    def num_shards(self) -> int:
        return self.num_gpus // self.costs.layout.world_size

    @property
    def fsdp(self) -> float:
        return fsdp_bytes(self.costs.layout, self.num_shards)

    def needed(self, bytes_of_peers: float) -> float:
        """Bytes a second at which both passes' exchanges last as long as their experts."""
        return 2 * bytes_of_peers / self.costs.experts(both=True)


def assumptions(results: Path) -> tuple[Machine, Rates, list[Record]]:
    """The machine, the rates, and a row for each of them that says where it comes from.

    The rates are those that were measured on several GPUs, where that is committed.
    """
    machine = MACHINE
    shape = SHAPES[MAIN]
    file = results / MEASURED
    if file.exists():
        records = json.loads(file.read_text(encoding="utf-8"))["cases"]
        measured = Measured(records, MAIN)
        found, rates = calibrate(measured, replace(shape, num_tokens=NUM_TOKENS), machine)
        machine = replace(machine, within=found.within)
        times = f"times of {MAIN}, {MEASURED}"
        link = f"fitted to the {times}: a copy to a peer"
        share = f"fitted to the {times}, {measured.transport}"
        start = f"measured with few tokens: {times}, {measured.transport}"
        speed = f"fitted to the {times}, experts alone"
    else:
        speeds, told = _speeds_of_one_gpu(results, Layout(shape, 1, 1), machine)
        rates = Rates(SHARE, SHARE, OVERHEAD, OVERHEAD, *speeds)
        link = f"{_H200}: NVLink, 900 GB/s both ways together"
        share = "assumed: what `make bench-ep` asks of a dispatch at least"
        start = "assumed"
        speed = f"measured: {told}"
    rows = [
        ("GPUs of a host", f"{machine.host_size}", _DGX),
        ("link within a host, each way", f"{machine.within / 1e9:.0f} GB/s a GPU", link),
        (
            "link between hosts, each way",
            f"{machine.between / 1e9:.0f} GB/s a GPU",
            f"{_DGX}: a 400 Gb/s adapter for each GPU",
        ),
        ("memory", f"{machine.memory / 1e12:.1f} TB/s", "measured: a copy, h200_ceilings.json"),
        (
            "share of a link's bandwidth that rows of a dispatch, a combine get",
            f"{rates.dispatch:.2f}, {rates.combine:.2f}",
            share,
        ),
        (
            "time that a dispatch, a combine takes at least",
            f"{rates.dispatch_seconds * 1e6:.0f}, {rates.combine_seconds * 1e6:.0f} us",
            start,
        ),
        (
            "experts' products, forward, forward+backward",
            f"{rates.forward / 1e12:.0f}, {rates.both / 1e12:.0f} TF/s",
            speed,
        ),
        ("tokens of a GPU, elements, routing", f"{NUM_TOKENS}, bf16, uniform", "chosen"),
    ]
    return (
        machine,
        rates,
        [dict(zip(("assumed", "value", "from"), row, strict=True)) for row in rows],
    )


def _speeds_of_one_gpu(results: Path, layout: Layout, machine: Machine) -> tuple[list[float], str]:
    """FLOP/s of the products in each pass, from the block as one GPU computes it, and its times."""
    cases = json.loads((results / "h200_experts.json").read_text(encoding="utf-8"))["cases"]
    seconds = []
    for name in (FORWARD, BOTH):
        case = next(
            case
            for case in cases
            if (case["shape"], case["routing"], case["pass"])
            == (layout.shape.name, "uniform", name)
        )
        seconds.append(case["milliseconds"]["moe_ops"][1] / 1e3)
    speeds = [
        rate_of_experts(layout, machine, name == BOTH, time)
        for name, time in zip((FORWARD, BOTH), seconds, strict=True)
    ]
    told = " and ".join(f"{time * 1e3:.4g}" for time in seconds)
    return speeds, f"{told} ms of {layout.shape.name} on one GPU, h200_experts.json"


def meshes(machine: Machine, rates: Rates) -> Iterator[Mesh]:
    for name in NAMES:
        shape = replace(SHAPES[name], num_tokens=NUM_TOKENS)
        for num_gpus, world_size in MESHES:
            layout = Layout(shape, world_size, machine.host_size)
            yield Mesh(num_gpus, Costs(layout, machine, rates))


def _sizes(mesh: Mesh) -> Record:
    layout = mesh.costs.layout
    message, (within, between_hosts) = layout.message(with_ids=True), layout.peers
    bounded = replace(layout, capacity_factor=CAPACITY_FACTOR)
    host_size = min(layout.host_size, layout.world_size)
    hosts = layout.fill(host_size)
    # A token that its own host's experts do not take alone goes to every other host once.
    once = hosts * (1 - host_size / layout.world_size)
    return {
        "shape": mesh.shape,
        "ep": f"{layout.world_size}",
        "ranks": f"{layout.fill():.2f}",
        "hosts": f"{hosts:.2f}",
        "to a peer": f"{message / 1e6:.1f}",
        "within": f"{message * within / 1e6:.0f}",
        "between": f"{message * between_hosts / 1e6:.0f}",
        "once": f"{layout.shape.num_tokens * once * layout.row_bytes / 1e6:.0f}",
        "rows": f"{layout.rows_memory / 1e9:.2f}, {bounded.rows_memory / 1e9:.2f}",
        "slots": (
            f"{layout.pre_activation_memory / 1e9:.2f}, {bounded.pre_activation_memory / 1e9:.2f}"
        ),
    }


def _times(mesh: Mesh) -> Record:
    costs = mesh.costs
    layout = costs.layout
    both_ways = layout.message(with_ids=True) + layout.message(with_ids=False)
    needed = " / ".join(
        f"{mesh.needed(n * both_ways) / 1e9:.0f}" if n else "-" for n in layout.peers
    )
    return {
        "shape": mesh.shape,
        "GPUs": f"{mesh.num_gpus:,}",
        "fsdp x ep": f"{mesh.num_shards} x {layout.world_size}",
        "dispatch": f"{costs.dispatch * 1e6:.0f}",
        "combine": f"{costs.combine * 1e6:.0f}",
        "experts": f"{costs.experts(both=True) * 1e3:.1f}",
        "block": f"{costs.block(both=True) * 1e3:.1f}",
        "share": f"{costs.communication(both=True):.0%}",
        "overlap": f"{costs.overlapped(both=True):.2f}x",
        "needed": needed,
        "fsdp": f"{mesh.fsdp / 1e9:.2f}",
        "fsdp ms": f"{mesh.fsdp / costs.machine.between * 1e3:.1f}",
    }


def _table(about: str, **headings: str) -> Table:
    columns = tuple(Column(heading, key.replace("_", " ")) for key, heading in headings.items())
    return Table(columns, about)


ASSUMED = Table(tuple(Column(key, key) for key in ("assumed", "value", "from")))
SIZES = _table(
    "What one layer's dispatch sends from each GPU, and what the capacity takes. MB are 1e6 bytes, GB "
    f"1e9; two numbers are C = M and capacity_factor={CAPACITY_FACTOR}. `rows` is one buffer of "
    "W * C rows: the received rows, the outputs and each half of a pool are as large. `slots` is the "
    "pre-activations of W * C * min(K, L) slots, most of which no token fills. `once a host` is what "
    "would go to other hosts if a token crossed to each host once.",
    shape="shape", ep="ep", ranks="ranks a token visits", hosts="hosts", to_a_peer="MB to a peer",
    within="MB within the host", between="MB to other hosts", once="MB once a host",
    rows="rows, GB", slots="slots, GB",
)  # fmt: skip
TIMES = _table(
    "Times of one layer on each GPU: dispatch and combine; experts and block, forward and backward "
    "with rows kept; the exchanges' share of the block; the block's time over what is left where "
    "exchange and experts hide each other wholly; the GB/s that each link must carry, within / "
    "between hosts, for that; and what FSDP2 sends for the layer's experts in a step, with its time "
    "between hosts.",
    shape="shape", GPUs="GPUs", fsdp_x_ep="fsdp x ep", dispatch="dispatch, us",
    combine="combine, us", experts="experts, ms", block="block, ms", share="exchange",
    overlap="overlap", needed="GB/s needed", fsdp="FSDP2, GB", fsdp_ms="FSDP2, ms",
)  # fmt: skip


def plan(results: Path = RESULTS) -> Iterator[str]:
    """The lines of the page: assumptions, sizes and times."""
    machine, rates, assumed = assumptions(results)
    yield "Computed, not measured, from these assumptions:\n"
    yield from markdown(ASSUMED, assumed)
    found = list(meshes(machine, rates))
    # Sizes do not depend on how many GPUs there are beside those of one "ep".
    of_ep = {(mesh.shape, mesh.costs.layout.world_size): mesh for mesh in found}
    yield from markdown(SIZES, [_sizes(mesh) for mesh in of_ep.values()])
    yield from markdown(TIMES, [_times(mesh) for mesh in found])


def verdict(
    records: list[Record], calibrated_on: str, rates_of: list[Record] | None = None
) -> Iterator[str]:
    """A line for each prediction, then whether all are within 20%."""
    cases = list(judge(records, calibrated_on, MACHINE, rates_of))
    for case in cases:
        yield (
            f"{case.shape} {case.what}: computed {case.predicted * 1e6:.0f} us, measured "
            f"{case.measured * 1e6:.0f} us, {case.error:+.0%}"
        )
    missed = [case for case in cases if not abs(case.error) <= WITHIN]
    said = f"{len(missed)} of {len(cases)} are not" if missed else f"all {len(cases)} are"
    yield f"{said} within {WITHIN:.0%}; calibrated on {calibrated_on}"


def _records(file: Path) -> list[Record]:
    records: list[Record] = json.loads(file.read_text(encoding="utf-8"))["cases"]
    return records


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.expert_parallel.simulate",
        description=(__doc__ or "").splitlines()[0],
    )
    commands = parser.add_subparsers(dest="command", required=True)
    judged = commands.add_parser("judge", help="computed times beside a run's measured ones")
    judged.add_argument("file", type=Path)
    judged.add_argument("--calibrate", default=MAIN, help="the shape that gives the rates")
    judged.add_argument("--rates", type=Path, help="the run that gives them; default: FILE")
    planned = commands.add_parser("plan", help="what 8, 64 and 1,024 GPUs need")
    planned.add_argument("--write", type=Path, help="a page to write it to, between its markers")
    args = parser.parse_args(arguments)
    if args.command == "judge":
        records = _records(args.file)
        rates_of = _records(args.rates) if args.rates else None
        of_shapes = {record["shape"] for record in rates_of or records}
        known = [name for name in SHAPES if name in of_shapes]
        if args.calibrate not in known:
            file = args.rates or args.file
            parser.error(f"--calibrate: expected one of {known} of {file}, got {args.calibrate}")
        _print(verdict(records, args.calibrate, rates_of))
    elif args.write is None:
        _print(plan())
    else:
        text = args.write.read_text(encoding="utf-8")
        args.write.write_text(between(text, MARKERS, plan()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

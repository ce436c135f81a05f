# SPDX-License-Identifier: Apache-2.0
"""moe_ops on a CPU, against torch._grouped_mm, transformers' experts, and its own separate ops.

    python -m benchmarks.cpu gemm       grouped_gemm, dX and dW  vs  torch._grouped_mm
    python -m benchmarks.cpu experts    transformers' Qwen3MoeExperts: "moe_ops"  vs  "grouped_mm"
    python -m benchmarks.cpu fused      fused_experts  vs  the ops that it is made of

Each writes benchmarks/results/cpu_<what>.json, from which `python -m benchmarks.report` makes the
tables of docs/results/cpu.md. Run from the root of the repository.

The repeats of a case are spread over `--rounds`, each of which goes through all the cases. What a
visit of a case found is appended to a log beside the results, cpu_<what>.visits.jsonl, from which
`--resume` goes on; a case is in the results when every round has visited it.

E num_experts, H hidden_size, I intermediate_size, K top_k, T num_tokens, R = T * K routed rows;
N and D, the out_features and in_features of a projection.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moe_ops
from benchmarks import timing
from benchmarks.timing import OURS, PEER

RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUM_EXPERTS = (8, 16, 32, 64)
HIDDEN_SIZES = (256, 512, 1024)
ROUTINGS = ("uniform", "skewed")

# Without these, glibc gives the memory of every larger tensor back to the kernel, which fills it
# with zeros page by page the next time; whom that hits is chance, and it can take longer than the
# products.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}

Case = dict[str, Any]
Run = Callable[..., Any]


def popularity(routing: str, num_experts: int) -> Tensor:
    """How often each expert is chosen: all alike, or by Zipf's law, in random order."""
    return (
        1.0 / (1 + torch.randperm(num_experts)) if routing == "skewed" else torch.ones(num_experts)
    )


def intermediate_size_of(hidden_size: int, num_experts: int) -> int:
    """Models of many experts have small ones."""
    return {8: hidden_size, 16: hidden_size, 32: hidden_size // 2}.get(
        num_experts, hidden_size // 4
    )


# The grouped GEMM


def gemm_cases(args: argparse.Namespace) -> Iterator[Case]:
    for dtype, num_experts, hidden_size, num_rows, projection, routing, counts in itertools.product(
        args.dtypes,
        args.num_experts,
        args.hidden_sizes,
        args.rows,
        ("up", "down"),
        ROUTINGS,
        args.counts,
    ):
        intermediate_size = intermediate_size_of(hidden_size, num_experts)
        up = projection == "up"
        yield {
            "dtype": dtype,
            "E": num_experts,
            "N": 2 * intermediate_size if up else hidden_size,
            "D": hidden_size if up else intermediate_size,
            "R": num_rows,
            "routing": routing,
            # Whether every turn has a routing of its own, as every step of a training has.
            "counts": counts,
        }


def run_gemm(case: Case, turns: int) -> Iterator[Case]:
    dtype = DTYPES[case["dtype"]]
    num_experts, num_rows = case["E"], case["R"]
    x = torch.randn(num_rows, case["D"]).to(dtype)
    weight = torch.randn(num_experts, case["N"], case["D"]).to(dtype)
    dy = torch.randn(num_rows, case["N"]).to(dtype)
    expected = popularity(case["routing"], num_experts)

    def draw() -> tuple[Tensor, Tensor]:
        ids = torch.multinomial(expected, num_rows, replacement=True)
        counts = ids.bincount(minlength=num_experts).int()
        return counts, counts.cumsum(0, dtype=torch.int32)

    checked = draw()

    dx_op = torch.ops.moe.grouped_gemm_dx.default
    dw_op = torch.ops.moe.grouped_gemm_dw.default
    ours: dict[str, Run] = {
        "forward": lambda counts: moe_ops.grouped_gemm(x, weight, counts),
        "dX": lambda counts: dx_op(dy, weight, counts)[0],
        "dW": lambda counts: dw_op(dy, x, counts)[0],
    }
    peer: dict[str, Run] = {
        "forward": lambda ends: torch._grouped_mm(x, weight.transpose(1, 2), ends),
        "dX": lambda ends: torch._grouped_mm(dy, weight, ends),
        "dW": lambda ends: torch._grouped_mm(dy.t(), x, ends),
    }
    for name, run in ours.items():
        counts, ends = checked
        reference = _gemm_reference(name, x.double(), weight, dy.double(), ends.tolist())
        worst = {
            OURS: timing.worst_error([run(counts)], [reference]),
            PEER: timing.worst_error([peer[name](ends)], [reference]),
        }
        routings = [checked]
        if case["counts"] == "new":
            # Neither contender has met any: who came second would find a compiled product.
            routings = [draw() for _ in range(2 * (turns + timing.WARM_UPS))]

        def turn_ours(turn: int, run: Run = run, routings: Any = routings) -> object:
            return run(routings[2 * turn % len(routings)][0])

        def turn_peer(turn: int, run: Run = peer[name], routings: Any = routings) -> object:
            return run(routings[(2 * turn + 1) % len(routings)][1])

        record = timing.compare({OURS: turn_ours, PEER: turn_peer}, worst, dtype, turns)
        yield {**case, "pass": name, **record}


def _gemm_reference(name: str, x: Tensor, weight: Tensor, dy: Tensor, ends: list[int]) -> Tensor:
    groups = list(zip([0, *ends], ends, range(len(ends)), strict=False))
    if name == "dW":
        return torch.stack([dy[start:end].t() @ x[start:end] for start, end, _ in groups])
    left, right = (x, weight.transpose(1, 2)) if name == "forward" else (dy, weight)
    return torch.cat([left[start:end] @ right[e].double() for start, end, e in groups])


# transformers' experts


def experts_cases(args: argparse.Namespace) -> Iterator[Case]:
    for mode, dtype, num_experts, hidden_size, num_rows, routing in itertools.product(
        args.modes, args.dtypes, args.num_experts, args.hidden_sizes, args.rows, ROUTINGS
    ):
        top_k = 2 if num_experts == 8 else 4
        yield {
            "mode": mode,
            "dtype": dtype,
            "E": num_experts,
            "H": hidden_size,
            "I": intermediate_size_of(hidden_size, num_experts),
            "K": top_k,
            "T": num_rows // top_k,
            "routing": routing,
        }


def run_experts(case: Case, turns: int) -> Iterator[Case]:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    import moe_ops.integrations.transformers as integration

    integration.register()
    dtype = DTYPES[case["dtype"]]
    config = Qwen3MoeConfig(
        hidden_size=case["H"],
        moe_intermediate_size=case["I"],
        num_experts=case["E"],
        num_experts_per_tok=case["K"],
    )
    experts = Qwen3MoeExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    experts = experts.to(dtype)
    hidden_states = torch.randn(case["T"], case["H"]).to(dtype).requires_grad_()
    grad_output = torch.randn(case["T"], case["H"]).to(dtype)
    expected = popularity(case["routing"], case["E"]).expand(case["T"], -1)

    def draw() -> tuple[Tensor, Tensor]:
        ids = torch.multinomial(expected, case["K"])
        weights = torch.randn(case["T"], case["K"]).softmax(1).to(dtype)
        return ids, weights.requires_grad_()

    # Every turn of every pass has a routing that neither contender has met.
    num_routings = 2 * (turns + timing.WARM_UPS)
    checked = draw()

    def forward(module: nn.Module, i: int) -> tuple[Tensor, ...]:
        return (module(hidden_states, *routings[i]),)

    def forward_backward(module: nn.Module, i: int) -> tuple[Tensor, ...]:
        ids, weights = routings[i]
        output = module(hidden_states, ids, weights)
        leaves = (hidden_states, weights, *experts.parameters())
        return (output.detach(), *torch.autograd.grad(output, leaves, grad_output))

    modules: dict[str, nn.Module] = {
        OURS: _Experts(experts, "moe_ops"),
        PEER: _Experts(experts, "grouped_mm"),
    }
    if case["mode"] == "compiled":
        torch._dynamo.reset()
        for module in modules.values():
            module.compile(fullgraph=True)
    references = _experts_reference(experts, hidden_states, *checked, grad_output)
    for name, run in (("forward", forward), ("forward+backward", forward_backward)):
        routings = [checked]
        with torch.set_grad_enabled(run is forward_backward):
            worst = {
                contender: timing.worst_error(found := run(module, 0), references[: len(found)])
                for contender, module in modules.items()
            }
            routings = [draw() for _ in range(num_routings)]

            def turn_ours(turn: int, run: Run = run) -> object:
                return run(modules[OURS], 2 * turn)

            def turn_peer(turn: int, run: Run = run) -> object:
                return run(modules[PEER], 2 * turn + 1)

            record = timing.compare({OURS: turn_ours, PEER: turn_peer}, worst, dtype, turns)
        yield {**case, "pass": name, **record}


class _Experts(nn.Module):
    """One experts module run by the implementation named here; several share its weights."""

    def __init__(self, experts: Any, implementation: str) -> None:
        super().__init__()
        # Not a submodule: a copy of the object, whose configuration is its own.
        config = copy.copy(experts.config)
        config._experts_implementation = implementation
        self.experts = copy.copy(experts)
        self.experts.config = config

    def forward(self, *args: Tensor) -> Tensor:
        output: Tensor = self.experts(*args)
        return output


def _experts_reference(
    experts: nn.Module, hidden_states: Tensor, ids: Tensor, weights: Tensor, grad_output: Tensor
) -> list[Tensor]:
    """Output and gradients of transformers' own loop over the experts, in fp64."""
    module = _Experts(copy.deepcopy(experts).double(), "eager")
    leaves = [t.detach().double().requires_grad_() for t in (hidden_states, weights)]
    output = module(leaves[0], ids, leaves[1])
    leaves += module.parameters()
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output.double())]


# The whole layer of experts as one op


def run_fused(case: Case, turns: int) -> Iterator[Case]:
    dtype = DTYPES[case["dtype"]]
    num_experts, hidden_size, top_k = case["E"], case["H"], case["K"]

    def leaf(*shape: int) -> Tensor:
        values = torch.randn(shape) * shape[-1] ** -0.5
        return values.to(dtype).requires_grad_()

    leaves = [
        torch.randn(case["T"], hidden_size).to(dtype).requires_grad_(),
        leaf(num_experts, 2 * case["I"], hidden_size),
        leaf(num_experts, hidden_size, case["I"]),
    ]
    grad_output = torch.randn(case["T"], hidden_size).to(dtype)
    expected = popularity(case["routing"], num_experts).expand(case["T"], -1)

    def draw() -> tuple[Tensor, Tensor]:
        ids = torch.multinomial(expected, top_k).int()
        return ids, torch.randn(case["T"], top_k).softmax(1).requires_grad_()

    # Every turn of every pass has a routing that neither contender has met.
    num_routings = 2 * (turns + timing.WARM_UPS)
    checked = draw()

    def forward(experts: Run, i: int) -> tuple[Tensor, ...]:
        return (experts(*leaves, *routings[i]),)

    def forward_backward(experts: Run, i: int) -> tuple[Tensor, ...]:
        output = experts(*leaves, *routings[i])
        wanted = (*leaves, routings[i][1])
        return (output.detach(), *torch.autograd.grad(output, wanted, grad_output))

    wide = [t.detach().double().requires_grad_() for t in (*leaves, checked[1])]
    output = separate_ops(wide[0], wide[1], wide[2], checked[0], wide[3])
    grads = torch.autograd.grad(output, wide, grad_output.double())
    references = [output.detach(), *grads]
    contenders: dict[str, Run] = {OURS: moe_ops.fused_experts, PEER: separate_ops}
    for name, run in (("forward", forward), ("forward+backward", forward_backward)):
        routings = [checked]
        with torch.set_grad_enabled(run is forward_backward):
            worst = {
                contender: timing.worst_error(found := run(experts, 0), references[: len(found)])
                for contender, experts in contenders.items()
            }
            routings = [draw() for _ in range(num_routings)]

            def turn_ours(turn: int, run: Run = run) -> object:
                return run(contenders[OURS], 2 * turn)

            def turn_peer(turn: int, run: Run = run) -> object:
                return run(contenders[PEER], 2 * turn + 1)

            record = timing.compare({OURS: turn_ours, PEER: turn_peer}, worst, dtype, turns)
        yield {**case, "pass": name, **record}


def separate_ops(
    hidden_states: Tensor, gate_up_proj: Tensor, down_proj: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    """What moe_ops.fused_experts computes, op by op."""
    top_k = ids.shape[1]
    counts, gather, scatter = moe_ops.routing_indices(ids, gate_up_proj.shape[0])
    rows = moe_ops.grouped_gemm(
        hidden_states, gate_up_proj, counts, gather, top_k=top_k, permute_x=True
    )
    gate, up = rows.chunk(2, dim=-1)
    rows = moe_ops.grouped_gemm(nn.functional.silu(gate) * up, down_proj, counts)
    return moe_ops.unpermute(rows, gather, weights, top_k, scatter)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("gemm", "experts", "fused"))
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument(
        "--rounds",
        type=int,
        default=6,
        help="over all cases; each takes its share of the repeats",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=(1024, 4096))
    parser.add_argument(
        "--counts",
        nargs="+",
        choices=("same", "new"),
        default=("new",),
        help="of gemm, rows per expert: new in every turn, so that oneDNN compiles products, or the same",
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=tuple(DTYPES))
    parser.add_argument("--num-experts", type=int, nargs="+", default=NUM_EXPERTS)
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=HIDDEN_SIZES)
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=("eager",))
    parser.add_argument("--default-malloc", action="store_true", help="do not keep freed memory")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/cpu_<what>.json")
    parser.add_argument(
        "--others",
        type=float,
        help="leave out what runs while other processes use more CPUs than this",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the log of visits that a run has left"
    )
    args = parser.parse_args()
    if args.what != "experts" and "compiled" in args.modes:
        parser.error("--modes compiled: of experts alone")
    if args.what != "gemm" and tuple(args.counts) != ("new",):
        parser.error("--counts: of gemm alone; the others have new counts in every turn")
    if min(args.repeats, args.rounds) < 1:
        parser.error("--repeats and --rounds: at least 1")
    rounds = min(args.rounds, args.repeats)
    if not args.default_malloc and not KEEP_MEMORY.items() <= os.environ.items():
        # glibc reads them once, when the process starts.
        command = [sys.executable, "-m", "benchmarks.cpu", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **KEEP_MEMORY})

    env = timing.environment(args.threads)
    env["malloc"] = "glibc's default" if args.default_malloc else "freed memory is kept"
    env |= {"repeats": args.repeats, "rounds": rounds}
    if args.what == "experts":
        env["transformers"] = importlib.metadata.version("transformers")
    torch.manual_seed(0)
    cases, run = {
        "gemm": (gemm_cases, run_gemm),
        "experts": (experts_cases, run_experts),
        "fused": (experts_cases, run_fused),
    }[args.what]
    output = args.output or RESULTS / f"cpu_{args.what}.json"
    log = timing.VisitLog(output.with_suffix(".visits.jsonl"), env)
    try:
        log.open(resume=args.resume)
    except ValueError as error:
        parser.error(f"--resume: {error}")
    todo = list(cases(args))
    limited = args.others is not None
    for number, turns in enumerate(log.turns):
        for i, case in enumerate(todo):
            if log.has(number, case) or (limited and timing.others_now() > args.others):
                continue
            visits = list(run(case, turns))
            for visit in visits:
                shown = timing.summary([visit]).get("ratio", f"wrong: {visit['errors']}")
                place = f"round {number + 1}/{rounds}, {i + 1}/{len(todo)}"
                print(place, *case.values(), visit["pass"], shown, flush=True)
            if not limited or all(visit.get("others", 0.0) <= args.others for visit in visits):
                log.append(number, case, visits)
    records = [log.records(case) for case in todo]
    timing.write(output, env, [record for found in records for record in found])
    left_out = sum(not found for found in records)
    # Visits of cases that were not asked for this time are kept.
    if len(log.visits) == len(todo) * rounds:
        log.path.unlink()
    print(f"wrote {output}; {left_out} of {len(todo)} cases left out")


if __name__ == "__main__":
    main()

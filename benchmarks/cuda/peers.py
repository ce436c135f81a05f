# SPDX-License-Identifier: Apache-2.0
"""The whole expert block against other libraries of Mixture-of-Experts kernels, where they are installed.

Each adapter calls its library by the Python interface that the library documents, and says whether
it has been run. A comparison has a process of its own: a peer may patch other packages when it is
imported, or leave the device in an unusable state. What is not installed is named in the results.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cuda.experts import (
    BOTH,
    FORWARD,
    PASSES,
    ROOT,
    Block,
    Comparison,
    Implementation,
    count_experts,
    ours,
)
from benchmarks.cuda.sweep_file import ABSENT, PRESENT
from benchmarks.cuda.timing import OURS, Bench, Case, Record, rounded
from benchmarks.suite import Shape

# Starts the line of standard output that holds the records; a peer may print others.
_RECORDS = "records of the peer: "
# What is left of a deadline for the comparison once the peer has compiled and tuned.
_LEAST_SECONDS = 5.0


@dataclass(frozen=True)
class Library:
    """What has to be importable, and the distribution whose version is told."""

    module: str
    distribution: str


@dataclass(frozen=True)
class Peer:
    """A library, in one of the ways in which it computes a block.

    Attributes:
        library: its name in `LIBRARIES`.
        make: its way to compute a block.
        compiles_long: whether a first call takes minutes. Then they are made beside each other,
            before anything is measured.
        only_on: the one shape that it is measured on. None: all.
    """

    library: str
    make: Callable[[Block], Implementation]
    compiles_long: bool = False
    only_on: str | None = None


def scattermoe(block: Block) -> Implementation:
    """scattermoe.mlp.GLUMLP, whose first projection has the up rows before the gate rows.

    Written from its README and the signatures of its modules. Run in Triton's interpreter.
    """
    mlp: Any = importlib.import_module("scattermoe.mlp")
    shape = block.shape
    with torch.device("meta"):
        module = mlp.GLUMLP(
            input_size=shape.hidden_size,
            hidden_size=shape.intermediate_size,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            activation=nn.SiLU(),
        )
    module.experts.weight = nn.Parameter(_swap_halves(block.gate_up_proj.detach()))
    module.output_experts.weight = block.down_proj
    leaves = (
        block.hidden_states,
        module.experts.weight,
        module.output_experts.weight,
        block.topk_weights,
    )

    def forward(topk_ids: Tensor) -> Tensor:
        output: Tensor = module(block.hidden_states, block.topk_weights, topk_ids.long())
        return output

    return Implementation(forward, leaves, _swap_halves)


def _swap_halves(gate_up: Tensor) -> Tensor:
    return torch.cat(gate_up.chunk(2, 1)[::-1], 1)


def liger(block: Block) -> Implementation:
    """liger_kernel.ops.LigerFusedMoEFunction, which takes the block's own layouts.

    Written from its docstring and its tests' calls. Run on an H200. It takes fixed configurations:
    tuning them took more than three minutes for a shape.
    """
    os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")
    ops: Any = importlib.import_module("liger_kernel.ops")

    def forward(topk_ids: Tensor) -> Tensor:
        output: Tensor = ops.LigerFusedMoEFunction.apply(
            block.hidden_states, block.gate_up_proj, block.down_proj, topk_ids, block.topk_weights
        )
        return output

    return Implementation(forward, block.leaves)


def unsloth(block: Block) -> Implementation:
    """Two of unsloth.kernels.moe.grouped_gemm's grouped GEMMs, autotuned, and torch between them.

    As the block of its README: the first GEMM gathers, the second scatters to slot order, and the
    router weights follow. Written from that page and the documented signature, and not run.
    """
    interface: Any = importlib.import_module("unsloth.kernels.moe.grouped_gemm.interface")
    num_experts, top_k = block.shape.num_experts, block.shape.top_k

    def forward(topk_ids: Tensor) -> Tensor:
        flat_ids = topk_ids.view(-1)
        counts = count_experts(flat_ids, num_experts).int()
        gather = torch.argsort(flat_ids, stable=True).int()
        routing = {"m_sizes": counts, "gather_indices": gather, "topk": top_k, "autotune": True}
        up_options = {**routing, "permute_x": True, "is_first_gemm": True}
        down_options = {**routing, "permute_y": True, "is_first_gemm": False}
        rows = interface.grouped_gemm(X=block.hidden_states, W=block.gate_up_proj, **up_options)
        gate, up = rows.chunk(2, -1)
        slots = interface.grouped_gemm(X=F.silu(gate) * up, W=block.down_proj, **down_options)
        output: Tensor = (
            slots.view(-1, top_k, slots.shape[-1]) * block.topk_weights[:, :, None]
        ).sum(1)
        return output

    return Implementation(forward, block.leaves)


def sonicmoe(block: Block, interleaved: bool = False, autotuned: bool = False) -> Implementation:
    """sonicmoe.moe_general_routing_inputs, which takes the routing that it is given.

    Written from the comments above that function and transformers' call of it. Run on an H200 with
    the rows as transformers has them and the default configurations.

    Args:
        block: what is computed.
        interleaved: whether gate and up rows stand by turns, as the library wants them by default.
            Then it gets such a copy. Else they are as transformers has them.
        autotuned: whether its products tune themselves, which takes minutes for each shape. Else
            they take their default configurations.
    """
    library: Any = importlib.import_module("sonicmoe")
    if not autotuned:
        _take_default_configurations()
    swiglu = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU
    shape = block.shape
    device = block.bench.device
    tokens = torch.arange(shape.num_tokens, dtype=torch.int32, device=device)
    tokens = tokens.repeat_interleave(shape.top_k)
    gate_up_proj = block.gate_up_proj
    if interleaved:
        gate_up_proj = nn.Parameter(_by_turns(gate_up_proj.detach()))

    def forward(topk_ids: Tensor) -> Tensor:
        output: Tensor = library.moe_general_routing_inputs(
            block.hidden_states,
            block.topk_weights.reshape(-1).float(),
            tokens,
            topk_ids.view(-1),
            gate_up_proj.permute(1, 2, 0),
            None,
            block.down_proj.permute(1, 2, 0),
            None,
            shape.num_experts,
            torch.cuda.current_stream(device).cuda_stream,
            swiglu,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
            concat_layout=not interleaved,
        )[0]
        return output

    leaves = (block.hidden_states, gate_up_proj, block.down_proj, block.topk_weights)
    if interleaved:
        return Implementation(forward, leaves, _one_after_the_other)
    return Implementation(forward, leaves)


def _take_default_configurations() -> None:
    """Let quack's products not tune themselves: each has the function beside what tunes it."""
    interface: Any = importlib.import_module("quack.gemm_interface")
    for name in [name for name in vars(interface) if name.endswith("_tuned")]:
        function = getattr(getattr(interface, name), "fn", None)
        if function is not None:
            setattr(interface, name, partial(function, config=None))


def _by_turns(gate_up: Tensor) -> Tensor:
    """Gate rows before up rows -> gate, up, gate, up, ..."""
    return torch.stack(gate_up.chunk(2, 1), 2).flatten(1, 2)


def _one_after_the_other(gate_up: Tensor) -> Tensor:
    return torch.cat((gate_up[:, 0::2], gate_up[:, 1::2]), 1)


LIBRARIES = {
    "sonicmoe": Library("sonicmoe", "sonic-moe"),
    "scattermoe": Library("scattermoe", "scattermoe"),
    "liger": Library("liger_kernel", "liger-kernel"),
    "unsloth": Library("unsloth", "unsloth"),
}
PEERS = {
    "sonicmoe": Peer("sonicmoe", sonicmoe, compiles_long=True),
    "sonicmoe interleaved": Peer(
        "sonicmoe", partial(sonicmoe, interleaved=True), compiles_long=True
    ),
    "scattermoe": Peer("scattermoe", scattermoe),
    "liger": Peer("liger", liger),
    "unsloth": Peer("unsloth", unsloth),
    "sonicmoe autotuned": Peer("sonicmoe", partial(sonicmoe, autotuned=True), only_on="qwen3-30b"),
}


def absent() -> dict[str, str]:
    """By name, why a library is not measured."""
    return {
        name: f"no module {library.module}"
        for name, library in LIBRARIES.items()
        if importlib.util.find_spec(library.module) is None
    }


def facts() -> dict[str, dict[str, str]]:
    """Which libraries are measured, of which version, and which are not, and why."""
    missing = absent()
    present = {
        name: _version(library) for name, library in LIBRARIES.items() if name not in missing
    }
    return {PRESENT: present, ABSENT: missing}


def _version(library: Library) -> str:
    try:
        return importlib.metadata.version(library.distribution)
    except importlib.metadata.PackageNotFoundError:
        return "version unknown"


def installed(names: Iterable[str], shapes: Iterable[Shape]) -> Iterator[tuple[str, Shape]]:
    """Each of the named peers that is installed, with each shape that it is measured on."""
    missing = absent()
    shapes = list(shapes)
    for name in names:
        peer = PEERS[name]
        if peer.library not in missing:
            yield from ((name, s) for s in shapes if peer.only_on in (None, s.name))


def cases(
    bench: Bench, shapes: Iterable[Shape], until: float, names: Iterable[str] = tuple(PEERS)
) -> Iterator[Case]:
    """Every peer that is installed on every shape, which `until` (time.monotonic) may cut short."""
    for name, shape in installed(names, shapes):
        yield f"{name} {shape.name}", partial(run_peer, bench, shape, name, until)


def jobs_ahead(
    bench: Bench, shapes: Iterable[Shape], until: float, names: Iterable[str] = tuple(PEERS)
) -> dict[str, Callable[[], None]]:
    """The first calls that leave in the caches on disk what takes minutes to compile."""
    return {
        f"{name} {shape.name}": partial(compile_peer, bench, shape, name, until)
        for name, shape in installed(names, shapes)
        if PEERS[name].compiles_long
    }


def compile_peer(bench: Bench, shape: Shape, name: str, until: float) -> None:
    """In a process of its own, which measures nothing."""
    list(run_apart("benchmarks.cuda.peers", bench, shape, name, until, measures=False))


def run_peer(bench: Bench, shape: Shape, name: str, until: float) -> Iterator[Record]:
    """In a process of its own, which ends at `until` at the latest."""
    return run_apart("benchmarks.cuda.peers", bench, shape, name, until)


def run_apart(
    module: str,
    bench: Bench,
    shape: Shape,
    name: str,
    until: float,
    measures: bool = True,
) -> Iterator[Record]:
    """The records of a peer that `module`, which ends in `serve`, measures in another process."""
    given = {
        "peer": name,
        "measures": measures,
        "device": str(bench.device),
        "tiny": bench.tiny,
        "seconds": bench.seconds,
        "least_turns": bench.least_turns,
        "ceilings": bench.ceilings,
        "shape": dataclasses.astuple(shape),
    }
    command = [sys.executable, "-m", module, json.dumps(given)]
    # Infinite in the tests.
    seconds = min(max(until - time.monotonic(), _LEAST_SECONDS), 3600.0)
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        try:
            done = subprocess.run(
                command, cwd=ROOT, stdout=output, stderr=errors, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{name} was not done in the {seconds:.0f} s left") from None
        output.seek(0)
        lines = [line for line in output if line.startswith(_RECORDS)]
        if done.returncode or not lines:
            errors.seek(0)
            last = next((text for line in errors.readlines()[::-1] if (text := line.strip())), "")
            raise RuntimeError(f"{name} ended with {done.returncode}: {last}")
    yield from json.loads(lines[-1].removeprefix(_RECORDS))


def call_once(block: Block, name: str, topk_ids: Tensor) -> Implementation:
    """A peer after its first forward and backward."""
    peer = PEERS[name].make(block)
    peer.call(BOTH, topk_ids, block.grad_output)()
    block.bench.synchronize()
    return peer


def compile_only(bench: Bench, shape: Shape, name: str) -> Iterator[Record]:
    """No records: only what the first calls leave in the caches, with and without a gradient."""
    block = Block(bench, shape)
    topk_ids = block.route("uniform")
    call_once(block, name, topk_ids).call(FORWARD, topk_ids, block.grad_output)()
    yield from ()


def measure(bench: Bench, shape: Shape, name: str) -> Iterator[Record]:
    """The peer beside ours, in this process, after its first forward and backward."""
    block = Block(bench, shape)
    topk_ids = block.route("uniform")
    case: Record = {"shape": shape.name, "peer": name}
    begin = time.perf_counter()
    peer = call_once(block, name, topk_ids)
    case["first_call_seconds"] = rounded(time.perf_counter() - begin)
    comparison = Comparison(block, topk_ids, {OURS: ours(block), name: peer})
    for pass_name in PASSES:
        yield {**case, "pass": pass_name, **comparison.measure(pass_name, {name: (name, OURS)})}


def serve(measured: Callable[[Bench, Shape, str], Iterator[Record]], given: dict[str, Any]) -> None:
    """What the process that `run_apart` starts does with what it is given."""
    torch.manual_seed(0)
    device = torch.device(given["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    bench = Bench(device, given["tiny"], given["seconds"], given["least_turns"], given["ceilings"])
    bench.warm_up(0.5 if device.type == "cuda" else 0.0)
    records = list(measured(bench, Shape(*given["shape"]), given["peer"]))
    print(_RECORDS + json.dumps(records), flush=True)


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    serve(measure if told["measures"] else compile_only, told)

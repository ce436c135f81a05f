# SPDX-License-Identifier: Apache-2.0
"""The MoE block of Qwen3-MoE with its router, ours against transformers' with each of its experts.

T num_tokens, H hidden_size, I intermediate_size, E num_experts, K top_k.

Every implementation computes router, experts and their weighted sum on the same tensors:
hidden_states (1, T, H), gate (E, H), gate_up_proj (E, 2I, H), down_proj (E, H, I), and the gradients
of all four. Unsloth's block has a process of its own, where it is installed: its import patches other
packages.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import suite
from benchmarks.cuda import experts, peers
from benchmarks.cuda.experts import (
    BOTH,
    COMPILED,
    EAGER,
    FORWARD,
    PASSES,
    Block,
    Comparison,
    GroupedMM,
    Implementation,
    flops,
)
from benchmarks.cuda.timing import OURS, Bench, Case, Record
from benchmarks.suite import Shape
from moe_ops.compat.reference.moe_block import Qwen3MoeFusedGroupedGEMMBlock
from moe_ops.layers import MoE

# What is compared: OURS is layers.MoE, COMPAT the fused block of moe_ops.compat, EAGER and COMPILED
# transformers' grouped_mm, LOOP its loop over the experts.
COMPAT = f"{OURS} compat"
OURS_COMPILED, COMPAT_COMPILED = f"{OURS} {COMPILED}", f"{COMPAT} {COMPILED}"
LOOP = "loop"
UNSLOTH = "unsloth"

# hidden_states (1, T, H) -> the same, or that and more.
Module = Callable[[Tensor], Any]


class RoutedBlock(Block):
    """A block with the router that chooses its experts, top_k of a softmax, renormalised.

    Tokens whose last chosen expert is about as good as the next are drawn again: implementations
    that break ties otherwise would compute other experts, each rightly.
    """

    def __init__(self, bench: Bench, shape: Shape) -> None:
        super().__init__(bench, shape)
        gate = bench.randn(shape.num_experts, shape.hidden_size)
        self.gate = nn.Parameter(gate.mul_(shape.hidden_size**-0.5))
        self._draw_decided_tokens()
        self.topk_ids, self.topk_weights = self._route()

    @torch.no_grad()
    def _draw_decided_tokens(self) -> None:
        top_k = self.shape.top_k
        # Two roundings of the larger of the two.
        gap = 2 * torch.finfo(self.bench.dtype).eps
        for _ in range(200):
            logits = F.linear(self.hidden_states, self.gate)
            best = logits.float().topk(top_k + 1).values
            last, following = best[:, top_k - 1], best[:, top_k]
            undecided = (last - following <= gap * last.abs().clamp_min(following.abs())).nonzero()
            if not len(undecided):
                return
            tokens = undecided.flatten()
            self.hidden_states[tokens] = self.bench.randn(len(tokens), self.shape.hidden_size)
        raise RuntimeError(f"{len(undecided)} tokens of {self.shape.name} stay undecided")

    def _weights(self, hidden_states: Tensor, gate: Tensor, topk_ids: Tensor) -> Tensor:
        probabilities = F.softmax(F.linear(hidden_states, gate), dim=-1, dtype=torch.float32)
        weights = probabilities.gather(1, topk_ids)
        return weights / weights.sum(1, keepdim=True)

    @torch.no_grad()
    def _route(self) -> tuple[Tensor, Tensor]:
        logits = F.linear(self.hidden_states, self.gate)
        topk_ids = logits.float().topk(self.shape.top_k).indices
        return topk_ids, self._weights(self.hidden_states.float(), self.gate.float(), topk_ids)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.hidden_states, self.gate_up_proj, self.down_proj, self.gate

    def flops(self, name: str) -> int:
        """Of the products, the router's included."""
        shape = self.shape
        router = 2 * shape.num_tokens * shape.hidden_size * shape.num_experts
        return flops(shape, name) + router * (1 if name == FORWARD else 3)

    def expected(self, topk_ids: Tensor) -> tuple[Tensor, ...]:
        """Output and gradients: the experts by the reference, and the router's gradient of those."""
        output, grad_hidden, *grad_projections, grad_weights = super().expected(topk_ids)
        hidden_states, gate = (
            tensor.detach().float().requires_grad_() for tensor in (self.hidden_states, self.gate)
        )
        weights = self._weights(hidden_states, gate, topk_ids)
        grad_tokens, grad_gate = torch.autograd.grad(
            weights, (hidden_states, gate), grad_weights.to(weights.dtype)
        )
        return output, grad_hidden + grad_tokens, *grad_projections, grad_gate


def config_of(shape: Shape) -> Any:
    """transformers' config of such a model; without transformers a plain object like it."""
    sizes: dict[str, Any] = {
        "hidden_size": shape.hidden_size,
        "moe_intermediate_size": shape.intermediate_size,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "norm_topk_prob": True,
        "hidden_act": "silu",
    }
    if not experts.HAS_TRANSFORMERS:
        return types.SimpleNamespace(model_type="qwen3_moe", **sizes)
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(**sizes)


def layer(block: RoutedBlock) -> nn.Module:
    """layers.MoE on the block's weights."""
    module = MoE.from_config(config_of(block.shape), device="meta", dtype=block.bench.dtype)
    module.router.weight = block.gate
    module.experts.gate_up_proj = block.gate_up_proj
    module.experts.down_proj = block.down_proj
    return module


def compat(block: RoutedBlock) -> nn.Module:
    """The fused block of moe_ops.compat on the block's weights."""
    return Qwen3MoeFusedGroupedGEMMBlock(
        config_of(block.shape), block.gate, block.gate_up_proj, block.down_proj
    )


class SparseBlock(GroupedMM):
    """transformers' block with grouped_mm, for where transformers is not installed."""

    def __init__(self, block: RoutedBlock) -> None:
        super().__init__(block)
        self.gate, self.top_k = block.gate, block.shape.top_k

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        tokens = hidden_states.view(-1, hidden_states.shape[-1])
        logits = F.linear(tokens, self.gate)
        probabilities = F.softmax(logits, dim=-1, dtype=torch.float32)
        weights, ids = torch.topk(probabilities, self.top_k, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(logits.dtype)
        return super().forward(tokens, ids, weights).view_as(hidden_states)


def transformers_block(block: RoutedBlock, experts_implementation: str) -> nn.Module:
    """transformers' Qwen3MoeSparseMoeBlock on the block's weights."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = config_of(block.shape)
    config._experts_implementation = experts_implementation
    # Its own weights would be as large as the block's.
    with torch.device("meta"):
        module: Any = Qwen3MoeSparseMoeBlock(config)
    module.gate.weight = block.gate
    module.experts.gate_up_proj = block.gate_up_proj
    module.experts.down_proj = block.down_proj
    return module


def modules_of(block: RoutedBlock, backend: str | None) -> dict[str, Module]:
    """What is compared, by name; without a backend nothing that is compiled."""
    modules: dict[str, nn.Module] = {OURS: layer(block), COMPAT: compat(block)}
    if experts.HAS_TRANSFORMERS:
        modules[LOOP] = transformers_block(block, "eager")
        modules[EAGER] = transformers_block(block, "grouped_mm")
    else:
        modules[EAGER] = SparseBlock(block)
    found: dict[str, Module] = dict(modules)
    if backend:
        for name, module in modules.items():
            if name != LOOP:
                which = COMPILED if name == EAGER else f"{name} {COMPILED}"
                found[which] = experts.compiled(module, dynamic=False, backend=backend)
    return found


def implementation(block: RoutedBlock, module: Module) -> Implementation:
    hidden_states = block.hidden_states

    def forward(topk_ids: Tensor) -> Tensor:  # noqa: ARG001  the block's router chooses
        result = module(hidden_states[None])
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output.view(hidden_states.shape)

    return Implementation(forward, block.leaves)


def unsloth(block: RoutedBlock) -> nn.Module:
    """Unsloth's Qwen3MoeFusedGroupedGEMMBlock, both permutations in its kernels, autotuned.

    Imported as its page does, from the folder of its kernels, and called by the constructor that is
    documented there. Written from that page, and not run.
    """
    spec = importlib.util.find_spec("unsloth")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("no module unsloth")
    sys.path.insert(0, str(Path(spec.origin).parent / "kernels" / "moe"))
    library: Any = importlib.import_module("grouped_gemm.reference.moe_block")
    module: nn.Module = library.Qwen3MoeFusedGroupedGEMMBlock(
        config_of(block.shape),
        gate=block.gate,
        gate_up_proj=block.gate_up_proj,
        down_proj=block.down_proj,
        permute_x=True,
        permute_y=True,
        autotune=True,
    )
    return module


def facts() -> dict[str, Any]:
    """Whose blocks are measured, and whether Unsloth's is."""
    whose: dict[str, Any] = dict(experts.grouped_mm_facts())
    for key, names in peers.facts().items():
        whose[key] = {name: what for name, what in names.items() if name == UNSLOTH}
    if not experts.HAS_TRANSFORMERS:
        whose["absent"][LOOP] = "no module transformers"
    return whose


def measured(bench: Bench, shapes: Iterable[Shape]) -> list[Shape]:
    """The shapes that this part measures."""
    return [shape for shape in shapes if shape.name in suite.BLOCKS or bench.tiny]


def jobs_ahead(bench: Bench, shapes: Iterable[Shape]) -> dict[str, Callable[[], None]]:
    """What `experts.compile_ahead` is given, of every shape."""
    return {
        f"block {shape.name}": functools.partial(compile_blocks, bench, shape)
        for shape in measured(bench, shapes)
    }


def compile_blocks(bench: Bench, shape: Shape, backend: str = "inductor") -> None:
    """Leaves in the caches on disk what Triton and Inductor compile for a shape."""
    block = RoutedBlock(bench, shape)
    modules = {n: m for n, m in modules_of(block, backend).items() if n not in (LOOP, EAGER)}
    made = [implementation(block, module) for module in modules.values()]
    experts.run_once(block, block.topk_ids, made)


def cases(bench: Bench, shapes: Iterable[Shape], until: float) -> Iterator[Case]:
    """Every shape, then Unsloth's block on each, which `until` (time.monotonic) may cut short."""
    chosen = measured(bench, shapes)
    for shape in chosen:
        yield shape.name, functools.partial(run_blocks, bench, shape)
    if UNSLOTH not in peers.absent():
        for shape in chosen:
            run = functools.partial(
                peers.run_apart, "benchmarks.cuda.blocks", bench, shape, UNSLOTH, until
            )
            yield f"{UNSLOTH} {shape.name}", run


RATIOS = {
    LOOP: (LOOP, OURS),
    EAGER: (EAGER, OURS),
    COMPILED: (COMPILED, OURS),
    "both compiled": (COMPILED, OURS_COMPILED),
    f"compat: {LOOP}": (LOOP, COMPAT),
    f"compat: {EAGER}": (EAGER, COMPAT),
    f"compat: {COMPILED}": (COMPILED, COMPAT),
    "compat: both compiled": (COMPILED, COMPAT_COMPILED),
}


def run_blocks(bench: Bench, shape: Shape, backend: str | None = None) -> Iterator[Record]:
    """Every block on one shape; compiled on a GPU, for on the CPU it would compile C++ for nothing."""
    # Without it Dynamo goes over to dynamic sizes after the first shape.
    torch._dynamo.reset()
    if bench.device.type == "cuda":
        backend = "inductor"
    block = RoutedBlock(bench, shape)
    implementations = {
        name: implementation(block, module) for name, module in modules_of(block, backend).items()
    }
    comparison = Comparison(block, block.topk_ids, implementations)
    for name in PASSES:
        ratios = {r: pair for r, pair in RATIOS.items() if set(pair) <= implementations.keys()}
        yield {"shape": shape.name, "pass": name, **comparison.measure(name, ratios)}


def measure(bench: Bench, shape: Shape, name: str) -> Iterator[Record]:
    """Unsloth's block beside both of ours, in this process, after its first forward and backward."""
    block = RoutedBlock(bench, shape)
    peer = implementation(block, unsloth(block))
    peer.call(BOTH, block.topk_ids, block.grad_output)()
    ours = {OURS: layer(block), COMPAT: compat(block)}
    implementations = {who: implementation(block, module) for who, module in ours.items()}
    comparison = Comparison(block, block.topk_ids, {**implementations, name: peer})
    ratios = {name: (name, OURS), f"compat: {name}": (name, COMPAT)}
    for pass_name in PASSES:
        case: Record = {"shape": shape.name, "pass": pass_name, "peer": name}
        yield {**case, **comparison.measure(pass_name, ratios)}


if __name__ == "__main__":
    peers.serve(measure, json.loads(sys.argv[1]))

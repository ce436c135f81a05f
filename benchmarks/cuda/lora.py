# SPDX-License-Identifier: Apache-2.0
"""LoRA on frozen experts beside the base: ours against torch's grouped_mm, and with checkpoints.

T num_tokens, H hidden_size, I intermediate_size, E num_experts, K top_k, R = T * K routed rows,
r rank.

Every implementation computes the same layer of gated SiLU experts with an adapter on both
projections, lora_A (E, r, in) and lora_B (E, out, r), and the gradients of hidden_states,
topk_weights and the four factors. The base is frozen: it has no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks import suite
from benchmarks.cuda import experts
from benchmarks.cuda.experts import (
    BOTH,
    COMPILED,
    EAGER,
    FORWARD,
    PASSES,
    Block,
    Comparison,
    Implementation,
    count_experts,
    flops,
)
from benchmarks.cuda.timing import OURS, Bench, Case, Record
from benchmarks.suite import Shape
from moe_ops.layers.lora import LoraWeights, lora_experts
from testing import reference

RANK, SCALING = 16, 2.0
# What is compared, beside OURS; EAGER and COMPILED are torch's grouped_mm.
OURS_COMPILED = f"{OURS} {COMPILED}"
CHECKPOINT = "checkpoint"
LAYOUTS = ("experts slowest", "PEFT")

# hidden_states, topk_ids, topk_weights, and the four factors by expert -> output
Layer = Callable[..., Tensor]


class LoraBlock(Block):
    """A block whose projections are frozen, and adapters of both.

    The leaves are hidden_states, topk_weights, and lora_A and lora_B of the up and of the down
    projection. With layout "PEFT" the factors are the weights of PEFT's two linear layers: lora_A
    (E * r, in) has the experts slowest, lora_B (out, r * E) has them fastest.
    """

    def __init__(self, bench: Bench, shape: Shape, layout: str) -> None:
        super().__init__(bench, shape)
        self.layout = layout
        for weight in (self.gate_up_proj, self.down_proj):
            weight.requires_grad_(False)
        self.factors = tuple(
            self._as_parameter(factor)
            for projection in suite.PROJECTIONS
            for factor in self._draw(*shape.features(projection))
        )

    def _draw(self, out_features: int, in_features: int) -> Iterator[Tensor]:
        """Both non-zero, as during training, their product half as large as the weight."""
        num_experts = self.shape.num_experts
        lora_a = self.bench.randn(num_experts, RANK, in_features)
        yield lora_a.mul_(in_features**-0.5)
        lora_b = self.bench.randn(num_experts, out_features, RANK)
        yield lora_b.mul_(0.5 / SCALING * RANK**-0.5)

    def _as_parameter(self, factor: Tensor) -> nn.Parameter:
        if self.layout != "PEFT":
            return nn.Parameter(factor)
        if factor.shape[1] == RANK:
            return nn.Parameter(factor.flatten(0, 1))
        return nn.Parameter(factor.permute(1, 2, 0).flatten(1, 2))

    def by_expert(self, factors: Iterable[Tensor]) -> list[Tensor]:
        """The factors as (E, r, in) and (E, out, r), each a view."""
        if self.layout != "PEFT":
            return list(factors)
        num_experts = self.shape.num_experts
        return [
            factor.unflatten(1, (RANK, num_experts)).permute(2, 0, 1)
            if i % 2
            else factor.unflatten(0, (num_experts, RANK))
            for i, factor in enumerate(factors)
        ]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.hidden_states, self.topk_weights, *self.factors

    def flops(self, name: str) -> int:
        """Of the products that are needed: the base has no dW, an adapter has both gradients."""
        base = flops(self.shape, FORWARD)
        features = sum(sum(self.shape.features(p)) for p in suite.PROJECTIONS)
        adapters = 2 * self.shape.num_rows * RANK * features
        return base + adapters if name == FORWARD else 2 * base + 3 * adapters

    def expected(self, topk_ids: Tensor) -> tuple[Tensor, ...]:
        """Output and gradients by the fp64 reference, on the merged weights."""
        grad_factors = [torch.zeros_like(f, dtype=torch.float32) for f in self.factors]
        factors, grads_by_expert = map(self.by_expert, (self.factors, grad_factors))

        def projections(e: int, *factors: Tensor) -> tuple[Tensor, Tensor]:
            up_a, up_b, down_a, down_b = factors
            return (
                reference.merged(self.gate_up_proj[e], [(up_a, up_b, SCALING)]),
                reference.merged(self.down_proj[e], [(down_a, down_b, SCALING)]),
            )

        output, grad_hidden, grad_weights = reference.experts_step(
            self.hidden_states,
            topk_ids,
            self.topk_weights,
            self.grad_output,
            factors,
            grads_by_expert,
            projections,
        )
        return output, grad_hidden, grad_weights, *grad_factors


class OurLora(nn.Module):
    """moe_ops.layers.lora on the block's projections."""

    def __init__(self, block: LoraBlock) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = block.gate_up_proj, block.down_proj

    def forward(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        up_a: Tensor,
        up_b: Tensor,
        down_a: Tensor,
        down_b: Tensor,
    ) -> Tensor:
        return lora_experts(
            hidden_states,
            self.gate_up_proj,
            self.down_proj,
            topk_ids,
            topk_weights,
            gate_up_lora=(LoraWeights(up_a, up_b, SCALING),),
            down_lora=(LoraWeights(down_a, down_b, SCALING),),
        )


class GroupedMMLora(nn.Module):
    """transformers' algorithm on torch._grouped_mm, with two thin products beside each."""

    def __init__(self, block: LoraBlock) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = block.gate_up_proj, block.down_proj

    def forward(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        up_a: Tensor,
        up_b: Tensor,
        down_a: Tensor,
        down_b: Tensor,
    ) -> Tensor:
        num_experts, top_k = self.gate_up_proj.shape[0], topk_ids.shape[1]
        sorted_ids, gather = torch.sort(topk_ids.view(-1))
        ends = count_experts(sorted_ids, num_experts).cumsum(0, dtype=torch.int32)
        rows = hidden_states[gather // top_k]
        gate, up = _grouped_mm_lora(rows, self.gate_up_proj, up_a, up_b, ends).chunk(2, -1)
        rows = _grouped_mm_lora(F.silu(gate) * up, self.down_proj, down_a, down_b, ends)
        rows = rows * topk_weights.view(-1)[gather, None]
        scatter = torch.empty_like(gather)
        scatter[gather] = torch.arange(len(gather), device=gather.device)
        return rows[scatter].view(-1, top_k, rows.shape[1]).sum(1)


def _grouped_mm_lora(
    rows: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, ends: Tensor
) -> Tensor:
    # The scale goes to the narrow product: what it costs in either direction is next to nothing.
    low_rank = torch._grouped_mm(rows, lora_a.transpose(1, 2), ends) * SCALING
    delta = torch._grouped_mm(low_rank, lora_b.transpose(1, 2), ends)
    return torch._grouped_mm(rows, weight.transpose(1, 2), ends) + delta


def checkpointed(layer: Layer) -> Layer:
    """Keeps the layer's arguments alone, and computes the rest again in the backward."""

    def forward(*args: Tensor) -> Tensor:
        # There is no dropout, so no state of a generator to keep.
        output: Tensor = checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)
        return output

    return forward


def compiled(layer: Layer, backend: str) -> Layer:
    compiled_layer: Layer = torch.compile(layer, fullgraph=True, dynamic=False, backend=backend)
    return compiled_layer


def implementation(block: LoraBlock, layer: Layer, copied: bool) -> Implementation:
    """`copied` brings PEFT's lora_B into the experts' order in each step, before the layer.

    Not within: Inductor takes such a copy for one that it may leave out.
    """

    def forward(topk_ids: Tensor) -> Tensor:
        factors = block.by_expert(block.factors)
        if copied:
            factors = [factor.contiguous() for factor in factors]
        return layer(block.hidden_states, topk_ids, block.topk_weights, *factors)

    return Implementation(forward, block.leaves)


def implementations_of(block: LoraBlock, backend: str | None) -> dict[str, Implementation]:
    """What is compared, by name; without a backend nothing that is compiled.

    torch._grouped_mm refuses PEFT's lora_B as it is, since no row of it is aligned: it is copied.
    """
    ours, grouped_mm = OurLora(block), GroupedMMLora(block)
    in_ours = functools.partial(implementation, block, copied=False)
    in_copies = functools.partial(implementation, block, copied=block.layout == "PEFT")
    found = {OURS: in_ours(ours), EAGER: in_copies(grouped_mm)}
    if backend:
        found[OURS_COMPILED] = in_ours(compiled(ours, backend))
        found[COMPILED] = in_copies(compiled(grouped_mm, backend))
    if block.layout == "PEFT":
        return found
    found[f"{OURS} {CHECKPOINT}"] = in_ours(checkpointed(ours))
    if backend:
        for name, layer in ((OURS_COMPILED, ours), (COMPILED, grouped_mm)):
            found[f"{name} {CHECKPOINT}"] = in_ours(compiled(checkpointed(layer), backend))
    return found


RATIOS = {
    EAGER: (EAGER, OURS),
    COMPILED: (COMPILED, OURS),
    "both compiled": (COMPILED, OURS_COMPILED),
    CHECKPOINT: (f"{OURS} {CHECKPOINT}", OURS),
    f"{CHECKPOINT}, compiled": (f"{OURS_COMPILED} {CHECKPOINT}", OURS_COMPILED),
}


def measured(bench: Bench, shapes: Iterable[Shape]) -> dict[str, tuple[Shape, str]]:
    """By label, the shapes and layouts that this part measures."""
    chosen = [shape for shape in shapes if shape.name in suite.LORA or bench.tiny]
    return {f"{shape.name} {layout}": (shape, layout) for shape in chosen for layout in LAYOUTS}


def cases(bench: Bench, shapes: Iterable[Shape]) -> Iterator[Case]:
    for label, (shape, layout) in measured(bench, shapes).items():
        yield label, functools.partial(run_lora, bench, shape, layout)


def jobs_ahead(bench: Bench, shapes: Iterable[Shape]) -> dict[str, Callable[[], None]]:
    """What `experts.compile_ahead` is given, of every shape and layout."""
    return {
        f"lora {label}": functools.partial(compile_lora, bench, shape, layout)
        for label, (shape, layout) in measured(bench, shapes).items()
    }


def compile_lora(bench: Bench, shape: Shape, layout: str, backend: str = "inductor") -> None:
    """Leaves in the caches on disk what Triton and Inductor compile for it."""
    block = LoraBlock(bench, shape, layout)
    experts.run_once(block, block.route("uniform"), implementations_of(block, backend).values())


def run_lora(
    bench: Bench, shape: Shape, layout: str, backend: str | None = None
) -> Iterator[Record]:
    """Uniform routing; compiled on a GPU, for on the CPU it would compile C++ for nothing."""
    # Without it Dynamo goes over to dynamic sizes after the first layout.
    torch._dynamo.reset()
    if bench.device.type == "cuda":
        backend = "inductor"
    block = LoraBlock(bench, shape, layout)
    implementations = implementations_of(block, backend)
    comparison = Comparison(block, block.route("uniform"), implementations)
    for name in PASSES:
        case: Record = {"shape": shape.name, "rank": RANK, "layout": layout, "pass": name}
        ratios = {
            ratio: (over, under)
            for ratio, (over, under) in RATIOS.items()
            if {over, under} <= implementations.keys()
            # Without a gradient a checkpoint does nothing.
            and (name == BOTH or CHECKPOINT not in over)
        }
        yield {**case, **comparison.measure(name, ratios)}

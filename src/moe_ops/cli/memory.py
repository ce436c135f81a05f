# SPDX-License-Identifier: Apache-2.0
"""`moe_ops explain --memory`: the bytes of a model's experts, of LoRA beside them, and of a step.

T num_tokens, R = T * top_k rows, E num_experts, U rows of the up projection, H hidden_size.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from moe_ops.cli.text import number_of
from moe_ops.configs.device import KNOWN_GPUS
from moe_ops.configs.problem import rows_bucket
from moe_ops.quantization import storage
from moe_ops.quantization.formats import FORMATS
from moe_ops.tuning import Experts

# A transformer's fine-tuning step on one GPU.
NUM_TOKENS = 4096
_GB = 1e9
# Adapters, their gradients, and AdamW's two moments, each fp32.
_FP32 = torch.float32.itemsize


@dataclass(frozen=True)
class Memory:
    """Bytes of all experts of a model, and of a step of LoRA beside them.

    Attributes:
        num_layers: the layers that have experts.
        bfloat16: the weights in bf16.
        formats: the weights in each format, with its default group_size and scales.
        biases: the biases in bf16, which no format changes.
        rank: of the adapters of both projections.
        adapters: the adapters in fp32; their gradients take as much.
        optimizer: AdamW's state of the adapters, in fp32.
        num_tokens: of the step.
        activations_of_a_layer: what fused_experts keeps for its backward, without adapters: hidden
            states, the pre-activation, and the routing.
        activations: the same of all layers, if none is recomputed.
        scratch: the largest piece of a weight that is there in bf16 while a product reads it.
    """

    num_layers: int
    bfloat16: int
    formats: dict[str, int]
    biases: int
    rank: int
    adapters: int
    optimizer: int
    num_tokens: int
    activations_of_a_layer: int
    activations: int
    scratch: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of --memory."""
    parser.add_argument(
        "--memory", action="store_true",
        help="the bytes of weights in each format, adapters and activations in place of kernels",
    )  # fmt: skip
    parser.add_argument(
        "--table", action="store_true", help="with --memory: print a row of a Markdown table"
    )
    parser.add_argument(
        "--rank", type=int, default=16, metavar="N", help="with --memory: of LoRA, default 16"
    )
    parser.add_argument(
        "--num-layers", type=int, default=1, metavar="N",
        help="with --memory and sizes: how many layers there are, default 1",
    )  # fmt: skip


def memory_of(layers: list[Experts], rank: int, num_tokens: int = NUM_TOKENS) -> Memory:
    """Return the bytes of a model with these experts layers."""
    counted = Counter(layers)

    def total(of_layer: Any) -> int:
        return sum(of_layer(layer) * count for layer, count in counted.items())

    adapters = total(lambda layer: _adapter_elements(layer, rank)) * _FP32
    return Memory(
        num_layers=len(layers),
        bfloat16=total(_weight_elements) * 2,
        formats={
            name: total(lambda layer, name=name: _packed_bytes(layer, name)) for name in FORMATS
        },
        biases=total(lambda layer: layer.num_experts * (layer.up[0] + layer.down[0]) * 2
                     if layer.has_bias else 0),
        rank=rank,
        adapters=adapters,
        optimizer=2 * adapters,
        num_tokens=num_tokens,
        activations_of_a_layer=max(_kept_bytes(layer, num_tokens) for layer in counted),
        activations=total(lambda layer: _kept_bytes(layer, num_tokens)),
        scratch=max(_scratch_bytes(layer, num_tokens) for layer in counted),
    )  # fmt: skip


def lines(memory: Memory) -> Iterator[str]:
    """Yield the bytes as text, in GB of 1e9 bytes, or in MB of 1e6 for small models."""
    name, unit = (
        ("GB (1e9 bytes)", _GB) if memory.bfloat16 >= _GB else ("MB (1e6 bytes)", _GB / 1e3)
    )
    yield f"{number_of(memory.num_layers, 'layer')} of experts, {name}"
    yield f"  weights in bfloat16   {memory.bfloat16 / unit:8.2f}"
    for format, size in memory.formats.items():
        yield f"  weights in {format:<11}{size / unit:8.2f}   {size / memory.bfloat16:.1%}"
    if memory.biases:
        yield f"  biases                {memory.biases / unit:8.2f}"
    yield f"  LoRA, rank {memory.rank}, fp32   {memory.adapters / unit:8.2f}   gradients the same"
    yield f"  its AdamW state       {memory.optimizer / unit:8.2f}"
    yield (
        f"  kept for backward     {memory.activations / unit:8.2f}   at {number_of(memory.num_tokens, 'token')}; "
        f"{memory.activations_of_a_layer / unit:.2f} of one layer"
    )
    yield f"  scratch               {memory.scratch / unit:8.2f}"


def table_row(name: str, memory: Memory) -> str:
    """Return the numbers in GB, in the order of the table in docs/quantised.md."""
    sizes = [
        memory.bfloat16, *memory.formats.values(), memory.adapters, memory.optimizer,
        memory.activations_of_a_layer, memory.activations, memory.scratch,
    ]  # fmt: skip
    return f"| {name} | " + " | ".join(f"{size / _GB:.2f}" for size in sizes) + " |"


def _sides(layer: Experts) -> tuple[tuple[int, int], tuple[int, int]]:
    return layer.up, layer.down


def _weight_elements(layer: Experts) -> int:
    return layer.num_experts * sum(rows * columns for rows, columns in _sides(layer))


def _adapter_elements(layer: Experts, rank: int) -> int:
    return layer.num_experts * rank * sum(rows + columns for rows, columns in _sides(layer))


def _packed_bytes(layer: Experts, format: str) -> int:
    """Return the bytes of the stored tensors. Weights are quantised along in_features."""
    size = 0
    for side in _sides(layer):
        layout = storage.layout_of("moe_ops explain", format, (layer.num_experts, *side))
        size += sum(math.prod(shape) for shape in storage.shapes(layout).values())
    return size


def _kept_bytes(layer: Experts, num_tokens: int) -> int:
    rows, (width, hidden_size) = num_tokens * layer.top_k, layer.up
    # The counts, and two indices of each row, are int32; topk_weights are fp32.
    routing = (layer.num_experts + 2 * rows) * 4 + rows * 4
    return (num_tokens * hidden_size + rows * width) * layer.dtype.itemsize + routing


def _scratch_bytes(layer: Experts, num_tokens: int) -> int:
    from moe_ops._triton.weight_plan import plan_weight

    # A scratch has the same size on every GPU that decodes some products.
    device = KNOWN_GPUS["H200"]
    bucket = rows_bucket(num_tokens * layer.top_k, layer.num_experts)
    return max(
        plan_weight(
            kind, layer.dtype, "nf4", 64, layer.num_experts, *side, bucket, device
        ).scratch_bytes
        for side in _sides(layer)
        for kind in ("forward", "backward_dX")
    )

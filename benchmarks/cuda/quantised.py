# SPDX-License-Identifier: Apache-2.0
"""Quantised experts beside the same experts in bf16, on qwen3-30b's sizes.

Four kinds of records, by "what":

    dequantise  a weight to bf16, over the copy bandwidth of the run
    lora        a step of LoRA: what the format adds, over the bytes of two passes
    decode      the whole block without adapters in a CUDA graph
    stack       48 layers in NF4 with adapters, checkpoints and AdamW: peak memory, tokens a second

The bf16 experts hold the values of the quantised ones, so that both are held against one reference.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moe_ops
from benchmarks import suite
from benchmarks.cuda.decode_block import DRAWS, LAYERS, Replay, expected_of
from benchmarks.cuda.experts import BOTH, FORWARD, Block, Comparison, Implementation
from benchmarks.cuda.lora import SCALING, LoraBlock
from benchmarks.cuda.timing import OURS, Bench, Case, Record, compare, relative_error, rounded
from benchmarks.suite import Shape
from moe_ops import QuantizedWeight, quantize_weight
from moe_ops.layers.lora import LoraWeights, lora_experts
from moe_ops.quantization.formats import FORMATS
from testing import reference

BF16 = "bf16"
LORA_TOKENS, DECODE_TOKENS, TINY_TOKENS = (16384, 2048), (1, 8), (12,)
# The least speed of a step over bf16's, and how much of the bytes' time a format may add.
LORA_AIM, LORA_BOUND_FACTOR = 0.80, 1.25
DECODE_AIMS = {"fp8_block": 1.3, "nf4": 1.7, "mxfp4": 1.7, "int4": 1.7}
DEQUANTISE_AIM = 0.8
STACK_LAYERS, STACK_TOKENS, STACK_RANK, STACK_AIM_BYTES = 48, 4096, 8, 24e9
# Steps that are timed, after one that compiles.
STACK_STEPS = 3


def cases(bench: Bench, shapes: Iterable[Shape]) -> Iterator[Case]:
    del shapes
    shape = suite.TINY_SUITE[0] if bench.tiny else suite.SUITE[0]
    for format in FORMATS:
        yield f"dequantise {format}", functools.partial(run_dequantise, bench, shape, format)
    for num_tokens in TINY_TOKENS if bench.tiny else LORA_TOKENS:
        of_tokens = dataclasses.replace(shape, num_tokens=num_tokens)
        for format in FORMATS:
            label = f"lora {format} T={num_tokens}"
            yield label, functools.partial(run_lora, bench, of_tokens, format)
    for num_tokens in TINY_TOKENS[:1] if bench.tiny else DECODE_TOKENS:
        of_tokens = dataclasses.replace(shape, num_tokens=num_tokens)
        for format in FORMATS:
            label = f"decode {format} T={num_tokens}"
            yield label, functools.partial(run_decode, bench, of_tokens, format)
    layers, tokens = (2, TINY_TOKENS[0]) if bench.tiny else (STACK_LAYERS, STACK_TOKENS)
    of_tokens = dataclasses.replace(shape, num_tokens=tokens)
    yield "stack", functools.partial(run_stack, bench, of_tokens, layers)


def quantised(bench: Bench, shape: Shape, projection: str, format: str) -> QuantizedWeight:
    """A random weight of a projection in the format."""
    out_features, in_features = shape.features(projection)
    weight = bench.randn(shape.num_experts, out_features, in_features).mul_(in_features**-0.5)
    return quantize_weight(weight, format)


def values_of(bench: Bench, weight: QuantizedWeight) -> Tensor:
    """The weight in the dtype of the bench."""
    values: Tensor = torch.ops.moe.dequantize_weight(*weight.stored, weight.shape[2], bench.dtype)
    return values


def dequantised_bytes(bench: Bench, weights: Iterable[QuantizedWeight]) -> int:
    """The bytes that dequantising reads and writes."""
    sizes = [(w.nbytes, w.shape.numel() * bench.dtype.itemsize) for w in weights]
    return sum(map(sum, sizes))


def run_dequantise(bench: Bench, shape: Shape, format: str) -> Iterator[Record]:
    from moe_ops._pytorch.dequantize import dequantize_weight

    for projection in suite.PROJECTIONS:
        weight = quantised(bench, shape, projection, format)
        stored: list[Any] = [*weight.stored, weight.shape[2], bench.dtype]
        expected = dequantize_weight(*stored)
        call = functools.partial(values_of, bench, weight)
        record = compare(bench, {OURS: call}, {OURS: relative_error(call(), expected)}, {})
        num_bytes = dequantised_bytes(bench, [weight])
        record |= {"bytes": num_bytes, "aim": DEQUANTISE_AIM}
        if OURS in record["milliseconds"]:
            reached = num_bytes / record["milliseconds"][OURS][1] / 1e9
            record["of_copy"] = rounded(reached / bench.ceilings["copy_tbs"])
        sizes = {"shape": shape.name, "format": format, "projection": projection}
        yield {"what": "dequantise", **sizes, **record}


class QuantisedBlock(LoraBlock):
    """A block with adapters; its projections are the values of quantised ones."""

    def __init__(self, bench: Bench, shape: Shape, format: str) -> None:
        super().__init__(bench, shape, "experts slowest")
        self.quantised = [quantised(bench, shape, p, format) for p in suite.PROJECTIONS]
        for plain, weight in zip((self.gate_up_proj, self.down_proj), self.quantised, strict=True):
            plain.data = values_of(bench, weight)

    def implementation(self, gate_up_proj: Any, down_proj: Any) -> Implementation:
        """lora_experts with these two projections, plain or quantised."""
        up_a, up_b, down_a, down_b = self.factors

        def forward(topk_ids: Tensor) -> Tensor:
            return lora_experts(
                self.hidden_states,
                gate_up_proj,
                down_proj,
                topk_ids,
                self.topk_weights,
                gate_up_lora=(LoraWeights(up_a, up_b, SCALING),),
                down_lora=(LoraWeights(down_a, down_b, SCALING),),
            )

        return Implementation(forward, self.leaves)


def run_lora(bench: Bench, shape: Shape, format: str) -> Iterator[Record]:
    block = QuantisedBlock(bench, shape, format)
    implementations = {
        OURS: block.implementation(*block.quantised),
        BF16: block.implementation(block.gate_up_proj.detach(), block.down_proj.detach()),
    }
    comparison = Comparison(block, block.route("uniform"), implementations)
    for name in (FORWARD, BOTH):
        record = comparison.measure(name, {BF16: (BF16, OURS)})
        passes = 2 if name == BOTH else 1
        num_bytes = passes * dequantised_bytes(bench, block.quantised)
        bound = num_bytes / bench.ceilings["copy_tbs"] / 1e9
        record |= {"bytes": num_bytes, "bound_milliseconds": rounded(bound)}
        if {OURS, BF16} <= record["milliseconds"].keys():
            added = record["milliseconds"][OURS][1] - record["milliseconds"][BF16][1]
            record |= {"added_milliseconds": rounded(added), "of_bound": rounded(added / bound)}
        if name == BOTH:
            record |= {"aim": LORA_AIM, "aim_of_bound": LORA_BOUND_FACTOR}
        sizes = {"shape": shape.name, "T": shape.num_tokens, "format": format, "pass": name}
        yield {"what": "lora", **sizes, **record}


@torch.no_grad()
def run_decode(bench: Bench, shape: Shape, format: str) -> Iterator[Record]:
    sizes = (shape.num_tokens, shape.num_experts, shape.top_k, bench.device)
    draws = [reference.route("uniform", *sizes, seed) for seed in range(DRAWS)]
    layers, plain, expected = [], [], []
    for _ in range(LAYERS):
        block = Block(bench, shape)
        weights = [quantised(bench, shape, p, format) for p in suite.PROJECTIONS]
        values = [values_of(bench, weight) for weight in weights]
        layers.append(_forward(block, weights))
        plain.append(_forward(block, values))
        expected.append(expected_of(block, values))
    replays = {OURS: Replay(bench, layers, draws), BF16: Replay(bench, plain, draws)}
    errors = {who: replay.error(expected) for who, replay in replays.items()}
    record = compare(bench, replays, errors, {BF16: (BF16, OURS)})
    touched = sum(ids.unique().numel() for ids in draws) / len(draws) / shape.num_experts
    num_bytes = touched * sum(weight.nbytes for weight in weights)
    floor = num_bytes / bench.ceilings["read_tbs"] / 1e9
    record |= {"layers": LAYERS, "touched_bytes": round(num_bytes)}
    record |= {"floor_milliseconds": rounded(floor)}
    if OURS in record["milliseconds"]:
        record["of_floor"] = rounded(record["milliseconds"][OURS][1] / floor)
    if shape.num_tokens >= suite.DECODE_TOKENS[1]:
        record["aim"] = DECODE_AIMS[format]
    yield {
        "what": "decode", "shape": shape.name, "T": shape.num_tokens, "format": format, **record
    }  # fmt: skip


def _forward(
    block: Block, weights: Sequence[Tensor | QuantizedWeight]
) -> Callable[[Tensor], Tensor]:
    """topk_ids -> the output of a block with these weights."""
    up, down = weights

    def forward(topk_ids: Tensor) -> Tensor:
        return moe_ops.fused_experts(block.hidden_states, up, down, topk_ids, block.topk_weights)

    return forward


class Layer(nn.Module):
    """A residual layer of experts in NF4 with fp32 adapters on both projections."""

    def __init__(self, bench: Bench, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.gate_up_proj = quantised(bench, shape, "up", "nf4")
        self.down_proj = quantised(bench, shape, "down", "nf4")
        self.factors = nn.ParameterList()
        for projection in suite.PROJECTIONS:
            out_features, in_features = shape.features(projection)
            for size in ((STACK_RANK, in_features), (out_features, STACK_RANK)):
                factor = bench.randn(shape.num_experts, *size).float()
                self.factors.append(nn.Parameter(factor.mul_(in_features**-0.5)))

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        up_a, up_b, down_a, down_b = self.factors
        width = (hidden_states.shape[1],)
        return hidden_states + lora_experts(
            nn.functional.rms_norm(hidden_states, width),
            self.gate_up_proj,
            self.down_proj,
            topk_ids,
            topk_weights,
            gate_up_lora=(LoraWeights(up_a, up_b, 1.0),),
            down_lora=(LoraWeights(down_a, down_b, 1.0),),
        )


def stack_step(
    layers: Iterable[Layer],
    optimizer: torch.optim.Optimizer,
    block: Block,
    topk_ids: Tensor,
) -> Tensor:
    """One step of AdamW, every layer computed again in the backward. Returns the loss."""
    hidden_states, weights = block.hidden_states.detach(), block.topk_weights.detach()
    for layer in layers:
        hidden_states = checkpoint(layer, hidden_states, topk_ids, weights, use_reentrant=False)
    loss = (hidden_states.float() * block.grad_output.float()).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def run_stack(bench: Bench, shape: Shape, num_layers: int) -> Iterator[Record]:
    """Peak memory and tokens a second; everything that is there counts, weights included."""
    is_cuda = bench.device.type == "cuda"
    # The tensors of a block but for its weights, which would take room.
    block = Block(bench, dataclasses.replace(shape, num_experts=1))
    topk_ids = reference.route(
        "uniform", shape.num_tokens, shape.num_experts, shape.top_k, bench.device
    )
    layers = [Layer(bench, shape) for _ in range(num_layers)]
    factors = [factor for layer in layers for factor in layer.factors]
    optimizer = torch.optim.AdamW(factors, lr=1e-4, fused=True)
    step: Callable[[], Tensor] = functools.partial(stack_step, layers, optimizer, block, topk_ids)
    first = step()
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)
    bench.synchronize()
    begin = time.perf_counter()
    for _ in range(STACK_STEPS):
        last = step()
    bench.synchronize()
    seconds = (time.perf_counter() - begin) / STACK_STEPS
    losses = torch.stack([first, last]).tolist()
    if not last < first:
        raise RuntimeError(f"the loss does not fall: {losses}")
    record: Record = {
        "what": "stack", "shape": shape.name, "T": shape.num_tokens, "layers": num_layers,
        "format": "nf4", "rank": STACK_RANK, "losses": losses,
        "tokens_per_second": rounded(shape.num_tokens / seconds), "aim_bytes": STACK_AIM_BYTES,
    }  # fmt: skip
    if is_cuda:
        record["peak_bytes"] = torch.cuda.max_memory_allocated(bench.device)
    yield record

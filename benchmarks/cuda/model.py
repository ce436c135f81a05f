# SPDX-License-Identifier: Apache-2.0
"""A whole model: transformers' Qwen3-MoE of qwen3-30b's width, with moe_ops and with grouped_mm.

A step is forward and backward of the loss, compiled, without an optimizer; with and without
activation checkpoints. Both models have the same parameters, and take turns in one process. Their
gradients are compared with those of the model in fp32, whose experts are transformers' loop.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cuda.experts import HAS_TRANSFORMERS, MIB, first_line
from benchmarks.cuda.timing import OURS, Bench, Case, Record, compare, rounded, worst
from benchmarks.suite import SUITE, TINY_SUITE, Shape

logger = logging.getLogger("moe_ops.benchmarks")

GROUPED_MM = "grouped_mm"
LAYERS, VOCABULARY, TINY_VOCABULARY = 4, 32768, 64
# Sequences of a step, and tokens of each.
BATCHES, TINY_BATCHES = ((4, 4096), (1, 2048)), ((2, 8),)
# In bf16 some tokens go to other experts than in fp32, and take their gradients along, with either
# implementation. So ours may be this much farther off than grouped_mm, which itself is to be near.
FACTOR, LIMIT = 1.25, 0.5
# Of the relative error of a loss.
LOSS_LIMIT = 2e-3

Gradients = dict[str, Tensor]


def facts() -> dict[str, str]:
    """Whose model is measured."""
    if not HAS_TRANSFORMERS:
        return {"model": "none: transformers is not installed"}
    version = importlib.metadata.version("transformers")
    return {"model": f"transformers {version}, Qwen3MoeForCausalLM, {LAYERS} layers"}


def cases(bench: Bench, shapes: Iterable[Shape]) -> Iterator[Case]:
    del shapes
    if not HAS_TRANSFORMERS:
        return
    for batch in TINY_BATCHES if bench.tiny else BATCHES:
        for checkpoints in (False, True):
            label = f"{batch[0]} x {batch[1]} tokens{', checkpoints' if checkpoints else ''}"
            yield label, functools.partial(run_model, bench, batch, checkpoints)


# The model


def make_model(bench: Bench) -> nn.Module:
    """Random weights, in the dtype of the bench, with transformers' grouped_mm."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    import moe_ops.integrations.transformers

    moe_ops.integrations.transformers.register()
    shape = TINY_SUITE[0] if bench.tiny else SUITE[0]
    heads, key_value_heads = (2, 1) if bench.tiny else (32, 4)
    # The config's signature does not have it, and the model reads it.
    more: dict[str, Any] = {"head_dim": 16 if bench.tiny else 128}
    config = Qwen3MoeConfig(
        vocab_size=TINY_VOCABULARY if bench.tiny else VOCABULARY,
        hidden_size=shape.hidden_size,
        moe_intermediate_size=shape.intermediate_size,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        num_hidden_layers=2 if bench.tiny else LAYERS,
        norm_topk_prob=True,
        use_cache=False,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        **more,
    )
    with torch.device(bench.device):
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=bench.dtype, experts_implementation=GROUPED_MM
        )
    return model.to(bench.device).train()


def variant(model: nn.Module, implementation: str, checkpoints: bool) -> nn.Module:
    """The model on the same parameters, with these experts."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    made: Any = copy.deepcopy(model, shared)
    made.set_experts_implementation(implementation)
    if checkpoints:
        made.gradient_checkpointing_enable({"use_reentrant": False})
    found: nn.Module = made
    return found


def loss_of(call: Callable[..., Any], tokens: Tensor) -> Tensor:
    loss: Tensor = call(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss


def take_gradients(model: nn.Module) -> Gradients:
    """The gradients by the names of their parameters, which have none after it."""
    found = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return found


def in_fp32(model: nn.Module, tokens: Tensor) -> tuple[float, Gradients]:
    """Loss and gradients of the model in fp32, expert by expert."""
    # Its copy's parameters are its own. Checkpoints, for the memory.
    reference: Any = copy.deepcopy(model).float()
    reference.set_experts_implementation("eager")
    reference.gradient_checkpointing_enable({"use_reentrant": False})
    loss = loss_of(reference, tokens)
    loss.backward()
    return loss.item(), take_gradients(reference)


def distance(found: Gradients, expected: Gradients) -> float:
    """||found - expected|| / ||expected|| over all parameters; infinite where one is missing."""
    if found.keys() != expected.keys():
        return math.inf
    error = scale = 0.0
    for name, grad in found.items():
        want = expected[name]
        error += float((grad.float() - want).square().sum(dtype=torch.float64))
        scale += float(want.square().sum(dtype=torch.float64))
    return math.sqrt(error / scale)


# The step


@dataclass(frozen=True)
class Step:
    """One compiled forward and backward; its gradients are dropped."""

    model: nn.Module
    call: Callable[..., Any]
    tokens: Tensor

    def loss(self) -> Tensor:
        """The loss; the gradients stay in the parameters."""
        loss = loss_of(self.call, self.tokens)
        loss.backward()
        return loss

    def __call__(self) -> None:
        self.loss()
        self.model.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class First:
    """What a first step tells.

    Attributes:
        seconds: with the compiling.
        error: distance of the gradients from those in fp32.
        loss: relative distance from that in fp32.
    """

    seconds: float
    error: float
    loss: float


def first_step(bench: Bench, step: Step, expected: tuple[float, Gradients]) -> First:
    begin = time.perf_counter()
    loss = step.loss()
    bench.synchronize()
    seconds = time.perf_counter() - begin
    error = distance(take_gradients(step.model), expected[1])
    return First(seconds, error, abs(loss.item() - expected[0]) / expected[0])


def verdicts(firsts: Mapping[str, First]) -> dict[str, float]:
    """0 for who is right, else the error: what `compare` is given.

    Right is grouped_mm where it is near the model in fp32, and ours where it is about as near.
    """
    theirs = firsts[GROUPED_MM].error if GROUPED_MM in firsts else math.nan
    limits = {GROUPED_MM: LIMIT, OURS: min(FACTOR * theirs, LIMIT)}
    return {
        who: 0.0
        if first.error <= limits[who] and first.loss <= LOSS_LIMIT
        else worst([first.error, first.loss, 1.0])
        for who, first in firsts.items()
    }


def peak_memory(bench: Bench, step: Step) -> float | None:
    """MiB: the most of a step, with the parameters; None on the CPU."""
    if bench.device.type != "cuda":
        return None
    bench.synchronize()
    before = torch.cuda.memory_allocated(bench.device)
    torch.cuda.reset_peak_memory_stats(bench.device)
    step()
    bench.synchronize()
    beside = torch.cuda.max_memory_allocated(bench.device) - before
    parameters = sum(p.numel() * p.element_size() for p in step.model.parameters())
    return rounded((beside + parameters) / MIB)


def run_model(
    bench: Bench, batch: tuple[int, int], checkpoints: bool, backend: str | None = None
) -> Iterator[Record]:
    """First steps of both models, their gradients beside those in fp32, then the times."""
    # Without it Dynamo goes over to dynamic sizes, and keeps the models before.
    torch._dynamo.reset()
    model = make_model(bench)
    vocabulary = TINY_VOCABULARY if bench.tiny else VOCABULARY
    tokens = torch.randint(vocabulary, batch, device=bench.device)
    expected = in_fp32(model, tokens)
    if backend is None and bench.device.type == "cuda":
        backend = "inductor"
        _warm_up_compiler(bench)
    steps: dict[str, Step] = {}
    firsts: dict[str, First] = {}
    failed: dict[str, str] = {}
    for who, implementation in ((GROUPED_MM, GROUPED_MM), (OURS, "moe_ops")):
        made = variant(model, implementation, checkpoints)
        call: Callable[..., Any] = made
        if backend is not None:
            call = torch.compile(made, fullgraph=True, dynamic=False, backend=backend)
        step = Step(made, call, tokens)
        try:
            firsts[who] = first_step(bench, step, expected)
            steps[who] = step
        except Exception as error:
            # The other is worth its numbers; this one is told, and why.
            logger.exception("%s failed", who)
            failed[who] = first_line(error)
            model.zero_grad(set_to_none=True)
    of_case = {"tokens": tokens.numel(), "length": batch[1], "checkpoints": checkpoints}
    told = {"failed": failed} if failed else {}
    yield {**of_case, **measure(bench, steps, firsts), **told}


def measure(bench: Bench, steps: Mapping[str, Step], firsts: Mapping[str, First]) -> Record:
    """The record of both models' steps."""
    ratios = {GROUPED_MM: (GROUPED_MM, OURS)}
    record = compare(bench, steps, verdicts(firsts), ratios)
    # NaN and infinity are no JSON.
    record["errors"] = {who: _told(first.error) for who, first in firsts.items()}
    record["loss_errors"] = {who: _told(first.loss) for who, first in firsts.items()}
    record["first_step_seconds"] = {who: rounded(each.seconds) for who, each in firsts.items()}
    record["tokens_per_second"] = {
        who: round(steps[who].tokens.numel() / median * 1e3)
        for who, (_, median, _) in record["milliseconds"].items()
    }
    record["peak_mib"] = {who: peak_memory(bench, steps[who]) for who in record["milliseconds"]}
    return record


def _told(value: float) -> float | str:
    return rounded(value) if math.isfinite(value) else str(value)


def _warm_up_compiler(bench: Bench) -> None:
    """What a process's first compiled gradient costs is not the first model's."""
    leaf = bench.randn(64, 64).requires_grad_()
    torch.compile(lambda x: (x @ x).relu().sum())(leaf).backward()

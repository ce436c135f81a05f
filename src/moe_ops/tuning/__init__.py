# SPDX-License-Identifier: Apache-2.0
"""Finds, on this GPU, the fastest configuration of each GEMM that a model's experts run.

problems.py   the GEMMs of a model, as problems
space.py      which configurations are tried
calls.py      the call of a problem: its arguments, the op, the same in PyTorch
bench.py      one problem: run in a configuration, compared with PyTorch, timed
ranks.py      how the ranks of torch.distributed share the work
report.py     how a person sees it
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import torch
from torch import nn

from moe_ops.configs import cache
from moe_ops.configs.device import Device, device_of
from moe_ops.configs.kernel_config import KernelConfig
from moe_ops.tuning.bench import Bench, Timer, cuda_milliseconds
from moe_ops.tuning.problems import NUM_TOKENS, Experts, Task, find_experts, tasks_of
from moe_ops.tuning.ranks import ranks_of
from moe_ops.tuning.report import Report
from moe_ops.tuning.space import candidates

__all__ = [
    "NUM_TOKENS",
    "Experts",
    "Report",
    "Task",
    "current_device",
    "describe",
    "find_experts",
    "tasks_of",
    "tune",
    "tune_tasks",
]

logger = logging.getLogger("moe_ops")


def tune(
    model: nn.Module,
    num_tokens: int | Sequence[int] = NUM_TOKENS,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    *,
    top_k: int | None = None,
    separate_ops: bool = False,
) -> dict[str, KernelConfig]:
    """Finds the fastest kernel configurations of a model's experts on this GPU, and keeps them.

    For each experts layer (of equal ones, one) the GEMMs of forward, dX and dW are timed in every
    configuration of a small space; one whose result differs from PyTorch's is not. What is found is
    written to the disk cache at once, where this and every later process finds it, so an
    interrupted call goes on where it stopped, and a second one has nothing to do. With
    torch.distributed initialised every rank must call it; ranks of the same GPU share the work.

    Call it after the model is made and before it is compiled, sharded or wrapped.

    Args:
        model (nn.Module): modules with 3-D parameters gate_up_proj or up_proj, and down_proj are its
            experts, as transformers has them. It may be on any device, meta too; the GPU is the
            model's, or the current one.
        num_tokens (int or sequence): tokens of a call, batch times length. What is found serves the
            calls with as many rows per expert, up to a power of two.
        dtype (torch.dtype or None): bf16, fp16 or fp32; None: that of the weights. Under autocast
            give autocast's.
        progress (bool): report to stderr, a line a problem.
        top_k (int or None): experts of a token; None: what the model says.
        separate_ops (bool): also tune grouped_gemm with its permutations and topk_weights, for models
            and layers that call it and not fused_experts.

    Returns:
        dict: the configuration of each problem, tuned now or before, by Problem.key. Empty where
            MOE_OPS_AUTOTUNE=0 turns tuning off.

    Raises:
        ValueError: the model has no experts, or does not say its top_k; a bad num_tokens or dtype.
        RuntimeError: called while torch.compile traces, or there is no CUDA device.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "moe_ops.tune: expected to be called before torch.compile traces the model, got called "
            "while it does"
        )
    report = Report(progress)
    if not cache.is_enabled():
        report.line("moe_ops.tune: MOE_OPS_AUTOTUNE=0 turns tuning off")
        return {}
    layers = find_experts(model, dtype, top_k)
    device = _device_for(model)
    tasks = tasks_of(layers, _several(num_tokens), separate_ops, device_of(device))
    return tune_tasks(tasks, device, report=report)


def _several(num_tokens: int | Sequence[int]) -> Sequence[int]:
    return (num_tokens,) if isinstance(num_tokens, int) else num_tokens


def _device_for(model: nn.Module) -> torch.device:
    for parameter in model.parameters():
        if parameter.device.type == "cuda":
            return parameter.device
    return current_device()


def current_device() -> torch.device:
    """The current CUDA device.

    Raises:
        RuntimeError: there is none.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("moe_ops.tune: expected a CUDA GPU, got none that this torch sees")
    return torch.device("cuda", torch.cuda.current_device())


def tune_tasks(
    tasks: Sequence[Task],
    device: torch.device,
    *,
    report: Report | None = None,
    facts: Device | None = None,
    timer: Timer | None = None,
) -> dict[str, KernelConfig]:
    """Tunes what the cache has not, and keeps it there.

    Args:
        tasks (sequence of Task): each problem once.
        device (torch.device): where to run.
        report: where progress goes; None: the log.
        facts (Device or None): what the configurations must fit; None: those of `device`.
        timer (Timer or None): how launches are timed; None: CUDA events.

    Returns:
        dict: configurations by Problem.key; without those problems of which no configuration ran.
    """
    report = report or Report(progress=False)
    facts = facts or device_of(device)
    timer = timer or cuda_milliseconds
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with ranks_of(facts.name) as ranks, on_device, torch.no_grad():
        try:
            found = _tune_share(tasks[ranks.index :: ranks.count], device, facts, timer, report)
        except Exception as error:
            # The others wait for this rank's share.
            ranks.exchange(f"{type(error).__name__}: {error}")
            raise
        merged: dict[str, KernelConfig] = {}
        for rank, share in ranks.exchange(found):
            if isinstance(share, str):
                raise RuntimeError(f"moe_ops.tune: rank {rank} failed: {share}")
            merged.update(share)
    if ranks.count > 1:
        cache.store(facts.name, merged)
    return {
        task.problem.key: merged[task.problem.key] for task in tasks if task.problem.key in merged
    }


def _tune_share(
    tasks: Sequence[Task], device: torch.device, facts: Device, timer: Timer, report: Report
) -> dict[str, KernelConfig]:
    cache.forget()
    found = {task.problem.key: cache.lookup(facts.name, task.problem.key) for task in tasks}
    known = {key: config for key, config in found.items() if config is not None}
    pending = [task for task in tasks if task.problem.key not in known]
    if not pending:
        report.line(f"moe_ops.tune: nothing to do on {facts.name}, {len(known)} problems are tuned")
        return known
    report.start(
        f"moe_ops.tune: {len(pending)} problems on {facts.name}, {len(known)} were tuned before",
        len(pending),
    )
    for task in pending:
        try:
            best = _tune_one(task, device, facts, timer, report)
        except torch.OutOfMemoryError:
            report.step(f"{task.problem.key}: does not fit the GPU's memory")
            continue
        if best is not None:
            known[task.problem.key] = best
            cache.store(facts.name, {task.problem.key: best})
    report.end()
    return known


def _tune_one(
    task: Task, device: torch.device, facts: Device, timer: Timer, report: Report
) -> KernelConfig | None:
    """The fastest right configuration; None where there is none, which the report says."""
    start = time.perf_counter()
    bench = Bench(task, device)
    space = candidates(task.problem, facts)
    # The first alone: Triton sets itself up.
    failures = [bench.why_fails(space[0])]
    with ThreadPoolExecutor(bench.num_compilers()) as pool:
        failures += pool.map(bench.why_fails, space[1:])
    right = []
    for config, failure in zip(space, failures, strict=True):
        wrong = None if failure else bench.why_wrong(config)
        if wrong:
            _warn_dropped(task, config, wrong)
        elif failure:
            logger.info("moe_ops.tune: dropped %s: %s", describe(config), failure)
        else:
            right.append(config)
    if not right:
        report.step(f"{task.problem.key}: none of {len(space)} configurations runs on this GPU")
        return None
    milliseconds = timer({config: functools.partial(bench.launch, config) for config in right})
    # A race shows in some launches alone, and by now there were many.
    for best in sorted(right, key=milliseconds.__getitem__):
        wrong = bench.why_wrong(best)
        if wrong is None:
            break
        _warn_dropped(task, best, wrong)
    else:
        report.step(f"{task.problem.key}: no configuration is right twice")
        return None
    took = milliseconds[best]
    gain = f"{milliseconds[space[0]] / took:.2f}x" if space[0] in right else "and not"
    report.step(
        f"{task.problem.key}: {describe(best)}: {took:.4g} ms, {gain} the heuristic "
        f"({len(right)} of {len(space)} timed, {time.perf_counter() - start:.0f} s)"
    )
    return best


def _warn_dropped(task: Task, config: KernelConfig, wrong: str) -> None:
    logger.warning("moe_ops.tune: %s: dropped %s: %s", task.problem.key, describe(config), wrong)


def describe(config: KernelConfig) -> str:
    """Such as '128x256x64 num_warps=8 num_stages=3 group_m=8 flatten use_tma_load_w'."""
    words = [f"{config.BLOCK_M}x{config.BLOCK_N}x{config.BLOCK_K}"]
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool):
            words += [field.name] if value else []
        elif not field.name.startswith("BLOCK"):
            words.append(f"{field.name}={value}")
    return " ".join(words)

# SPDX-License-Identifier: Apache-2.0
"""Finds the fastest configuration on this GPU of each GEMM that a model's experts run.

problems.py   the GEMMs of a model, as problems
space.py      which configurations are tried
calls.py      the call of a problem: its arguments, the op, the same in PyTorch
bench.py      one problem on the device: run in a configuration, compared with PyTorch, timed
ranks.py      how the ranks of torch.distributed share the work
report.py     how progress is shown
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
from moe_ops.tuning.problems import NUM_TOKENS, Experts, Task, find_experts, products_of, tasks_of
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
    "products_of",
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
    """Find the fastest kernel configurations of a model's experts on this GPU, and keep them.

    Equal experts layers are tuned once. Each GEMM of forward, dX and dW is timed in every
    configuration of a small space. A configuration whose result differs from PyTorch's is dropped.
    Each result is written to the disk cache at once. This process and every later one find it there.
    So an interrupted call goes on where it stopped, and a second call has nothing to do.

    Call it after the model is made and before it is compiled, sharded or wrapped. With
    torch.distributed initialised every rank must call it. Ranks with the same GPU share the work.

    Args:
        model (nn.Module): its experts are the modules with 3-D parameters down_proj and gate_up_proj
            or up_proj, as in transformers. It may be on any device, also on meta. The GPU is the
            model's, or else the current one.
        num_tokens (int or sequence): tokens of a call, batch times length. A result serves all calls
            whose rows per expert fall into the same range (configs/problem.py).
        dtype (torch.dtype or None): bf16, fp16 or fp32. None is the weights' dtype. Under autocast
            give autocast's dtype.
        progress (bool): report to stderr, one line for each problem.
        top_k (int or None): experts of a token. None is what the model says.
        separate_ops (bool): also tune grouped_gemm with its permutations and topk_weights, for models
            and layers that call it in place of fused_experts.

    Returns:
        dict: the configuration of each problem, tuned now or before, by Problem.key. It is empty
            where MOE_OPS_AUTOTUNE=0 turns tuning off.

    Raises:
        ValueError: the model has no experts or does not say its top_k; num_tokens or dtype is bad.
        RuntimeError: torch.compile is tracing, or there is no CUDA device.
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
    """Return the current CUDA device.

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
    """Tune the problems that the cache does not have, and keep the results there.

    Args:
        tasks (sequence of Task): each problem once.
        device (torch.device): where to run.
        report: where progress goes. None is the log.
        facts (Device or None): the GPU that the configurations must fit. None is `device`.
        timer (Timer or None): how launches are timed. None is by CUDA events.

    Returns:
        dict: configurations by Problem.key, without the problems that no configuration could run.
    """
    report = report or Report(progress=False)
    facts = facts or device_of(device)
    timer = timer or cuda_milliseconds
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with ranks_of(facts.name) as ranks, on_device, torch.no_grad():
        try:
            found = _tune_share(tasks[ranks.index :: ranks.count], device, facts, timer, report)
        except Exception as error:
            # The other ranks wait for this rank's share.
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
    """Return the configurations of one rank's tasks, from the cache or tuned now."""
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
    """Return the fastest right configuration, or None after reporting that there is none."""
    start = time.perf_counter()
    bench = Bench(task, device)
    space = candidates(task.problem, facts)
    # The first one runs alone, since Triton sets itself up in it.
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
    # A race shows only in some launches, and by now there were many: compare again.
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
    """Describe a configuration, as '128x256x64 num_warps=8 num_stages=3 flatten use_tma_load_w'."""
    words = [f"{config.BLOCK_M}x{config.BLOCK_N}x{config.BLOCK_K}"]
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool):
            words += [field.name] if value else []
        elif not field.name.startswith("BLOCK"):
            words.append(f"{field.name}={value}")
    return " ".join(words)

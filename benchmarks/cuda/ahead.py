# SPDX-License-Identifier: Apache-2.0
"""Compile several shapes at once, as many as fit into the device's memory."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures

from benchmarks.cuda.experts import first_line

# Of the free memory, for the shapes that are compiled together.
SHARE = 0.85
# The context that each process has on the device, and what its libraries allocate.
CONTEXT_BYTES = 1 << 30

# What compiles, and the bytes that it takes.
Job = tuple[Callable[[], None], float]


def compile_within(
    jobs: Mapping[str, Job], processes: int, free_bytes: float, until: float
) -> None:
    """Run the jobs in processes of their own, none after `until` (time.monotonic).

    A job that fails is told; what it would have compiled is then compiled when it is measured.
    """
    budget = SHARE * free_bytes - processes * CONTEXT_BYTES
    waiting = dict(jobs)
    running: dict[futures.Future[None], str] = {}
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        while running or (waiting and time.monotonic() < until):
            taken = [jobs[label][1] for label in running.values()]
            for label in next_jobs(waiting, taken, processes, budget):
                run, _ = waiting.pop(label)
                running[pool.submit(run)] = label
            done, _ = futures.wait(running, return_when=futures.FIRST_COMPLETED)
            for job in done:
                label = running.pop(job)
                if (error := job.exception()) is None:
                    continue
                print(f"compiling {label} ahead: {first_line(error)}", flush=True)
                if isinstance(error, futures.BrokenExecutor):
                    return
            if time.monotonic() > until:
                waiting.clear()


def next_jobs(
    waiting: Mapping[str, Job], running: Sequence[float], processes: int, budget: float
) -> list[str]:
    """The jobs to start now: in order, while a process is idle and the memory suffices.

    A job that alone exceeds the budget runs when no other does. `running` has the bytes of those
    that do.
    """
    taken = list(running)
    chosen: list[str] = []
    for label, (_, num_bytes) in waiting.items():
        if len(taken) == processes:
            break
        if not taken or sum(taken) + num_bytes <= budget:
            chosen.append(label)
            taken.append(num_bytes)
    return chosen

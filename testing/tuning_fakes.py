# SPDX-License-Identifier: Apache-2.0
"""Stands in for a GPU in tests of tuning: Hopper's facts, and a clock that makes up times."""

import torch

from moe_ops.configs.device import Device
from moe_ops.tuning import Experts, tasks_of, tune_tasks

HOPPER = Device("NVIDIA H100", (9, 0), 232448, 132)
CPU = torch.device("cpu")
LAYER = Experts(num_experts=3, top_k=2, up=(32, 16), down=(16, 16), dtype=torch.float32)
TASKS = tasks_of([LAYER], [12])


class Clock:
    """A timer that says `price(config)` of each launch, and keeps the configurations it timed."""

    def __init__(self, price=lambda config: config.BLOCK_M, limit=None):
        self.price, self.limit = price, limit
        self.timed = []

    def __call__(self, launches):
        if self.limit is not None and len(self.timed) == self.limit:
            raise KeyboardInterrupt
        self.timed.append(set(launches))
        for launch in launches.values():
            launch(1)
        return {config: float(self.price(config)) for config in launches}


def tune_on_cpu(clock, tasks=TASKS, **options):
    return tune_tasks(tasks, CPU, facts=HOPPER, timer=clock, **options)

# SPDX-License-Identifier: Apache-2.0
"""The facts of a GPU that a choice depends on."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

# The compute capability's first number.
HOPPER = 9


@dataclass(frozen=True)
class Device:
    """What a choice knows of a GPU.

    Attributes:
        name: as torch says it.
        capability: the compute capability; (0, 0) of a CPU.
        shared_memory: bytes that one block may have.
        num_sms: streaming multiprocessors.
        is_interpreted: a CPU, where Triton interprets its kernels.
    """

    name: str
    capability: tuple[int, int]
    shared_memory: int
    num_sms: int
    is_interpreted: bool = False

    @property
    def has_tma(self) -> bool:
        """Whether it has a tensor memory accelerator, which loads what descriptors describe."""
        return self.capability >= (9, 0)


@functools.cache
def device_of(device: torch.device) -> Device:
    """The facts of a torch device."""
    if device.type != "cuda":
        return Device("cpu", (0, 0), 1 << 20, 4, is_interpreted=True)
    properties = torch.cuda.get_device_properties(device)
    return Device(
        properties.name,
        (properties.major, properties.minor),
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        properties.multi_processor_count,
    )

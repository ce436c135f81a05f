# SPDX-License-Identifier: Apache-2.0
"""Describe the GPU: the facts that a choice of configuration or kernel depends on."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

# The first number of Hopper's compute capability.
HOPPER = 9


@dataclass(frozen=True)
class Device:
    """Describe a GPU.

    Attributes:
        name: the name that torch gives.
        capability: the compute capability; (0, 0) for a CPU.
        shared_memory: bytes that one block may use.
        num_sms: the number of streaming multiprocessors.
        is_interpreted: whether this is a CPU, on which Triton interprets its kernels.
    """

    name: str
    capability: tuple[int, int]
    shared_memory: int
    num_sms: int
    is_interpreted: bool = False

    @property
    def has_tma(self) -> bool:
        """Return whether the GPU has TMA, which loads and stores by tensor descriptors."""
        return self.capability >= (9, 0)


@functools.cache
def device_of(device: torch.device) -> Device:
    """Return the facts of a torch device."""
    if device.type != "cuda":
        return Device("cpu", (0, 0), 1 << 20, 4, is_interpreted=True)
    properties = torch.cuda.get_device_properties(device)
    return Device(
        properties.name,
        (properties.major, properties.minor),
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        properties.multi_processor_count,
    )

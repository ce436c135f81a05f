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

    @property
    def has_dependent_launch(self) -> bool:
        """Return whether a kernel may begin while the one before it ends."""
        return self.capability >= (9, 0) and not self.is_interpreted


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


# The GPUs that `moe_ops explain --gpu` knows, by their usual names. Shared memory is what one block
# may use.
KNOWN_GPUS: dict[str, Device] = {
    "T4": Device("Tesla T4", (7, 5), 64 * 1024, 40),
    "A100": Device("NVIDIA A100-SXM4-80GB", (8, 0), 163 * 1024, 108),
    "RTX3090": Device("NVIDIA GeForce RTX 3090", (8, 6), 99 * 1024, 82),
    "L4": Device("NVIDIA L4", (8, 9), 99 * 1024, 58),
    "L40S": Device("NVIDIA L40S", (8, 9), 99 * 1024, 142),
    "RTX4090": Device("NVIDIA GeForce RTX 4090", (8, 9), 99 * 1024, 128),
    "H100": Device("NVIDIA H100 80GB HBM3", (9, 0), 227 * 1024, 132),
    "H100-PCIe": Device("NVIDIA H100 PCIe", (9, 0), 227 * 1024, 114),
    "GH200": Device("NVIDIA GH200 480GB", (9, 0), 227 * 1024, 132),
    "H200": Device("NVIDIA H200", (9, 0), 227 * 1024, 132),
    "B200": Device("NVIDIA B200", (10, 0), 227 * 1024, 148),
    "RTX5090": Device("NVIDIA GeForce RTX 5090", (12, 0), 99 * 1024, 170),
}


def known_gpu(name: str) -> Device:
    """Return the facts of a GPU by its short or its full name.

    Raises:
        ValueError: the name is not known.
    """
    for short, device in KNOWN_GPUS.items():
        if name.lower() in {short.lower(), device.name.lower()}:
            return device
    raise ValueError(f"expected a GPU of {', '.join(KNOWN_GPUS)}, got {name!r}")

# SPDX-License-Identifier: Apache-2.0
"""Tell the bytes that tensors hold on the GPU, as they asked for them.

torch.cuda.memory_allocated counts the allocator's blocks. It does not split one for a remainder of
up to 1 MiB, so the same tensors count differently after other tests.
"""

import torch


def held() -> int:
    """Return the bytes of the tensors that there are."""
    return _requested("current")


def most_held() -> int:
    """Return the most bytes since torch.cuda.reset_peak_memory_stats."""
    return _requested("peak")


def _requested(when: str) -> int:
    found: int = torch.cuda.memory_stats()[f"requested_bytes.all.{when}"]
    return found

# SPDX-License-Identifier: Apache-2.0
"""Counts the aten ops that a function calls."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class CountAten(TorchDispatchMode):
    """Count the calls of each aten op, and keep the tensors that each was given.

    An op of another namespace counts as itself alone: call its implementation as a function to see
    what is inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.given: dict[str, list[list[torch.Tensor]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        self.calls[name] += 1
        self.given.setdefault(name, []).append([a for a in args if isinstance(a, torch.Tensor)])
        return func(*args, **(kwargs or {}))

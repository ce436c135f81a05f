# SPDX-License-Identifier: Apache-2.0
"""Counts the calls of moe ops that reach a device's kernel."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode


class CountCalls(TorchDispatchMode):
    """Counts the calls of each moe op that reach a device kernel, and keeps their `needs`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.needs: dict[str, list[bool]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "moe":
            name = func.name().removeprefix("moe::")
            self.calls[name] += 1
            # Trailing arguments that equal their defaults do not come.
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
            for argument in func._schema.arguments:
                if argument.name == "needs":
                    self.needs[name] = list(given.get("needs", argument.default_value))
        return func(*args, **(kwargs or {}))

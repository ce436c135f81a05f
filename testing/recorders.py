# SPDX-License-Identifier: Apache-2.0
"""Records which ops run inside a `with`, and what they allocate."""

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class MoeOps(TorchDispatchMode):
    """Records the calls of moe ops that reach a device's kernel.

    Attributes:
        calls: (name, arguments) of each, in order.
        needs: the argument `needs` of the last call of each op that has one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.needs: dict[str, list[bool]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "moe":
            name = func._schema.name.removeprefix("moe::")
            self.calls.append((name, args))
            # Trailing arguments that equal their defaults do not come.
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
            for argument in func._schema.arguments:
                if argument.name == "needs":
                    self.needs[name] = list(given.get("needs", argument.default_value))
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        """Return the name of each call, in order."""
        return [name for name, _ in self.calls]

    @property
    def counts(self) -> Counter[str]:
        """Return how often each op was called."""
        return Counter(self.names)


class Allocations(TorchDispatchMode):
    """Records how many elements the storages have that the ops below autograd return."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            if isinstance(output, Tensor):
                self.sizes.add(output.untyped_storage().nbytes() // output.element_size())
        return outputs


class ReturnedShapes(TorchDispatchMode):
    """Records the shape of every tensor that any op returns.

    Attributes:
        made: (name of the op with its namespace, shape) of each tensor, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
            if isinstance(output, Tensor):
                self.made.append((func._schema.name, tuple(output.shape)))
        return outputs

    def shapes_of(self, op: str) -> list[tuple[int, ...]]:
        """Return the shapes of what an op returned, sorted, without those of (0,)."""
        return sorted(shape for name, shape in self.made if name == op and shape != (0,))


class CountAten(TorchDispatchMode):
    """Counts the calls of each aten op, and keeps the tensors that each was given.

    An op of another namespace counts as itself alone: call its implementation as a function to see
    what is inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.given: dict[str, list[list[Tensor]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        self.calls[name] += 1
        self.given.setdefault(name, []).append([a for a in args if isinstance(a, Tensor)])
        return func(*args, **(kwargs or {}))

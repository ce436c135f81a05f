# SPDX-License-Identifier: Apache-2.0
"""Tell weights and experts that are spread over ranks, and refuse them where only whole ones will do.

torch.distributed.tensor is not imported: that takes a second.
"""

from __future__ import annotations

from torch import Tensor, nn

# What moe_ops.distributed.ExpertParallel keeps on a module.
PARALLEL = "_expert_parallel"


def is_sharded(value: object) -> bool:
    """Tell whether a value is a DTensor."""
    return isinstance(value, Tensor) and type(value).__name__ == "DTensor"


def is_parallel(module: nn.Module) -> bool:
    """Tell whether ExpertParallel has spread a module's experts over ranks."""
    return PARALLEL in module.__dict__


def refuse_sharded(function: str, name: str, tensor: object, what: str) -> None:
    """Refuse a tensor that expert_parallel or fully_shard has spread over ranks.

    Args:
        function: what the error says was called.
        name: of the tensor.
        tensor: any value.
        what: what to do before, as "quantise the model".

    Raises:
        TypeError: it is a DTensor.
    """
    if is_sharded(tensor):
        raise TypeError(
            f"{function}: expected {name} to be a whole tensor, got a DTensor, which is spread over "
            f"ranks; {what} before expert_parallel and fully_shard"
        )

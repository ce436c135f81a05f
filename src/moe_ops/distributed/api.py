# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism for a whole model, and what it reports."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

from moe_ops.distributed.style import ExpertParallel, calls_of
from moe_ops.layers.experts_modules import experts_in


def expert_parallel(
    model: nn.Module, mesh: DeviceMesh, *, src_data_rank: int | None = 0, **options: Any
) -> nn.Module:
    """Spread every experts module of a model over the ranks of a mesh.

        model = AutoModelForCausalLM.from_config(config, experts_implementation="moe_ops")
        model = expert_parallel(model, mesh["ep"])

    Call it after PEFT has wrapped the model, and before fully_shard, torch.compile and the optimiser.

    Args:
        model (nn.Module): a model of transformers, or any module that holds experts modules.
        mesh (DeviceMesh): of one dimension.
        src_data_rank (int or None): the rank of the mesh whose weights all ranks get parts of. With
            None each rank takes its part of its own weights, and nothing is sent.
        options: of ExpertParallel.

    Returns:
        model (nn.Module): the same, changed in place. Names of parameters stay.

    Raises:
        ValueError: a model without experts modules; what ExpertParallel refuses. The model then is as
            it was.
    """
    found = [module for _, module in experts_in(model)]
    if not found:
        raise ValueError(
            "moe_ops.distributed.expert_parallel: expected a model with experts modules, got "
            f"{type(model).__name__} without; its experts bypass transformers' experts interface"
        )
    # A model of which a part is refused stays as it is.
    for module in found:
        ExpertParallel(**options).check(module, mesh)
    for module in found:
        parallelize_module(module, mesh, ExpertParallel(**options), src_data_rank=src_data_rank)
    return model


def dropped_slots(model: nn.Module) -> dict[str, Tensor]:
    """Return how many slots of this rank's tokens had no room, by experts module.

    They were beyond capacity_factor, and added nothing. A count goes on over forward passes until you
    zero it, as by count.zero_(). It is on the device of the mesh; reading its value synchronises.

    Args:
        model (nn.Module): it holds modules that ExpertParallel was applied to.

    Returns:
        counts (dict of Tensor (1,), int64): by the name of the experts module.
    """
    found = {name: calls_of(module) for name, module in model.named_modules()}
    return {name: calls.num_dropped for name, calls in found.items() if calls is not None}

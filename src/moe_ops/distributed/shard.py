# SPDX-License-Identifier: Apache-2.0
"""Shard the parameters of experts by expert."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moe_ops.distributed.experts import holds_experts


def shard_experts_(
    module: nn.Module, mesh: DeviceMesh, num_experts: int, src_data_rank: int | None
) -> None:
    """Replace the tensors of all experts in an experts module by DTensors, sharded on dim 0.

    Args:
        module: an experts module; its submodules are included.
        mesh: of one dimension.
        num_experts: a multiple of the mesh's size.
        src_data_rank: the rank whose values all ranks get, or None: each rank takes its own. On the
            meta device nothing is sent.
    """
    for owner in module.modules():
        if not holds_experts(owner):
            continue
        for name, tensor in _of_all_experts(owner._parameters, num_experts):
            sharded = nn.Parameter(
                _sharded(tensor, mesh, src_data_rank), requires_grad=tensor.requires_grad
            )
            owner.register_parameter(name, sharded)
        for name, tensor in _of_all_experts(owner._buffers, num_experts):
            owner._buffers[name] = _sharded(tensor, mesh, src_data_rank)


def _of_all_experts(
    tensors: dict[str, Tensor | None] | dict[str, nn.Parameter | None], num_experts: int
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in list(tensors.items()):
        if tensor is not None and tensor.ndim >= 2 and tensor.shape[0] == num_experts:
            yield name, tensor


def _sharded(tensor: Tensor, mesh: DeviceMesh, src_data_rank: int | None) -> DTensor:
    tensor = tensor.detach()
    if src_data_rank is not None and not tensor.is_meta:
        return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=src_data_rank)
    # A copy: a view would keep the experts of the other ranks.
    own = tensor.chunk(mesh.size())[mesh.get_local_rank()].clone()
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False)

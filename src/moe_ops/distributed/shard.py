# SPDX-License-Identifier: Apache-2.0
"""Shard the parameters of experts by expert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

# torch shards so itself, under FSDP2 with another sharding below. The class has no public name.
from torch.distributed.tensor.placement_types import _StridedShard

from moe_ops.distributed.experts import holds_experts
from moe_ops.layers.experts_modules import is_peft_wrapper


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
        if is_peft_wrapper(owner):
            _shard_adapters_(owner, mesh, num_experts, src_data_rank)
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


def _shard_adapters_(
    wrapper: Any, mesh: DeviceMesh, num_experts: int, src_data_rank: int | None
) -> None:
    """Shard the adapters of one of PEFT's wrappers.

    lora_A.weight (num_experts * rank, in_features) has the experts slowest. lora_B.weight
    (out_features, rank * num_experts) has them fastest: a rank holds some columns of each of `rank`
    blocks, which is torch's _StridedShard.
    """
    for linear in wrapper.lora_A.values():
        _replace_(linear, _sharded(linear.weight, mesh, src_data_rank))
    for linear in wrapper.lora_B.values():
        weight = linear.weight.detach()
        # (out_features, rank, num_experts) to experts first, to be sharded as all else.
        blocks = weight.unflatten(1, (-1, num_experts))
        own = _sharded(blocks.permute(2, 0, 1).contiguous(), mesh, src_data_rank).to_local()
        placement = _StridedShard(1, split_factor=blocks.shape[1])
        sharded = DTensor.from_local(
            own.permute(1, 2, 0).flatten(1).contiguous(), mesh, [placement],
            run_check=False, shape=weight.shape, stride=weight.stride(),
        )  # fmt: skip
        _replace_(linear, sharded)


def _replace_(linear: nn.Module, weight: DTensor) -> None:
    requires_grad = linear.get_parameter("weight").requires_grad
    linear.register_parameter("weight", nn.Parameter(weight, requires_grad=requires_grad))


def _sharded(tensor: Tensor, mesh: DeviceMesh, src_data_rank: int | None) -> DTensor:
    tensor = tensor.detach()
    if src_data_rank is not None and not tensor.is_meta:
        if tensor.itemsize == 1 and tensor.is_floating_point():
            # gloo sends no FP8.
            own = _sharded(tensor.view(torch.uint8), mesh, src_data_rank).to_local()
            return DTensor.from_local(own.view(tensor.dtype), mesh, [Shard(0)], run_check=False)
        return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=src_data_rank)
    # A copy: a view would keep the experts of the other ranks.
    own = tensor.chunk(mesh.size())[mesh.get_local_rank()].clone()
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False)

# SPDX-License-Identifier: Apache-2.0
"""fully_shard shards a quantised weight by expert, and its mixed precision leaves the bytes alone."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from moe_ops import QuantizedWeight, quantize_weight
from moe_ops.quantization.formats import FORMATS


class Model(nn.Module):
    """Shows what its forward sees: the dtype of a plain parameter, and the weight's tensors."""

    def __init__(self, num_experts, format):
        super().__init__()
        self.adapter = nn.Parameter(torch.ones(4, 70))
        self.weight = quantize_weight(torch.randn(num_experts, 5, 70), format)

    def forward(self):
        self.dtype_seen = self.adapter.dtype
        self.seen = {name: p.detach().clone() for name, p in self.weight.named_parameters()}
        return self.weight.dequantize(), self.adapter.sum()


def check(rank, world_size, format, num_experts):
    model = Model(num_experts, format)
    whole, tensors = model.weight.dequantize(), dict(model.weight.packed.tensors)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)), mp_policy=policy)
    assert model.weight.shape == (num_experts, 5, 70)
    for name, parameter in model.weight.named_parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.placements == (Shard(0),)
        local, mine = parameter.to_local(), tensors[name].chunk(world_size)[rank]
        assert local.dtype == mine.dtype
        assert torch.equal(local, mine)
    dequantised, loss = model()
    # The policy casts what it can.
    assert model.dtype_seen == torch.bfloat16
    assert torch.equal(dequantised, whole)
    for name, tensor in tensors.items():
        assert model.seen[name].dtype == tensor.dtype
        assert torch.equal(model.seen[name], tensor)
    loss.backward()
    assert isinstance(model.adapter.grad, DTensor)
    assert model.adapter.grad.full_tensor().eq(1).all()
    state: Any = copy.deepcopy(get_model_state_dict(model))
    for parameter in model.weight.parameters():
        assert isinstance(parameter, DTensor)
        parameter.to_local().zero_()
    set_model_state_dict(model, state)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        assert torch.equal(QuantizedWeight.from_state_dict(state, "weight.").dequantize(), whole)


@pytest.mark.slow
@pytest.mark.skipif(
    torch.__version__ < "2.12",
    reason="fully_shard takes floating parameters only before torch 2.12",
)
@pytest.mark.parametrize("num_experts", [4, 3], ids=["even", "last_rank_has_fewer"])
@pytest.mark.parametrize("format", FORMATS)
def test_two_ranks(ranks, format, num_experts):
    ranks(2).run(check, format=format, num_experts=num_experts)

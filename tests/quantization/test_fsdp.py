# SPDX-License-Identifier: Apache-2.0
"""fully_shard shards a quantised weight by expert, and its mixed precision leaves the bytes alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

ROOT = Path(__file__).parents[2]

RANK = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, set_model_state_dict
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from moe_ops import QuantizedWeight, quantize_weight
from moe_ops.quantization.formats import FORMATS

rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))

class Model(nn.Module):
    def __init__(self, num_experts, format):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.adapter = nn.Parameter(torch.ones(4, 70))
        self.weight = quantize_weight(torch.randn(num_experts, 5, 70, generator=generator), format)

    def forward(self):
        seen = {name: p.detach().clone() for name, p in self.weight.named_parameters()}
        dtypes.add(self.adapter.dtype)
        return self.weight.dequantize(), seen, self.adapter.sum()

# With 3 experts the last rank has fewer.
for format in FORMATS:
    for num_experts in (4, 3):
        dtypes = set()
        model = Model(num_experts, format)
        whole, tensors = model.weight.dequantize(), dict(model.weight.packed.tensors)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        assert model.weight.shape == (num_experts, 5, 70)
        for name, parameter in model.weight.named_parameters():
            assert isinstance(parameter, DTensor) and parameter.placements == (Shard(0),), name
            local = parameter.to_local()
            mine = tensors[name].chunk(2)[rank]
            assert local.dtype == mine.dtype and torch.equal(local, mine), (format, name)
        dequantised, seen, loss = model()
        # The adapter shows that the policy casts what it can.
        assert dtypes == {torch.bfloat16}
        assert torch.equal(dequantised, whole)
        for name, tensor in tensors.items():
            assert seen[name].dtype == tensor.dtype and torch.equal(seen[name], tensor), (format, name)
        loss.backward()
        assert model.adapter.grad.full_tensor().eq(1).all()
        state = {key: value.clone() for key, value in get_model_state_dict(model).items()}
        for parameter in model.weight.parameters():
            parameter.to_local().zero_()
        set_model_state_dict(model, state)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        if rank == 0:
            loaded = QuantizedWeight.from_state_dict(state, "weight.")
            assert torch.equal(loaded.dequantize(), whole)
dist.destroy_process_group()
print("done")
"""


@pytest.mark.slow
@pytest.mark.skipif(
    torch.__version__ < "2.12",
    reason="fully_shard takes floating parameters only before torch 2.12",
)
@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_ranks(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path / "store"), str(rank)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err
        assert out.splitlines()[-1] == "done"

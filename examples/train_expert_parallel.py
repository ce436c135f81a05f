# SPDX-License-Identifier: Apache-2.0
"""Train an MoE model whose experts are spread over ranks, all else sharded by FSDP2, and resume it.

Run it, on CPUs or GPUs, and again with another N to go on from the last checkpoint:

    torchrun --nproc-per-node N examples/train_expert_parallel.py --checkpoints runs/ep

N must divide the global batch of 16 sequences. The batch is the same for every such N, so the losses are
the same to rounding.
"""

import argparse
import gc
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from moe_ops.distributed import clip_grad_norm_, expert_parallel
from moe_ops.layers import Experts, MoE, Router

VOCAB, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, LAYERS = 64, 64, 96, 8, 2, 2
BATCH, LENGTH = 16, 32


class Layer(nn.Module):
    """An MoE layer behind a norm, which sees the token before too."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * HIDDEN, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        experts = Experts(EXPERTS, HIDDEN, INTERMEDIATE)
        self.moe = MoE(Router(HIDDEN, EXPERTS, TOP_K, renormalize=True), experts)

    def forward(self, hidden: Tensor) -> Tensor:
        before = F.pad(hidden, (0, 0, 1, 0))[:, :-1]
        mixed = self.norm(self.mix(torch.cat([hidden, before], -1)))
        output: Tensor = hidden + self.moe(mixed)[0]
        return output


class Model(nn.Module):
    """Predicts the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(hidden)
        return logits


def batch_of(step: int) -> Tensor:
    """Return the global batch of a step: each token follows from the two before it."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
    for i in range(2, LENGTH):
        tokens[:, i] = (3 * tokens[:, i - 1] + 5 * tokens[:, i - 2] + 1) % VOCAB
    return tokens


def parallel_model(device: str, expert_ranks: int) -> nn.Module:
    """Make the model, spread its experts, and shard it."""
    world_size = distributed.get_world_size()
    torch.manual_seed(0)
    model = Model().to(device)
    mesh = init_device_mesh(
        device, (world_size // expert_ranks, expert_ranks), mesh_dim_names=("fsdp", "ep")
    )
    everyone = init_device_mesh(device, (world_size,))
    expert_parallel(model, mesh["ep"])
    for layer in model.layers:
        # A rank's experts are sharded over the ranks that have the same, all else over all ranks.
        fully_shard(layer.get_submodule("moe.experts"), mesh=mesh["fsdp"])
        fully_shard(layer, mesh=everyone)
    fully_shard(model, mesh=everyone)
    return model


def last_step(folder: Path) -> int:
    """Return how many steps the newest whole checkpoint has seen; 0 where there is none."""
    marker = folder / "last"
    return int(marker.read_text()) if marker.exists() else 0


def states_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def write(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Save, and only then say that the checkpoint is whole."""
    save(states_of(model, optimizer), checkpoint_id=folder / f"step_{step}")
    distributed.barrier()
    if distributed.get_rank() == 0:
        (folder / "new").write_text(str(step))
        (folder / "new").replace(folder / "last")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--expert-ranks", type=int, default=0, help="0: two, or one where N is odd")
    options = parser.parse_args()
    if BATCH % (world_size := int(os.environ["WORLD_SIZE"])) != 0:
        parser.error(
            f"expected a number of ranks that divides the global batch of {BATCH}, got {world_size}; "
            f"use another --nproc-per-node"
        )
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = "cuda" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    options.checkpoints.mkdir(parents=True, exist_ok=True)
    train(options, device)
    # A thread of gloo that frees the last collective's tensors while Python ends aborts the process
    # (pytorch#190489). After the barrier it has time to.
    distributed.barrier()
    gc.collect()
    distributed.destroy_process_group()


def train(options: argparse.Namespace, device: str) -> None:
    """Train from the last checkpoint on."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    model = parallel_model(device, options.expert_ranks or 2 - world_size % 2)
    # foreach would mix tensors of two meshes.
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=False)
    if (start := last_step(options.checkpoints)) > 0:
        states = states_of(model, optimizer)
        load(states, checkpoint_id=options.checkpoints / f"step_{start}")
        set_state_dict(
            model,
            optimizer,
            model_state_dict=states["model"],
            optim_state_dict=states["optimizer"],
        )
    for step in range(start, options.steps):
        tokens = batch_of(step).chunk(world_size)[rank].to(device)
        logits = model(tokens)[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / world_size
        distributed.all_reduce(mean)
        if rank == 0:
            print(f"step {step}  loss {mean.item():.6f}", flush=True)
        if (step + 1) % options.save_every == 0:
            write(options.checkpoints, step + 1, model, optimizer)


if __name__ == "__main__":
    main()

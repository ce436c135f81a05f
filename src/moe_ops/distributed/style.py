# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism as a style of torch's parallelize_module."""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle
from torch.utils.checkpoint import checkpoint

from moe_ops._core.sharded import PARALLEL
from moe_ops._core.torch_private import is_in_backward
from moe_ops.distributed.experts import check_experts, check_implementation
from moe_ops.distributed.local import check_children, children, follow, hiding, local_view
from moe_ops.distributed.shard import shard_experts_
from moe_ops.layers import MoE
from moe_ops.layers.experts_modules import base_of, num_experts_of
from moe_ops.layers.functional import flattened, in_shape_of
from moe_ops.ops.ep_combine import ep_combine
from moe_ops.ops.ep_dispatch import ep_dispatch

_HERE = "moe_ops.distributed.ExpertParallel"


class ExpertParallel(ParallelStyle):
    """Spread an experts module over the ranks of a one-dimensional mesh.

        parallelize_module(model, mesh["ep"], {"layers.*.mlp.experts": ExpertParallel()})

    Rank r of W holds experts r * E / W to (r + 1) * E / W - 1. Each token goes to the ranks that have
    its experts and comes back, so the module's inputs and outputs are those of this rank's tokens, as
    before. Its weights and biases become DTensors that are sharded on dim 0, under their names; other
    parameters stay as they are. The module may be on the meta device: then nothing is copied, and
    to_empty() makes this rank's part alone.

    Every rank of the mesh calls the module, and its backward, equally often.

    Args:
        max_tokens_per_rank (int or None): the most tokens that a rank brings to a call. With None, all
            ranks bring equally many. With a number they may differ, down to none.
        capacity_factor (float or None): a rank has room for this many times its even share of the
            slots of each rank. Tokens beyond it are not sent: their slots add exactly zero, and
            dropped_slots counts them. With None every routing fits in which no token names an expert
            twice.
        keep_rows (bool): keep what the rank received, and what its experts keep, for the backward.
            By default it keeps its own tokens, and dispatches and computes again.

    It takes moe_ops.layers.MoE, Experts and LoraExperts, transformers' experts modules that run with
    experts_implementation="moe_ops", and those that PEFT has wrapped.

    Gradients of the experts are the sum over ranks of the gradients of their losses. Under fully_shard
    on another mesh they are the mean over the ranks of both meshes. A trainable parameter that all
    experts share, such as an activation's, is refused under fully_shard, in a call. Deterministic bit for bit. Nothing
    synchronises with the host, and torch.compile(fullgraph=True) takes it.

    Raises:
        TypeError: max_tokens_per_rank is no int, or capacity_factor no number.
        ValueError: max_tokens_per_rank or capacity_factor that is not positive and finite. From
            parallelize_module: a mesh of several dimensions, a number of experts that the mesh's size
            does not divide, a module without experts or one that is parallel already. From a call: more
            than max_tokens_per_rank tokens; experts of transformers that were switched to another
            implementation.

    Source: GShard (Lepikhin et al., 2020, arXiv:2006.16668).
    """

    def __init__(
        self,
        max_tokens_per_rank: int | None = None,
        capacity_factor: float | None = None,
        *,
        keep_rows: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (
            ("max_tokens_per_rank", max_tokens_per_rank),
            ("capacity_factor", capacity_factor),
        ):
            is_count = name == "max_tokens_per_rank"
            kinds, what = (int, "an int") if is_count else ((int, float), "a number")
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                raise TypeError(f"{_HERE}: expected {name} to be {what} or None, got {value!r}")
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{_HERE}: expected {name} > 0 and finite, or None, got {value}")
        self.max_tokens_per_rank = max_tokens_per_rank
        self.capacity_factor = capacity_factor
        self.keep_rows = keep_rows

    def check(self, module: nn.Module, device_mesh: DeviceMesh) -> None:
        """Refuse what parallelize_module would refuse, and change nothing.

        Raises:
            ValueError: as of the class, from parallelize_module.
        """
        experts = _experts_of(module)
        check_experts(_HERE, experts)
        if device_mesh.ndim != 1:
            raise ValueError(
                f"{_HERE}: expected a mesh of one dimension, got {device_mesh.ndim}; pass one "
                'dimension of it, as mesh["ep"]'
            )
        num_experts, world_size = num_experts_of(experts), device_mesh.size()
        if num_experts % world_size:
            raise ValueError(
                f"{_HERE}: expected a number of ranks that divides the {num_experts} experts, got "
                f"{world_size}; use a mesh whose size divides {num_experts}"
            )

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.check(module, device_mesh)
        experts = _experts_of(module)
        num_experts = num_experts_of(experts)
        shard_experts_(experts, device_mesh, num_experts, self.src_data_rank)
        calls = Calls(self, experts, device_mesh, num_experts)
        experts.__dict__[PARALLEL] = calls
        experts.__dict__["forward"] = functools.partial(_forward, calls)
        return module


def _experts_of(module: nn.Module) -> nn.Module:
    return module.experts if isinstance(module, MoE) else module


class Calls:
    """What a parallel experts module has beside its parameters.

    Attributes:
        view (nn.Module): the module with this rank's experts.
        base (nn.Module): what PEFT's wrappers in the view, if any, are around.
        hiding: what `follow` has to look at before each call.
        children: what `check_children` has to look at before each call.
        num_dropped (Tensor (1,), int64): slots of this rank's tokens that had no room, so far.
    """

    def __init__(
        self, style: ExpertParallel, experts: nn.Module, mesh: DeviceMesh, num_experts: int
    ) -> None:
        self.num_experts = num_experts
        self.world_size = mesh.size()
        self.group = mesh.get_group().group_name
        self.view = local_view(experts, num_experts // self.world_size, self.world_size)
        self.base = base_of(self.view)
        self.hiding = hiding(self.view)
        self.children = children(self.view)
        self.num_dropped = torch.zeros(1, dtype=torch.long, device=mesh.device_type)
        self.max_tokens = style.max_tokens_per_rank
        self.keep_rows = style.keep_rows
        factor = style.capacity_factor
        self.factor = None if factor is None else _fraction(factor)

    def capacity(self, num_tokens: int, top_k: int) -> int:
        """Return the most tokens that a rank sends to a rank."""
        most = num_tokens
        if self.max_tokens is not None:
            if num_tokens > self.max_tokens:
                raise ValueError(
                    f"{_HERE}: expected at most max_tokens_per_rank ({self.max_tokens}) tokens, got "
                    f"{num_tokens}; raise max_tokens_per_rank, on all ranks"
                )
            most = self.max_tokens
        if self.factor is None:
            return most
        share = most * top_k * self.factor.numerator
        parts = self.world_size * self.factor.denominator
        # In integers, because a compiler may know the number of tokens by name alone.
        return min(most, (share + parts - 1) // parts)


def _fraction(factor: float) -> Fraction:
    """Return a fraction of small numbers, above zero."""
    least = Fraction(1, 10**6)
    return max(Fraction(factor).limit_denominator(least.denominator), least)


def calls_of(module: nn.Module) -> Calls | None:
    """Return what ExpertParallel has put on a module, or None."""
    return module.__dict__.get(PARALLEL)


def _forward(
    calls: Calls,
    hidden_states: Tensor,
    topk_ids: Tensor | None = None,
    topk_weights: Tensor | None = None,
    *,
    top_k_index: Tensor | None = None,
    top_k_weights: Tensor | None = None,
) -> Tensor:
    """Compute a parallel experts module, in place of its forward. transformers has the latter names."""
    topk_ids = top_k_index if topk_ids is None else topk_ids
    topk_weights = top_k_weights if topk_weights is None else topk_weights
    if topk_ids is None or topk_weights is None:
        raise TypeError(f"{_HERE}: expected hidden_states, topk_ids and topk_weights, got fewer")
    tokens, *routing = flattened(hidden_states, topk_ids, topk_weights)
    capacity = calls.capacity(tokens.shape[0], topk_ids.shape[-1])
    # The model may have been changed or switched since.
    check_children(_HERE, calls.children)
    follow(calls.hiding)
    check_implementation(_HERE, calls.base)
    if calls.world_size == 1 and calls.factor is None:
        return calls.view.forward(hidden_states, topk_ids, topk_weights)
    if calls.keep_rows or not torch.is_grad_enabled():
        rows, local_ids, sent_slots, num_dropped = _rows(calls, capacity, tokens, *routing)
    else:
        rows, local_ids, sent_slots, num_dropped = checkpoint(
            functools.partial(_rows, calls, capacity), tokens, *routing, use_reentrant=False
        )
    # A checkpoint around the module calls it again in the backward.
    if torch.compiler.is_compiling() or not is_in_backward():
        calls.num_dropped.add_(num_dropped)
    output = ep_combine(
        rows, local_ids, sent_slots, calls.num_experts, calls.world_size, capacity, calls.group
    )
    return in_shape_of(hidden_states, output)


def _rows(
    calls: Calls, capacity: int, tokens: Tensor, topk_ids: Tensor, topk_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dispatch the tokens, and compute this rank's experts on what came."""
    rows, local_ids, local_weights, sent_slots, num_dropped = ep_dispatch(
        tokens, topk_ids, topk_weights, calls.num_experts, calls.world_size, capacity, calls.group
    )
    output: Any = calls.view.forward(rows, local_ids, local_weights)
    return output, local_ids, sent_slots, num_dropped

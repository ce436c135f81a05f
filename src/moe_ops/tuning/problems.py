# SPDX-License-Identifier: Apache-2.0
"""Finds the experts of a model, and lists the GEMMs that they run.

E experts, T tokens, R = T * top_k routed rows, N out_features, D in_features of one projection.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from moe_ops.configs.device import HOPPER, Device
from moe_ops.configs.problem import Problem, rows_bucket

# Tokens of a decoding step of one sequence and of 64, of a prompt, and of training steps.
NUM_TOKENS = (1, 64, 1024, 4096, 16384)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Routers and configs call the number of experts of a token by one of these names.
_TOP_K_NAMES = ("top_k", "num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts", "moe_k")


@dataclass(frozen=True)
class Experts:
    """The sizes of one experts layer. Its GEMMs depend on these and on the number of tokens.

    Attributes:
        num_experts: E.
        top_k: experts of a token.
        up, down: (out_features, in_features) of the two projections.
        dtype: the dtype of the products.
        has_bias: whether the projections have biases.
        transposed: whether the weights are stored as (E, in_features, out_features).
    """

    num_experts: int
    top_k: int
    up: tuple[int, int]
    down: tuple[int, int]
    dtype: torch.dtype
    has_bias: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Task:
    """A problem and the sizes to tune it at."""

    problem: Problem
    num_rows: int
    top_k: int


def find_experts(
    model: nn.Module, dtype: torch.dtype | None = None, top_k: int | None = None
) -> list[Experts]:
    """Return the different experts layers of a model.

    Raises:
        ValueError: the model has none, or does not say its top_k.
    """
    found: dict[Experts, None] = {}
    for name, module in model.named_modules():
        up = getattr(module, "gate_up_proj", getattr(module, "up_proj", None))
        down = getattr(module, "down_proj", None)
        if not (_is_stacked(up) and _is_stacked(down)):
            continue
        # Llama 4 does not say it. There the shapes tell: the hidden size goes into the first
        # projection and comes out of the second.
        transposed = getattr(module, "is_transposed", up.shape[2] != down.shape[1])
        layer = Experts(
            num_experts=up.shape[0],
            top_k=top_k or _top_k(model, name),
            up=(up.shape[2], up.shape[1]) if transposed else (up.shape[1], up.shape[2]),
            down=(down.shape[2], down.shape[1]) if transposed else (down.shape[1], down.shape[2]),
            dtype=dtype or up.dtype,
            has_bias=bool(getattr(module, "has_bias", False)),
            transposed=bool(transposed),
        )
        found[layer] = None
    if not found:
        raise ValueError(
            "moe_ops.tune: expected a model with experts (modules with 3-D parameters gate_up_proj "
            f"or up_proj, and down_proj), got {type(model).__name__} without"
        )
    return list(found)


def _is_stacked(weight: object) -> TypeGuard[Tensor]:
    return isinstance(weight, Tensor) and weight.ndim == 3


def _top_k(model: nn.Module, name: str) -> int:
    """Return the experts of a token, from the router beside the experts or from the config."""
    parent = model.get_submodule(name.rpartition(".")[0])
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else None
    for owner in (parent, *parent.children(), text_config, config):
        for attribute in _TOP_K_NAMES:
            value = getattr(owner, attribute, None)
            if isinstance(value, int):
                return value
    raise ValueError(
        f"moe_ops.tune: expected top_k to be given, got a model whose router beside {name!r} and "
        f"whose config have none of {', '.join(_TOP_K_NAMES)}"
    )


def tasks_of(
    layers: Iterable[Experts],
    num_tokens: Iterable[int],
    separate_ops: bool = False,
    device: Device | None = None,
) -> list[Task]:
    """Return the problems of some layers: those of fused_experts, and of grouped_gemm where asked.

    Each problem comes once, with the largest number of rows asked for. Some GPUs have problems of
    their own: these come where `device` is such a GPU.

    Raises:
        ValueError: no kernel computes in the dtype, or a size is below 1.
    """
    tasks: dict[str, Task] = {}
    counts = sorted(set(num_tokens))
    for layer in layers:
        if layer.dtype not in DTYPES:
            raise ValueError(
                f"moe_ops.tune: expected a dtype of bfloat16, float16, float32, got {layer.dtype}"
            )
        for size in (layer.num_experts, layer.top_k, *layer.up, *layer.down, *counts):
            if size < 1:
                raise ValueError(f"moe_ops.tune: expected sizes of 1 or more, got {size}")
        for tokens in counts:
            for problem in _problems(layer, tokens, separate_ops, device):
                tasks[problem.key] = Task(problem, tokens * layer.top_k, layer.top_k)
    return list(tasks.values())


def _problems(
    layer: Experts, num_tokens: int, separate_ops: bool, device: Device | None
) -> Iterator[Problem]:
    """Yield the problems of one layer at one number of tokens."""
    rows = rows_bucket(num_tokens * layer.top_k, layer.num_experts)
    dtype = str(layer.dtype).removeprefix("torch.")

    def problem(kind: str, sizes: tuple[int, int], **flags: Any) -> Problem:
        transposed = layer.transposed
        return Problem(kind, dtype, layer.num_experts, *sizes, rows, transposed=transposed, **flags)

    bias = layer.has_bias
    is_gated = layer.up[0] == 2 * layer.down[1]
    activation = "gated_activation" if is_gated else "activation"
    # The up projection gathers its rows and computes the activation too.
    yield problem("forward", layer.up, gather=True, bias=bias, epilogue=activation)
    yield problem("forward", layer.down, bias=bias)
    is_hopper = device is not None and device.capability[0] == HOPPER
    if is_gated and is_hopper and layer.dtype.itemsize == 2:
        # fused_experts asks for it where Hopper's kernel has the activation and the halves are not
        # interleaved. The sizes do not tell these, so the bare product is tuned as well.
        yield problem("backward_dX", layer.down, epilogue="gated_activation_backward")
    yield problem("backward_dX", layer.down)
    yield problem("backward_dX", layer.up)
    yield problem("backward_dW", layer.down)
    yield problem("backward_dW", layer.up)
    if separate_ops:
        # The permutations happen within the GEMMs. One that gathers its rows in forward scatters
        # them in dX. The rows of dW are moved before it.
        yield problem("forward", layer.up, gather=True, bias=bias)
        yield problem("backward_dX", layer.up, scatter=True)
        yield problem("forward", layer.down, scatter=True, scale=True, bias=bias)
        yield problem("backward_dX", layer.down, gather=True, scale=True, dots=True)

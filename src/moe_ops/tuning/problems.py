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

from moe_ops.configs.device import Device
from moe_ops.configs.problem import Problem, rows_bucket
from moe_ops.configs.specialize import asks_for_backward

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
        weights_before: whether the router weights multiply the experts' input (Llama 4).
    """

    num_experts: int
    top_k: int
    up: tuple[int, int]
    down: tuple[int, int]
    dtype: torch.dtype
    has_bias: bool = False
    transposed: bool = False
    weights_before: bool = False


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
    return list(dict.fromkeys(experts_layers(model, dtype, top_k)))


def experts_layers(
    model: nn.Module, dtype: torch.dtype | None = None, top_k: int | None = None
) -> list[Experts]:
    """Return the sizes of every experts layer of a model, in their order.

    Raises:
        ValueError: the model has none, or does not say its top_k.
    """
    found: list[Experts] = []
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
            has_bias=getattr(module, "down_proj_bias", None) is not None,
            transposed=bool(transposed),
            weights_before=getattr(module, "weights_before", _is_of_llama4(module)),
        )
        found.append(layer)
    if not found:
        raise ValueError(
            "moe_ops.tune: expected a model with experts (modules with 3-D parameters gate_up_proj "
            f"or up_proj, and down_proj), got {type(model).__name__} without"
        )
    return found


def _is_stacked(weight: object) -> TypeGuard[Tensor]:
    return isinstance(weight, Tensor) and weight.ndim == 3


def _is_of_llama4(module: nn.Module) -> bool:
    """Tell whether these are transformers' experts of Llama 4, which do not say how they weight."""
    return any(base.__name__ == "Llama4TextExperts" for base in type(module).__mro__)


def _top_k(model: nn.Module, name: str) -> int:
    """Return the experts of a token, from the nearest router beside the experts or the config.

    Adapters stand between the experts and the module that holds the router.
    """
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else None
    *path, _ = name.split(".")
    above = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path), -1, -1)]
    owners = [owner for module in above for owner in (module, *module.children())]
    for owner in (*owners, text_config, config):
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
        for tokens in counts:
            for _, problem in products_of(layer, tokens, separate_ops, device):
                task = Task(problem, tokens * layer.top_k, layer.top_k)
                known = tasks.get(problem.key)
                if known is None or known.num_rows < task.num_rows:
                    tasks[problem.key] = task
    return list(tasks.values())


def products_of(
    layer: Experts, num_tokens: int, separate_ops: bool = False, device: Device | None = None
) -> Iterator[tuple[str, Problem]]:
    """Yield the products of one layer at one number of tokens: the projection, and the problem.

    Raises:
        ValueError: no kernel computes in the dtype, or a size is below 1.
    """
    if layer.dtype not in DTYPES:
        raise ValueError(
            f"moe_ops.tune: expected a dtype of bfloat16, float16, float32, got {layer.dtype}"
        )
    hidden_size, width = layer.down
    sizes = {
        "num_experts": layer.num_experts, "top_k": layer.top_k, "hidden_size": hidden_size,
        "intermediate_size": width, "num_tokens": num_tokens,
    }  # fmt: skip
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"moe_ops.tune: expected {name} >= 1, got {size}")
    rows = rows_bucket(num_tokens * layer.top_k, layer.num_experts)
    dtype = str(layer.dtype).removeprefix("torch.")

    def product(projection: str, kind: str, **flags: Any) -> tuple[str, Problem]:
        sizes = layer.up if projection == "up" else layer.down
        transposed = layer.transposed
        problem = Problem(
            kind, dtype, layer.num_experts, *sizes, rows, transposed=transposed, **flags
        )
        return projection, problem

    bias = layer.has_bias
    is_gated = layer.up[0] == 2 * layer.down[1]
    activation = "gated_activation" if is_gated else "activation"
    # The up projection gathers its rows and computes the activation too. Rows that router weights
    # multiply are moved before it.
    yield product("up", "forward", gather=not layer.weights_before, bias=bias, epilogue=activation)
    yield product("down", "forward", bias=bias)
    # It reads the halves of the pre-activation by TMA.
    has_halves = is_gated and width * layer.dtype.itemsize % 16 == 0
    if has_halves and device is not None and asks_for_backward(device, layer.dtype.itemsize):
        # The sizes tell neither the activation nor whether gate and up are interleaved: the bare
        # product, which those take that the kernel lacks, comes as well.
        yield product("down", "backward_dX", epilogue="gated_activation_backward")
    yield product("down", "backward_dX")
    # With weights before, the router's gradient comes from this product.
    yield product("up", "backward_dX", dots=layer.weights_before)
    yield product("down", "backward_dW")
    yield product("up", "backward_dW")
    if separate_ops:
        # The permutations happen within the GEMMs. One that gathers its rows in forward scatters
        # them in dX. The rows of dW are moved before it.
        yield product("up", "forward", gather=True, bias=bias)
        yield product("up", "backward_dX", scatter=True)
        yield product("down", "forward", scatter=True, scale=True, bias=bias)
        yield product("down", "backward_dX", gather=True, scale=True, dots=True)

# SPDX-License-Identifier: Apache-2.0
"""The call that a problem stands for: its arguments, the op on the device, the same in PyTorch.

E num_experts, R routed rows, K top_k, N out_features, D in_features of the projection.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_ops._core.library import OPS
from moe_ops._pytorch.activation import Activation
from moe_ops.configs.problem import Problem
from moe_ops.ops.grouped_gemm import pytorch
from moe_ops.tuning.problems import Task

# An op, its device's or PyTorch's: it returns one tensor or several.
Op = Callable[..., Any]


def ops_of(problem: Problem) -> tuple[Op, Op]:
    """Return the op of a problem as the device runs it, and as PyTorch computes it."""
    if problem.has_activation:
        return up_projection_on_device, up_projection_in_pytorch
    if problem.epilogue == "gated_activation_backward":
        return down_backward_on_device, down_backward_in_pytorch
    if is_up_backward(problem):
        return up_backward_on_device, up_backward_in_pytorch
    name = {
        "forward": "grouped_gemm", "backward_dX": "grouped_gemm_dx", "backward_dW": "grouped_gemm_dw",
    }[problem.kind]  # fmt: skip
    return getattr(torch.ops.moe, name).default, getattr(pytorch, name)


def is_up_backward(problem: Problem) -> bool:
    """Tell whether it is the up projection's dX of weights that multiply the experts' input.

    It takes the router's gradient from unweighted rows, which grouped_gemm's dX does not.
    """
    return problem.dots and not problem.scale


def leaves_rows_unwritten(problem: Problem) -> bool:
    """Tell whether the op takes used_rows, since its kernel does not write rows of no expert."""
    return problem.epilogue == "gated_activation_backward" or is_up_backward(problem)


def random_arguments(
    task: Task, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    """Return random arguments of the problem's op, all but the configuration."""
    problem = task.problem
    dtype = getattr(torch, problem.dtype)
    normal = functools.partial(torch.randn, generator=generator, dtype=dtype, device=device)
    uniform = functools.partial(torch.rand, generator=generator, device=device)
    ids = torch.randint(problem.num_experts, (task.num_rows,), generator=generator, device=device)
    routing = _routing(ids, problem.num_experts)
    if problem.kind == "backward_dW":
        return _arguments_of_dw(task, routing, normal)
    if problem.has_activation:
        return _arguments_of_up_projection(task, routing, normal, uniform)
    if problem.epilogue == "gated_activation_backward":
        return _arguments_of_down_backward(task, routing, normal, uniform)
    if is_up_backward(problem):
        return _arguments_of_up_backward(task, routing, normal)
    return _arguments_of_gemm(task, routing, normal, uniform)


def skewed_routing(
    task: Task, device: torch.device, generator: torch.Generator
) -> dict[str, Tensor | None]:
    """Return the routing arguments of a call that is harder than a random one.

    One expert has many rows and one has none, and some rows belong to no expert.
    """
    problem, num_experts = task.problem, task.problem.num_experts
    uniform = torch.rand(task.num_rows, generator=generator, device=device)
    # The id num_experts is no expert's.
    ids = (uniform.square() * (num_experts + 1)).long()
    if num_experts > 2:
        ids[ids == num_experts // 2] = 0
    token_counts, gather_indices = _routing(ids, num_experts)
    permutes = problem.gather or problem.scatter or problem.dots or problem.epilogue != "none"
    return {
        "token_counts": token_counts,
        "gather_indices": gather_indices if permutes else None,
    }


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return what an op returned as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


# The arguments of each op. A routing is token_counts (E,) and gather_indices (R,).

_Routing = tuple[Tensor, Tensor]
_Random = Callable[..., Tensor]


def _routing(ids: Tensor, num_experts: int) -> _Routing:
    counts = torch.bincount(ids, minlength=num_experts)[:num_experts]
    return counts.int(), ids.argsort(stable=True).int()


def _weight(problem: Problem, normal: _Random) -> Tensor:
    """Return a weight (E, N, D), stored as (E, D, N) where the problem says so."""
    num_experts, n, d = problem.num_experts, problem.out_features, problem.in_features
    if problem.transposed:
        return normal(num_experts, d, n).transpose(1, 2)
    return normal(num_experts, n, d)


def _arguments_of_gemm(
    task: Task, routing: _Routing, normal: _Random, uniform: _Random
) -> dict[str, Any]:
    """Return the arguments of grouped_gemm, or of its dX."""
    problem, num_rows, top_k = task.problem, task.num_rows, task.top_k
    token_counts, gather_indices = routing
    is_forward = problem.kind == "forward"
    permute_x = problem.gather if is_forward else problem.scatter
    permute_y = problem.scatter if is_forward else problem.gather
    topk_weights = uniform(num_rows // top_k, top_k) if problem.scale else None
    weight = _weight(problem, normal)
    bias = normal(problem.num_experts, problem.out_features) if problem.bias else None
    num_inputs = num_rows // top_k if permute_x else num_rows
    if is_forward:
        given: dict[str, Any] = {"input": normal(num_inputs, problem.in_features)}
    else:
        given = {
            "grad_output": normal(num_rows, problem.out_features),
            "input": normal(num_inputs, problem.in_features) if problem.dots else None,
            "needs": [True, problem.dots],
        }
    return {
        **given,
        "weight": weight,
        "token_counts": token_counts,
        "gather_indices": gather_indices if permute_x or permute_y else None,
        "topk_weights": topk_weights,
        "bias": bias,
        "top_k": top_k if permute_x or topk_weights is not None else 1,
        "permute_x": permute_x,
        "permute_y": permute_y,
    }


def _arguments_of_dw(task: Task, routing: _Routing, normal: _Random) -> dict[str, Any]:
    """Return the arguments of grouped_gemm_dw, whose rows were moved before it."""
    problem, num_rows = task.problem, task.num_rows
    return {
        "grad_output": normal(num_rows, problem.out_features),
        "input": normal(num_rows, problem.in_features),
        "token_counts": routing[0],
        "gather_indices": None,
        "topk_weights": None,
        "top_k": 1,
        "permute_x": False,
        "permute_y": False,
        "needs": [True, False],
        "transposed": problem.transposed,
    }


def _arguments_of_up_projection(
    task: Task, routing: _Routing, normal: _Random, uniform: _Random
) -> dict[str, Any]:
    problem, num_tokens = task.problem, task.num_rows // task.top_k
    weight = _weight(problem, normal)
    bias = normal(problem.num_experts, problem.out_features) if problem.bias else None
    return {
        "input": normal(num_tokens, problem.in_features),
        # Weights before: rows are moved, and not gathered by the product.
        "topk_weights": None if problem.gather else uniform(num_tokens, task.top_k),
        "gated": problem.epilogue == "gated_activation",
        "weight": weight,
        "token_counts": routing[0],
        "gather_indices": routing[1],
        "bias": bias,
        "top_k": task.top_k,
    }


def _arguments_of_down_backward(
    task: Task, routing: _Routing, normal: _Random, uniform: _Random
) -> dict[str, Any]:
    problem, num_rows, top_k = task.problem, task.num_rows, task.top_k
    weight = _weight(problem, normal)
    return {
        "grad_output": normal(num_rows, problem.out_features),
        "pre_activation": normal(num_rows, 2 * problem.in_features),
        "weight": weight,
        "topk_weights": uniform(num_rows // top_k, top_k),
        "token_counts": routing[0],
        "gather_indices": routing[1],
    }


def _arguments_of_up_backward(task: Task, routing: _Routing, normal: _Random) -> dict[str, Any]:
    problem = task.problem
    return {
        "grad_output": normal(task.num_rows, problem.out_features),
        "input": normal(task.num_rows // task.top_k, problem.in_features),
        "weight": _weight(problem, normal),
        "token_counts": routing[0],
        "gather_indices": routing[1],
        "top_k": task.top_k,
    }


# The products that only fused_experts has, with silu. Each is there twice.


def up_projection_in_pytorch(
    input: Tensor,
    topk_weights: Tensor | None,
    gated: bool,
    weight: Tensor,
    token_counts: Tensor,
    gather_indices: Tensor,
    bias: Tensor | None,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """Return z = x @ weight.T + bias of the routed rows, and the activation h of z.

    Weights that are given multiply the rows before.
    """
    slots = gather_indices.long()
    rows = input[slots // top_k]
    if topk_weights is not None:
        rows = (rows.float() * topk_weights.flatten()[slots, None]).to(input.dtype)
    z = pytorch.grouped_gemm(rows, weight, token_counts, None, None, bias, 1)
    return z, Activation("silu", gated).apply(z)


def up_projection_on_device(
    kernel_config: str | None = None, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """Return the same as up_projection_in_pytorch, as fused_experts computes it on the device."""
    input, weight = arguments["input"], arguments["weight"]
    if OPS["fused_experts"].choose(input.device.type).name != "triton":
        return up_projection_in_pytorch(**arguments)
    from moe_ops._triton.experts import UpProjection

    gated = arguments["gated"]
    routed = _routed_rows(
        arguments["token_counts"], arguments["gather_indices"], arguments["top_k"], gated,
        kernel_config,
    )  # fmt: skip
    num_rows = routed.rows.num_rows
    z = input.new_empty(num_rows, weight.shape[1])
    # The kernel leaves the rows of no expert in h unwritten. PyTorch's are zero.
    h = input.new_zeros(num_rows, weight.shape[1] // (2 if gated else 1))
    weights = arguments["topk_weights"]
    UpProjection(routed, input, weight, arguments["bias"], weights, True).launch(z, h)
    return z, h


def down_backward_in_pytorch(
    grad_output: Tensor,
    pre_activation: Tensor,
    weight: Tensor,
    topk_weights: Tensor,
    token_counts: Tensor,
    gather_indices: Tensor,
    used_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a gated layer's backward computes from dh = grad_output @ weight.

    These are the gradient of pre_activation, the weighted activation, and <dh, activation> by slot.
    The first two have `used_rows` rows: those that belong to an expert.
    """
    no_permutation = (None, None, None, None, 1, False, False, [True, False])
    dh = pytorch.grouped_gemm_dx(grad_output, weight, token_counts, *no_permutation)[0]
    slots = gather_indices.long()
    dz, h = torch.empty_like(pre_activation), torch.empty_like(dh)
    dots_of_rows = torch.empty(len(dh), dtype=torch.float32, device=dh.device)
    scale = topk_weights.flatten()[slots].unsqueeze(1)
    Activation("silu").backward(pre_activation, dh, scale, h=h, grad_z=dz, dots=dots_of_rows)
    dots = torch.zeros_like(topk_weights).flatten()
    dots[slots] = dots_of_rows
    return dz[:used_rows], h[:used_rows], dots


def down_backward_on_device(
    kernel_config: str | None = None, used_rows: int | None = None, **arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same as down_backward_in_pytorch, as fused_experts computes it on the device."""
    if OPS["fused_experts"].choose(arguments["weight"].device.type).name != "triton":
        return down_backward_in_pytorch(**arguments, used_rows=used_rows)
    from moe_ops._triton.experts import DownBackward
    from moe_ops._triton.schedule import expert_offsets

    token_counts, weights = arguments["token_counts"], arguments["topk_weights"]
    routed = _routed_rows(
        token_counts, arguments["gather_indices"], weights.shape[1], True, kernel_config
    )
    offsets = expert_offsets(token_counts, routed.rows.num_rows)
    down = DownBackward(routed, arguments["weight"], None, weights, offsets)
    z = arguments["pre_activation"]
    dz, h, dots = down(arguments["grad_output"], 0, z, True, True, True)
    assert dz is not None
    assert h is not None
    assert dots is not None
    return dz[:used_rows], h[:used_rows], dots.sum(0)


def up_backward_in_pytorch(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    token_counts: Tensor,
    gather_indices: Tensor,
    top_k: int,
    used_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return dX = grad_output @ weight in expert order, and <dX, its input> by slot.

    dX has `used_rows` rows: those that belong to an expert.
    """
    no_permutation = (None, None, None, None, 1, False, False, [True, False])
    dx = pytorch.grouped_gemm_dx(grad_output, weight, token_counts, *no_permutation)[0]
    slots = gather_indices.long()
    dots = torch.zeros(len(dx), dtype=torch.float32, device=dx.device)
    dots[slots] = (dx.float() * input[slots // top_k].float()).sum(1)
    return dx[:used_rows], dots


def up_backward_on_device(
    kernel_config: str | None = None, used_rows: int | None = None, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """Return the same as up_backward_in_pytorch, as fused_experts computes it on the device."""
    if OPS["fused_experts"].choose(arguments["weight"].device.type).name != "triton":
        return up_backward_in_pytorch(**arguments, used_rows=used_rows)
    from moe_ops._triton.experts import up_gradients
    from moe_ops._triton.schedule import Rows

    dz, gather_indices = arguments["grad_output"], arguments["gather_indices"]
    rows = Rows.of(arguments["token_counts"], len(dz), gather_indices, arguments["top_k"])
    dx, dots, _ = up_gradients(
        dz, arguments["weight"], rows, arguments["input"], True, kernel_config
    )
    assert dx is not None
    assert dots is not None
    return dx[:used_rows], dots.sum(0)


def _routed_rows(
    token_counts: Tensor, gather_indices: Tensor, top_k: int, gated: bool, kernel_config: str | None
) -> Any:
    """Return the rows of an experts layer with silu, as fused_experts has them on the device."""
    from moe_ops._triton.activation import Activation as KernelActivation
    from moe_ops._triton.activation import RoutedRows
    from moe_ops._triton.rows import inverse_permutation
    from moe_ops._triton.schedule import Rows

    rows = Rows.of(token_counts, gather_indices.shape[0], gather_indices, top_k)
    scatter_indices = inverse_permutation(gather_indices)
    silu = KernelActivation("silu", None)
    return RoutedRows(rows, scatter_indices, silu, gated, False, kernel_config)

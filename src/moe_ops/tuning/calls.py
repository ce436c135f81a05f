# SPDX-License-Identifier: Apache-2.0
"""The calls that a problem stands for: random arguments, the op on the device, the op in PyTorch."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moe_ops._core.library import OPS
from moe_ops.ops.grouped_gemm import pytorch
from moe_ops.tuning.problems import Task


def random_arguments(
    task: Task, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    """Random arguments of the problem's op, all but the configuration."""
    problem, num_rows, top_k = task.problem, task.num_rows, task.top_k
    dtype = getattr(torch, problem.dtype)
    num_experts, n, d = problem.num_experts, problem.out_features, problem.in_features
    normal = functools.partial(torch.randn, generator=generator, dtype=dtype, device=device)
    ids = torch.randint(num_experts, (num_rows,), generator=generator, device=device)
    token_counts, gather_indices = _routing(ids, num_experts)
    if problem.kind == "backward_dW":
        return {
            "grad_output": normal(num_rows, n), "input": normal(num_rows, d),
            "token_counts": token_counts, "gather_indices": None, "topk_weights": None, "top_k": 1,
            "permute_x": False, "permute_y": False, "needs": [True, False],
            "transposed": problem.transposed,
        }  # fmt: skip
    is_forward = problem.kind == "forward"
    permute_x = problem.gather if is_forward else problem.scatter
    permute_y = problem.scatter if is_forward else problem.gather
    topk_weights = None
    if problem.scale:
        topk_weights = torch.rand(num_rows // top_k, top_k, generator=generator, device=device)
    if problem.transposed:
        weight = normal(num_experts, d, n).transpose(1, 2)
    else:
        weight = normal(num_experts, n, d)
    arguments = {
        "weight": weight,
        "token_counts": token_counts,
        "gather_indices": gather_indices if permute_x or permute_y else None,
        "topk_weights": topk_weights,
        "bias": normal(num_experts, n) if problem.bias else None,
        "top_k": top_k if permute_x or topk_weights is not None else 1,
        "permute_x": permute_x,
        "permute_y": permute_y,
    }
    inputs = num_rows // top_k if permute_x else num_rows
    if problem.has_activation:
        names = ("weight", "token_counts", "gather_indices", "bias", "top_k")
        given = {name: arguments[name] for name in names}
        return {
            "input": normal(inputs, d),
            "gated": problem.epilogue == "gated_activation",
            **given,
        }
    if is_forward:
        return {"input": normal(inputs, d), **arguments}
    if problem.epilogue == "gated_activation_backward":
        return {
            "grad_output": normal(num_rows, n),
            "pre_activation": normal(num_rows, 2 * d),
            "weight": weight,
            "topk_weights": torch.rand(
                num_rows // top_k, top_k, generator=generator, device=device
            ),
            "token_counts": token_counts,
            "gather_indices": gather_indices,
        }
    has_dots = problem.dots
    return {
        "grad_output": normal(num_rows, n),
        "input": normal(inputs, d) if has_dots else None,
        "needs": [True, has_dots],
        **arguments,
    }


def skewed_routing(
    task: Task, device: torch.device, generator: torch.Generator
) -> dict[str, Tensor | None]:
    """A harder routing than a random one: a hot expert, one without rows, rows of no expert."""
    num_experts, num_rows = task.problem.num_experts, task.num_rows
    uniform = torch.rand(num_rows, generator=generator, device=device)
    # The id num_experts is no expert's.
    ids = (uniform.square() * (num_experts + 1)).long()
    if num_experts > 2:
        ids[ids == num_experts // 2] = 0
    token_counts, gather_indices = _routing(ids, num_experts)
    problem = task.problem
    permutes = problem.gather or problem.scatter or problem.epilogue != "none"
    return {
        "token_counts": token_counts,
        "gather_indices": gather_indices if permutes else None,
    }


def _routing(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    counts = torch.bincount(ids, minlength=num_experts)[:num_experts]
    return counts.int(), ids.argsort(stable=True).int()


def up_projection_in_pytorch(
    input: Tensor,
    gated: bool,
    weight: Tensor,
    token_counts: Tensor,
    gather_indices: Tensor,
    bias: Tensor | None,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """z = x @ weight.T + bias of the routed rows, and silu of it, times up where it is gated."""
    z = pytorch.grouped_gemm(
        input, weight, token_counts, gather_indices, None, bias, top_k, permute_x=True
    )
    gate, up = z.float().chunk(2, 1) if gated else (z.float(), 1.0)
    return z, (functional.silu(gate) * up).to(z.dtype)


def up_projection_on_device(
    kernel_config: str | None = None, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """The same as fused_experts computes it on the device."""
    input, weight = arguments["input"], arguments["weight"]
    if OPS["fused_experts"].choose(input.device.type).name != "triton":
        return up_projection_in_pytorch(**arguments)
    from moe_ops._triton.experts import up_projection

    gated = arguments["gated"]
    routed = _routed_rows(
        arguments["token_counts"], arguments["gather_indices"], arguments["top_k"], gated,
        kernel_config,
    )  # fmt: skip
    num_rows = routed.rows.num_rows
    z = input.new_empty(num_rows, weight.shape[1])
    # The rows of no expert are nobody's in h.
    h = input.new_zeros(num_rows, weight.shape[1] // (2 if gated else 1))
    up_projection(routed, input, weight, arguments["bias"], None, z, h)
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
    """Of dh = grad_output @ weight: the gradient of the pre-activation, weighted silu, <dh, h>."""
    no_permutation = (None, None, None, None, 1, False, False, [True, False])
    dh = pytorch.grouped_gemm_dx(grad_output, weight, token_counts, *no_permutation)[0].float()
    gate, up = pre_activation.float().chunk(2, 1)
    sigmoid = gate.sigmoid()
    value, slope = gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
    scale = topk_weights.flatten()[gather_indices.long()].unsqueeze(1)
    dz = torch.cat([dh * slope * up, dh * value], 1).mul_(scale).to(grad_output.dtype)
    h = (value * up * scale).to(grad_output.dtype)
    dots = torch.zeros_like(topk_weights).flatten()
    dots[gather_indices.long()] = (dh * value * up).sum(1)
    return dz[:used_rows], h[:used_rows], dots


def down_backward_on_device(
    kernel_config: str | None = None, used_rows: int | None = None, **arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as fused_experts computes it on the device; the rows of no expert are nobody's."""
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


def _routed_rows(
    token_counts: Tensor, gather_indices: Tensor, top_k: int, gated: bool, kernel_config: str | None
) -> Any:
    """Return the rows of an experts layer with silu, as fused_experts has them on the device."""
    from moe_ops._triton.experts import RoutedRows
    from moe_ops._triton.launch import Activation
    from moe_ops._triton.rows import inverse_permutation
    from moe_ops._triton.schedule import Rows

    rows = Rows.of(token_counts, gather_indices.shape[0], gather_indices, top_k)
    scatter_indices = inverse_permutation(gather_indices)
    return RoutedRows(rows, scatter_indices, Activation("silu", None), gated, False, kernel_config)


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the outputs of an op as a tuple, also where it has one."""
    return outputs if isinstance(outputs, tuple) else (outputs,)

# SPDX-License-Identifier: Apache-2.0
"""One problem on a device: run in a configuration, compared with PyTorch, timed."""

from __future__ import annotations

import functools
import os
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moe_ops._core.library import OPS
from moe_ops.configs.kernel_config import KernelConfig
from moe_ops.configs.kernel_string import kernel_config
from moe_ops.ops.grouped_gemm import pytorch
from moe_ops.tuning.problems import Task

# How far a row may be from PyTorch's, relative to the longest row: both round, in another order.
_TOLERANCES = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-4}
_TF32_TOLERANCE = 5e-3
# Inputs take turns until together they are larger than any L2 cache.
_ROTATED_BYTES = 2**29
_MAX_ROTATED = 8
_MAX_COMPILERS = 8

# Median milliseconds of each launch; a launch takes the number of the turn.
Timer = Callable[[Mapping[KernelConfig, Callable[[int], object]]], dict[KernelConfig, float]]


class Bench:
    """One problem on the device: inputs that take turns, and what PyTorch makes of the first."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self.problem = task.problem
        self.device = device
        generator = torch.Generator(device).manual_seed(0)
        self.inputs = [_arguments(task, device, generator)]
        self.compared = {**self.inputs[0], **_skewed_routing(task, device, generator)}
        op = {"forward": "", "backward_dX": "_dx", "backward_dW": "_dw"}[task.problem.kind]
        self.op = getattr(torch.ops.moe, f"grouped_gemm{op}").default
        self.expected: tuple[Tensor, ...]
        if task.problem.has_activation:
            self.op = _up_projection
            self.expected = _up_projection_in_pytorch(**self.compared)
        elif task.problem.epilogue == "gated_activation_backward":
            self.op = _down_backward
            self.compared["used_rows"] = int(self.compared["token_counts"].sum())
            self.expected = _down_backward_in_pytorch(**self.compared)
        else:
            self.expected = _tensors(getattr(pytorch, f"grouped_gemm{op}")(**self.compared))
        given = [value for value in self.inputs[0].values() if isinstance(value, Tensor)]
        self.size = 1 + sum(t.numel() * t.element_size() for t in (*given, *self.expected))
        copies = min(_MAX_ROTATED, -(-_ROTATED_BYTES // self.size))
        self.inputs += (_arguments(task, device, generator) for _ in range(copies - 1))
        self._synchronize()

    def num_compilers(self) -> int:
        """How many configurations to try at once.

        Compiling is most of the time, and mostly leaves Python's lock alone; but each has an output.
        """
        if self.device.type != "cuda":
            return 1
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(1, min(_MAX_COMPILERS, os.cpu_count() or 1, free // self.size))

    def launch(self, config: KernelConfig, turn: int = 0) -> tuple[Tensor, ...]:
        """The op in this configuration, on the inputs whose turn it is."""
        return self._run(config, self.inputs[turn % len(self.inputs)])

    def _run(self, config: KernelConfig, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        text = kernel_config(**{self.problem.kind: config})  # type: ignore[arg-type]
        return _tensors(self.op(**arguments, kernel_config=text))

    def why_fails(self, config: KernelConfig) -> str | None:
        """Why the configuration does not compile or launch; None where it does."""
        # A thread has the device's context only after a call of CUDA's runtime, and Triton describes
        # tensors without one.
        self._synchronize()
        try:
            self.launch(config)
        except Exception as error:  # noqa: BLE001 - Triton's compiler raises of all kinds
            return f"{type(error).__name__}: {error}".partition("\n")[0]
        # A fault of the kernel spoils the CUDA context: there is no going on, so it is raised.
        self._synchronize()
        return None

    def why_wrong(self, config: KernelConfig) -> str | None:
        """Why the result is not PyTorch's; None where it is."""
        # What the kernel leaves out must not show an earlier kernel's result.
        poison = [torch.full_like(tensor, float("nan")) for tensor in self.expected]
        del poison
        tolerance = _TOLERANCES[self.problem.dtype]
        if self.problem.dtype == "float32":
            precision = torch.backends.cuda.matmul.fp32_precision
            tolerance = _TF32_TOLERANCE if precision == "tf32" else tolerance
        for actual, expected in zip(self._run(config, self.compared), self.expected, strict=True):
            error = _worst_row_error(actual, expected)
            # Also where it is NaN.
            if not error <= tolerance:
                return f"a row is off by {error:.1e}, expected at most {tolerance:.1e}"
        return None

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _arguments(task: Task, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
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


def _up_projection_in_pytorch(
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


def _up_projection(kernel_config: str | None = None, **arguments: Any) -> tuple[Tensor, Tensor]:
    """The same as fused_experts computes it on the device."""
    input, weight = arguments["input"], arguments["weight"]
    if OPS["fused_experts"].choose(input.device.type).name != "triton":
        return _up_projection_in_pytorch(**arguments)
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


def _down_backward_in_pytorch(
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


def _down_backward(
    kernel_config: str | None = None, used_rows: int | None = None, **arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as fused_experts computes it on the device; the rows of no expert are nobody's."""
    if OPS["fused_experts"].choose(arguments["weight"].device.type).name != "triton":
        return _down_backward_in_pytorch(**arguments, used_rows=used_rows)
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


def _skewed_routing(
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


def _tensors(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _worst_row_error(actual: Tensor, expected: Tensor) -> float:
    """max over rows ||actual - expected||, divided by max over rows ||expected||."""
    if expected.numel() == 0:
        return 0.0
    width = expected.shape[-1]
    # In pieces: the fp32 of a large gradient need not fit beside it.
    pieces = [t.reshape(-1, width).split(max(1, 2**26 // width)) for t in (actual, expected)]
    errors, norms = zip(
        *(((a.float() - e.float()).norm(dim=1).max(), e.float().norm(dim=1).max())
          for a, e in zip(*pieces, strict=True)),
        strict=True,
    )  # fmt: skip
    scale = torch.stack(norms).max()
    error = torch.stack(errors).max()
    return float(error / scale if scale > 0 else error)


def cuda_milliseconds(
    launches: Mapping[KernelConfig, Callable[[int], object]],
) -> dict[KernelConfig, float]:
    """Median milliseconds of each launch on the current CUDA device, all taking turns."""
    times: dict[KernelConfig, list[float]] = {config: [] for config in launches}

    def round_of(number: int) -> float:
        events = []
        # The GPU waits while the host queues the round, so that no launch waits for the host.
        torch.cuda._sleep(300_000 * len(launches))
        for position, (config, launch) in enumerate(launches.items()):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            # Neighbours have other inputs, and in other rounds each has another.
            launch(number + position)
            end.record()
            events.append((config, start, end))
        torch.cuda.synchronize()
        taken = [(config, start.elapsed_time(end)) for config, start, end in events]
        for config, milliseconds in taken:
            times[config].append(milliseconds)
        return sum(milliseconds for _, milliseconds in taken)

    round_of(0)
    for of_config in times.values():
        of_config.clear()
    budget = 2000.0
    for number in range(1, 51):
        budget -= round_of(number)
        if budget < 0 and number >= 5:
            break
    return {config: statistics.median(of_config) for config, of_config in times.items()}

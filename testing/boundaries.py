# SPDX-License-Identifier: Apache-2.0
"""Builds and checks calls exactly at a boundary: of a tail, of a limit, of a chunk of rows.

T tokens, K top_k, E experts, N out_features, D in_features, H hidden size, I intermediate size.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from testing import checks, experts_problem, gemm_problem, reference

moe = torch.ops.moe

# Rows of no expert behind those of four experts with two rows each.
TAILS = (0, 1, 2, 9)
# N, D: sizes that are multiples of 8, as torch's own grouped product wants them, and odd ones.
TAIL_WIDTHS = ((24, 16), (19, 17))


def tail_problem(
    tail: int,
    dtype: torch.dtype,
    *,
    widths: tuple[int, int],
    device: torch.device,
    counts: Sequence[int] = (2, 2, 2, 2),
    **mode: Any,
) -> gemm_problem.Problem:
    """Return a call of grouped_gemm of which the last `tail` rows belong to no expert."""
    num_experts = len(counts)
    experts = [e for e, count in enumerate(counts) for _ in range(count)]
    slots = torch.tensor(experts + [-1] * tail)
    shuffled = slots[torch.randperm(len(slots), generator=torch.Generator().manual_seed(0))]
    top_k = next(k for k in (3, 2, 1) if len(slots) % k == 0)
    shape = (len(slots) // top_k, top_k, num_experts, *widths)
    ids = shuffled.view(-1, top_k).to(device)
    given = gemm_problem.problem(shape, dtype, ids=ids, device=device, **mode)
    if given.arguments["topk_weights"] is not None:
        given.arguments["topk_weights"] = given.arguments["topk_weights"].to(_weights_dtype(dtype))
    return given


def _weights_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return fp32, or fp64 for rows in fp64."""
    return torch.promote_types(dtype, torch.float32)


def check_tail(problem: gemm_problem.Problem, tail: int) -> None:
    """Values and gradients are right, and the rows of no expert are exactly zero."""
    counts, gather = (problem.arguments[name] for name in ("token_counts", "gather_indices"))
    assert len(gather) - int(counts.sum()) == tail
    output, gradients = gemm_problem.check(problem)
    rows = torch.arange(len(gather) - tail, len(gather), device=output.device)
    slots = gather[rows].long()
    assert (output[slots if problem.arguments["permute_y"] else rows] == 0).all()
    if not problem.arguments["permute_x"]:
        assert (gradients["input"][rows] == 0).all()


# Representable with room to spare in every dtype, and no zero of an activation or of its slope.
LIMIT = 0.75
LIMITED: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "gpt-oss": {"activation": "swiglu_oai", "interleaved": True},
    "geglu": {"activation": "gelu"},
    "geglu-tanh-interleaved": {"activation": "gelu_tanh", "interleaved": True},
    "reglu": {"activation": "relu"},
    "recompute": {"recompute": "pre_activation"},
    "ungated": {"gated": False},
    "ungated-squared": {"gated": False, "activation": "relu_squared"},
}


def limit_problem(
    dtype: torch.dtype,
    *,
    device: torch.device,
    hidden_size: int = 24,
    intermediate_size: int = 24,
    **flags: Any,
) -> experts_problem.Problem:
    """Return a call of fused_experts whose gate and up are exactly at the limit, and next to it.

    Each expert gets each unit vector of H once. So the pre-activation of a row is a column of its
    expert's gate_up_proj, exact in every dtype, and each element of that weight has the gradient of
    one element of the pre-activation.
    """
    ulp = torch.finfo(dtype).eps / 2
    near = [LIMIT - ulp, LIMIT, LIMIT + ulp]
    # A gate has no lower limit.
    gates = [-2 * LIMIT, 0.3125, *near, 2 * LIMIT]
    ups = [-2 * LIMIT, *(-value for value in near), 0.3125, *near, 2 * LIMIT]
    num_experts = 2
    num_tokens = num_experts * hidden_size
    shape = (num_experts, intermediate_size, hidden_size)
    # Every pair in turn.
    pairs = torch.cartesian_prod(*(torch.tensor(v, dtype=torch.float64) for v in (gates, ups)))
    assert math.prod(shape) >= len(pairs)
    chosen = pairs[torch.arange(math.prod(shape)) % len(pairs)]
    gate, up = (values.reshape(shape) for values in chosen.unbind(1))
    weight = gate
    if flags.get("gated", True):
        # (E, I, 2, H) is interleaved, (E, 2, I, H) is not.
        weight = torch.stack((gate, up), 2 if flags.get("interleaved") else 1).flatten(1, 2)
    generator = torch.Generator().manual_seed(0)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(device, dtype)

    arguments = {
        "hidden_states": torch.eye(hidden_size, dtype=dtype, device=device).repeat(num_experts, 1),
        "gate_up_proj": weight.to(device, dtype),
        "down_proj": randn(num_experts, hidden_size, intermediate_size),
        "topk_ids": torch.arange(num_experts, device=device).repeat_interleave(hidden_size)[
            :, None
        ],
        "topk_weights": (torch.rand(num_tokens, 1, generator=generator) + 0.5).to(
            device, _weights_dtype(dtype)
        ),
        "activation_limit": LIMIT,
        **flags,
    }
    leaves = ["hidden_states", "gate_up_proj", "down_proj", "topk_weights"]
    grad_output = randn(num_tokens, hidden_size)
    return experts_problem.Problem(arguments, leaves, grad_output)


def check_limit(problem: experts_problem.Problem) -> None:
    """Values are right; gradients pass at the limit and are zero beyond it."""
    _, gradients = experts_problem.check(problem)
    given = problem.arguments
    z, passed = given["gate_up_proj"].detach(), gradients["gate_up_proj"] != 0
    gated, interleaved = given.get("gated", True), given.get("interleaved", False)
    relu = given.get("activation", "silu").startswith("relu")
    gate, up = _halves(z, gated, interleaved)
    gate_passed, up_passed = _halves(passed, gated, interleaved)
    active = gate > 0 if relu else torch.ones_like(gate, dtype=torch.bool)
    assert (gate == LIMIT).any()
    assert torch.equal(gate_passed, (gate <= LIMIT) & active), "the gradient of gate"
    if gated:
        assert (up == LIMIT).any()
        assert (up == -LIMIT).any()
        assert torch.equal(up_passed, (up.abs() <= LIMIT) & active), "the gradient of up"


def _halves(z: Tensor, gated: bool, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return gate and up; z twice where it is not gated."""
    if not gated:
        return z, z
    half = z.shape[1] // 2
    return (z[:, 0::2], z[:, 1::2]) if interleaved else (z[:, :half], z[:, half:])


# T, K, H: one row more than whole chunks of 2**19 elements, none, and one row less, in unpermute,
# whose rows are read K at a time; then the same of the T * K rows of its backward.
CHUNK_SHAPES = ((4097, 2, 64), (4096, 2, 64), (4095, 2, 64), (8193, 1, 64), (8191, 1, 64))


def check_unpermute(
    shape: tuple[int, int, int], dtype: torch.dtype, *, weighted: bool, device: torch.device
) -> None:
    """Every row of unpermute and of its gradients is written, and right."""
    num_tokens, top_k, hidden_size = shape
    generator = torch.Generator().manual_seed(0)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(device, dtype)

    arguments: dict[str, Any] = {
        "input": randn(num_tokens * top_k, hidden_size),
        "gather_indices": torch.randperm(num_tokens * top_k, generator=generator).to(device),
        "topk_weights": None,
        "top_k": top_k,
    }
    if weighted:
        topk_weights = torch.rand(num_tokens, top_k, generator=generator)
        arguments["topk_weights"] = topk_weights.to(device, _weights_dtype(dtype))
    leaves = [name for name in ("input", "topk_weights") if arguments[name] is not None]
    tangent = randn(num_tokens, hidden_size)
    found = {**arguments, **{name: arguments[name].requires_grad_() for name in leaves}}
    exact = {name: arguments[name].detach().double().requires_grad_() for name in leaves}
    with checks.poisoned_memory():
        output = moe.unpermute(**found)
        gradients = torch.autograd.grad(output, [found[name] for name in leaves], tangent)
    want = reference.unpermute(**{**arguments, **exact})
    want_gradients = torch.autograd.grad(want, list(exact.values()), tangent.double())
    checks.assert_rows_close(output.detach(), want.detach(), dtype, "output")
    for name, got, expected in zip(leaves, gradients, want_gradients, strict=True):
        if name == "topk_weights":
            checks.assert_close(got, expected, dtype=dtype, what=name)
        else:
            checks.assert_rows_close(got, expected, dtype, f"gradient of {name}")

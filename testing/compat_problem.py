# SPDX-License-Identifier: Apache-2.0
"""Builds a call of compat's grouped_gemm, and says what the reference computes for it.

T tokens, E experts, K top_k, M = T * K rows, D in_features, N out_features.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from testing import reference

# Of permute_x, permute_y and weighted, what may go together.
FLAGS = [
    (x, y, w) for x, y in ((False, False), (True, False), (False, True)) for w in (False, True)
]

INTEGER = (
    torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


@dataclass
class Problem:
    """The tensors of one grouped GEMM; one expert has no rows."""

    X: Tensor  # (T, D) with permute_x, else (M, D)
    W: Tensor  # (E, N, D)
    m_sizes: Tensor  # (E,)
    gather_indices: Tensor  # (M,)
    topk_weights: Tensor  # (T, K)
    topk: int

    def call(self, permute_x: bool, permute_y: bool, weighted: bool) -> dict[str, Any]:
        """Return the arguments of grouped_gemm."""
        return {
            "X": self.X,
            "W": self.W,
            "m_sizes": self.m_sizes,
            "topk": self.topk,
            "gather_indices": self.gather_indices,
            "permute_x": permute_x,
            "permute_y": permute_y,
            "topk_weights": self.topk_weights if weighted else None,
            "fuse_mul_post": weighted,
        }


EMPTY_EXPERT = 2


def problem(
    permute_x: bool = False,
    dtype: torch.dtype = torch.float32,
    num_tokens: int = 13,
    num_experts: int = 5,
    topk: int = 3,
    in_features: int = 45,
    out_features: int = 7,
) -> Problem:
    scores = torch.rand(num_tokens, num_experts)
    scores[:, EMPTY_EXPERT] = -1
    topk_ids = scores.topk(topk).indices
    num_rows = num_tokens if permute_x else num_tokens * topk
    return Problem(
        X=torch.randn(num_rows, in_features).to(dtype),
        W=torch.randn(num_experts, out_features, in_features).to(dtype),
        m_sizes=torch.bincount(topk_ids.flatten(), minlength=num_experts),
        gather_indices=torch.argsort(topk_ids.flatten(), stable=True),
        topk_weights=torch.rand(num_tokens, topk),
        topk=topk,
    )


def expected_output(
    X: Tensor,
    W: Tensor,
    m_sizes: Tensor,
    topk: int,
    gather_indices: Tensor,
    permute_x: bool,
    permute_y: bool,
    topk_weights: Tensor | None,
    fuse_mul_post: bool,
) -> Tensor:
    """Return what the reference says of a call with compat's names. W is (E, N, D) or (E * N, D)."""
    weight = W.reshape(len(m_sizes), -1, W.shape[-1])
    weights = topk_weights if fuse_mul_post else None
    return reference.grouped_gemm(
        X, weight, m_sizes, gather_indices, weights, None, topk, permute_x, permute_y
    )


DIFFERENTIABLE = ("X", "W", "topk_weights")


def forward_and_backward(
    function: Any, call: dict[str, Any], tangent: Tensor, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return the output of function(**call) and the gradients of its floating tensors.

    These are first brought to `dtype` where one is given.
    """
    leaves = {
        # Of the same strides, in the same dtype.
        name: call[name].detach().to(dtype or call[name].dtype).requires_grad_()
        for name in DIFFERENTIABLE
        if call[name] is not None
    }
    output = function(**{**call, **leaves})
    grads = torch.autograd.grad(output, list(leaves.values()), tangent.to(output.dtype))
    return {"output": output, **dict(zip(leaves, grads, strict=True))}

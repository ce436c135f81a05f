# SPDX-License-Identifier: Apache-2.0
"""Offers grouped_gemm with Unsloth's arguments, and the loop over experts that it replaces.

T num_tokens, E num_experts, K in_features, N out_features, M = T * topk routed rows. A slot is
token * topk + choice. In expert order rows are grouped by expert, and by slot within an expert.
"""

from __future__ import annotations

import torch

import moe_ops
from moe_ops.compat.indices import as_index
from moe_ops.compat.kernel_string import kernel_string
from moe_ops.configs.kernel_config import (
    KernelConfigBackward_dW,
    KernelConfigBackward_dX,
    KernelConfigForward,
)


def grouped_gemm(
    X: torch.Tensor,
    W: torch.Tensor,
    m_sizes: torch.Tensor,
    topk: int,
    gather_indices: torch.Tensor | None = None,
    permute_x: bool = False,
    permute_y: bool = False,
    topk_weights: torch.Tensor | None = None,
    fuse_mul_post: bool = False,
    kernel_config_fwd: KernelConfigForward | None = None,
    kernel_config_bwd_dX: KernelConfigBackward_dX | None = None,
    kernel_config_bwd_dW: KernelConfigBackward_dW | None = None,
    autotune: bool = False,
    is_first_gemm: bool = True,  # noqa: ARG001
    dX_only: bool = False,
    dW_only: bool = False,
) -> torch.Tensor:
    """Multiply each expert's rows by that expert's weight, and permute and weight them on the way.

        output[i] = s * (x[i] @ W[e].T)   for each row i of expert e
        x[i]      = X[gather_indices[i] // topk] with permute_x, else X[i]
        s         = topk_weights.flatten()[slot] with fuse_mul_post, else 1
        slot      = gather_indices[i], or i without gather_indices
        with permute_y row i is stored at output[gather_indices[i]]

    Args:
        X ((T, K) with permute_x, else (M, K), floating): rows in token order with permute_x, else
            in expert order. X and all other tensors may have any strides.
        W ((E, N, K) or (E * N, K), dtype of X): one matrix per expert. Its gradient has W's shape.
        m_sizes ((E,), any integer): rows of each expert, at least 0. Rows past their sum belong to
            no expert. Their output is zero.
        topk (int): slots per token.
        gather_indices ((M,), any integer, or None): slot of each row in expert order. permute_x and
            permute_y need it.
        permute_x (bool): gather the rows of X from token order. Not together with permute_y.
        permute_y (bool): store the rows of the output in slot order.
        topk_weights ((T, topk) or (M,), floating, or None): router weight of each slot, in slot
            order. With fuse_mul_post=False they are not used and get no gradient: the caller
            multiplies by them afterwards.
        fuse_mul_post (bool): multiply by topk_weights, in fp32 before the downcast. It may be used
            in training and in inference.
        kernel_config_fwd (KernelConfigForward or None): how a GPU computes the forward. The class is
            that of moe_ops or of moe_ops.compat.kernels.tuning, here and below. Without a
            configuration a GEMM gets what `moe_ops.tune` found, else what the package ships for the
            GPU, else what a few rules compute. Configurations change the order of sums at most.
        kernel_config_bwd_dX (KernelConfigBackward_dX or None): the same for the gradient of X.
        kernel_config_bwd_dW (KernelConfigBackward_dW or None): the same for the gradient of W.
        autotune (bool): choose the configurations as above. It excludes kernel_config_*. No call
            tunes, with either value: call `moe_ops.tune` before training.
        is_first_gemm (bool): accepted and not used. Nothing here depends on it.
        dX_only (bool): compute no gradient of W in the backward. The gradient of topk_weights is
            computed: it is part of the GEMM of dX.
        dW_only (bool): compute only the gradient of W in the backward, not those of X and
            topk_weights. Excludes dX_only.

    Returns:
        output ((M, N), dtype of X): rows in slot order with permute_y, else in expert order.

    Raises:
        ValueError: arguments exclude each other, or a shape does not fit. If the op raises it
            (moe::grouped_gemm), the text has the op's names: `input` is X, `weight` is W with three
            dimensions, `token_counts` is m_sizes, `top_k` is topk.
        TypeError: a dtype does not fit, or a configuration belongs to another GEMM.

    Differentiable in X, W and, with fuse_mul_post, topk_weights. For an input that requires no gradient
    no GEMM is launched and no gradient allocated. The same inputs give the same bits.

    Source: the arguments are those of Unsloth's grouped_gemm (github.com/unslothai/unsloth).
    """
    if dX_only and dW_only:
        raise _error("expected at most one of dX_only and dW_only, got both")
    if fuse_mul_post and topk_weights is None:
        raise _error("expected topk_weights with fuse_mul_post=True, got None")
    config = kernel_string(kernel_config_fwd, kernel_config_bwd_dX, kernel_config_bwd_dW)
    if autotune and config is not None:
        raise _error(
            "expected autotune=False with kernel_config_fwd, kernel_config_bwd_dX or "
            "kernel_config_bwd_dW, got True"
        )
    token_counts = as_index(m_sizes, "grouped_gemm", "m_sizes")
    if gather_indices is not None:
        gather_indices = as_index(gather_indices, "grouped_gemm", "gather_indices")
    weight = _as_3d("grouped_gemm", W, m_sizes.numel())
    weights = _as_2d(topk_weights, topk) if fuse_mul_post and topk_weights is not None else None
    # A detached tensor needs no gradient, so the op launches nothing for it.
    if dX_only:
        weight = weight.detach()
    if dW_only:
        X = X.detach()
        weights = None if weights is None else weights.detach()
    return moe_ops.grouped_gemm(
        X,
        weight,
        token_counts,
        gather_indices,
        weights,
        top_k=topk,
        permute_x=permute_x,
        permute_y=permute_y,
        kernel_config=config,
    )


def torch_grouped_gemm(
    X: torch.Tensor, W: torch.Tensor, m_sizes: torch.Tensor, transpose: bool = True
) -> torch.Tensor:
    """Multiply each expert's rows by that expert's weight, in a loop over the experts.

        output[i] = X[i] @ W[e].T, or X[i] @ W[e] without transpose, for each row i of expert e

    This is the readable reference of `grouped_gemm`. It uses torch's own ops in their precision, and
    reads m_sizes on the host.

    Args:
        X ((M, K), floating): rows in expert order.
        W ((E, N, K), or (E, K, N) without transpose, dtype of X): one matrix per expert. The first
            two dimensions may be flattened into one, as for `grouped_gemm`.
        m_sizes ((E,), any integer): rows of each expert. Their sum is at most M.
        transpose (bool): W holds its matrices as (N, K), else as (K, N).

    Returns:
        output ((M, N), dtype of X): rows in expert order. Rows of no expert are zero.

    Raises:
        ValueError: W has not two or three dimensions, or with two the first is no multiple of E.
        TypeError: m_sizes has no integer dtype.

    Differentiable in X and W, any number of times.
    """
    counts = as_index(m_sizes, "torch_grouped_gemm", "m_sizes").tolist()
    num_rest = X.shape[0] - sum(counts)
    *groups, _ = X.split([*counts, num_rest])
    W = _as_3d("torch_grouped_gemm", W, len(counts))
    matrices = W.mT if transpose else W
    products = [rows @ matrix for rows, matrix in zip(groups, matrices, strict=True)]
    return torch.cat([*products, X.new_zeros(num_rest, matrices.shape[2])])


def _error(text: str, function: str = "grouped_gemm") -> ValueError:
    return ValueError(f"moe_ops.compat.{function}: {text}")


def _as_3d(function: str, W: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return W as (E, N, K), without a copy. An error names the function."""
    if W.dim() == 3:
        return W
    if W.dim() != 2:
        raise _error(f"expected W to have 2 or 3 dimensions, got {W.dim()}", function)
    if num_experts < 1 or W.shape[0] % num_experts:
        expected = f"W.shape[0] to be a multiple of m_sizes.numel() ({num_experts})"
        raise _error(f"expected {expected}, got {W.shape[0]}", function)
    return W.unflatten(0, (num_experts, W.shape[0] // num_experts))


def _as_2d(topk_weights: torch.Tensor, topk: int) -> torch.Tensor:
    """Return topk_weights as (T, topk), without a copy."""
    if topk_weights.dim() != 1 or topk < 1:
        return topk_weights
    if topk_weights.shape[0] % topk:
        expected = f"topk_weights.shape[0] to be a multiple of topk ({topk})"
        raise _error(f"expected {expected}, got {topk_weights.shape[0]}")
    return topk_weights.unflatten(0, (topk_weights.shape[0] // topk, topk))

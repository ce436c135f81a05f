# SPDX-License-Identifier: Apache-2.0
"""Computes permute and unpermute, one row at a time.

T tokens, K top_k, R = T * K routed rows, H hidden size.
"""

import torch
from torch import Tensor

from testing.oracle.differentiate import needed_gradients, to_fp64


def permute(
    input: Tensor, gather_indices: Tensor, top_k: int, scatter_indices: Tensor | None = None
) -> Tensor:
    """Return (R, H): row i is the row in input (T, H) of the token of slot gather_indices[i]."""
    tokens = to_fp64(input)
    rows = [tokens[slot // top_k] for slot in gather_indices.tolist()]
    return torch.stack(rows) if rows else tokens.sum() * tokens.new_zeros(0, tokens.shape[1])


def unpermute(
    input: Tensor,
    gather_indices: Tensor,
    topk_weights: Tensor | None = None,
    top_k: int = 1,
    scatter_indices: Tensor | None = None,
) -> Tensor:
    """Return (T, H): the sum of each token's rows in input (R, H), times their weights."""
    rows, topk_weights = to_fp64(input, topk_weights)
    num_rows, hidden_size = rows.shape
    output = [rows.new_zeros(hidden_size) for _ in range(num_rows // top_k)]
    for row, slot in enumerate(gather_indices.tolist()):
        token, choice = slot // top_k, slot % top_k
        weight = 1.0 if topk_weights is None else topk_weights[token, choice]
        output[token] = output[token] + weight * rows[row]
    return torch.stack(output) if output else rows.sum() * rows.new_zeros(0, hidden_size)


def unpermute_backward(
    grad_output: Tensor,
    input: Tensor,
    gather_indices: Tensor,
    topk_weights: Tensor,
    top_k: int,
    scatter_indices: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    arguments = {
        "input": input,
        "gather_indices": gather_indices,
        "topk_weights": topk_weights,
        "top_k": top_k,
    }
    return needed_gradients(unpermute, arguments, ["input", "topk_weights"], grad_output, needs)

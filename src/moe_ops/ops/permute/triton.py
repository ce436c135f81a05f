# SPDX-License-Identifier: Apache-2.0
"""Run permute in Triton: read each token's row once, and write it to its top_k rows.

So a program needs the row of each of its slots (scatter_indices), the inverse of gather_indices. The
kernel is copy_rows_kernel in _triton/kernels/rows.py.
"""

from __future__ import annotations

import torch

from moe_ops._triton.rows import copy_rows, inverse_permutation


def permute(
    input: torch.Tensor,
    gather_indices: torch.Tensor,
    top_k: int,
    scatter_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    rows = inverse_permutation(gather_indices) if scatter_indices is None else scatter_indices
    return copy_rows(input, rows, top_k)

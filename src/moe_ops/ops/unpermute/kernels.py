# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of unpermute_backward; unpermute itself is kernels/rows.py's sum_rows_kernel.

T num_tokens, K top_k, H hidden_size, R = T * K routed rows; slot = token * K + k.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def _unpermute_bwd_kernel(
    grad_output_ptr, input_ptr, rows_ptr, weights_ptr, grad_input_ptr, grad_weights_ptr,
    stride_gt, stride_gh, stride_xr, stride_xh, stride_wt, stride_wk,
    num_rows, hidden_size, top_k,
    BLOCK_H: tl.constexpr, NEEDS_INPUT: tl.constexpr, NEEDS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """One slot: its row of grad_input, and its weight's gradient.

    Grid (R,). The top_k slots of a token are neighbours, so that they share its row of grad_output
    in the cache. Summed in fp32, block by block.
    """
    slot = tl.program_id(0).to(tl.int64)
    token = slot // top_k
    k = slot % top_k
    row = tl.load(rows_ptr + slot).to(tl.int64)
    width = tl.where((row >= 0) & (row < num_rows), hidden_size, 0)
    if NEEDS_INPUT:
        weight = tl.load(weights_ptr + token * stride_wt + k * stride_wk).to(tl.float32)
    dot = tl.zeros((BLOCK_H,), tl.float32)
    for first in range(0, hidden_size, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        mask = h < width
        h = h.to(tl.int64)
        g = tl.load(grad_output_ptr + token * stride_gt + h * stride_gh, mask=mask, other=0)
        g = g.to(tl.float32)
        if NEEDS_INPUT:
            grad = (g * weight).to(grad_input_ptr.dtype.element_ty)
            tl.store(grad_input_ptr + row * hidden_size + h, grad, mask=mask)
        if NEEDS_WEIGHTS:
            x = tl.load(input_ptr + row * stride_xr + h * stride_xh, mask=mask, other=0)
            dot += g * x.to(tl.float32)
    if NEEDS_WEIGHTS:
        grad_weight = tl.sum(dot, 0).to(grad_weights_ptr.dtype.element_ty)
        tl.store(grad_weights_ptr + slot, grad_weight)

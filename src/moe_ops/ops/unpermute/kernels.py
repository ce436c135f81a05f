# SPDX-License-Identifier: Apache-2.0
"""Compute unpermute_backward; unpermute itself is sum_rows_kernel of _triton/kernels/rows.py.

T num_tokens, K top_k, H hidden_size, R = T * K routed rows; slot = token * K + k.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def _unpermute_bwd_kernel(
    grad_output_ptr, input_ptr, rows_ptr, weights_ptr, grad_input_ptr, grad_weights_ptr,
    stride_gt, stride_gh, stride_xr, stride_xh, stride_wt, stride_wk,
    num_rows, hidden_size, top_k,
    SLOTS: tl.constexpr, BLOCK_H: tl.constexpr, NEEDS_INPUT: tl.constexpr,
    NEEDS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Compute a token's rows of grad_input, one for each slot, and the gradients of its weights.

    Grid (T,): one program owns one token. SLOTS is a power of two, top_k or more. It sums in fp32,
    block by block. Needs nothing initialised.
    """
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, SLOTS)
    row = tl.load(rows_ptr + token * top_k + k, mask=k < top_k, other=-1).to(tl.int64)
    is_row = (row >= 0) & (row < num_rows)
    if NEEDS_INPUT:
        weight = tl.load(weights_ptr + token * stride_wt + k * stride_wk, mask=k < top_k, other=0)
        weight = weight.to(tl.float32)[:, None]
    dots = tl.zeros((SLOTS, BLOCK_H), tl.float32)
    # While one block is multiplied and stored, the next ones are loading.
    for first in tl.range(0, hidden_size, BLOCK_H, num_stages=3):
        h = first + tl.arange(0, BLOCK_H)
        in_width = h < hidden_size
        mask = is_row[:, None] & in_width[None, :]
        h = h.to(tl.int64)
        g = tl.load(grad_output_ptr + token * stride_gt + h * stride_gh, mask=in_width, other=0)
        g = g.to(tl.float32)[None, :]
        if NEEDS_WEIGHTS:
            pointers = input_ptr + row[:, None] * stride_xr + h[None, :] * stride_xh
            dots += g * tl.load(pointers, mask=mask, other=0).to(tl.float32)
        if NEEDS_INPUT:
            grad = (g * weight).to(grad_input_ptr.dtype.element_ty)
            tl.store(grad_input_ptr + row[:, None] * hidden_size + h[None, :], grad, mask=mask)
    if NEEDS_WEIGHTS:
        grad_weight = tl.sum(dots, 1).to(grad_weights_ptr.dtype.element_ty)
        tl.store(grad_weights_ptr + token * top_k + k, grad_weight, mask=k < top_k)

# SPDX-License-Identifier: Apache-2.0
"""Compute topk_routing and its backward.

E num_experts, K top_k, t a token. A program holds BLOCK_T rows of logits as (BLOCK_T, EXPERTS). In
the forward EXPERTS = GROUPS * SIZE: the numbers of groups and of their members, each rounded up to
a power of two.
"""

import triton
import triton.language as tl

# This keeps 0 / 0 out of the renormalisation, as in the PyTorch implementation.
_EPSILON = tl.constexpr(1e-20)
_LOWEST = tl.constexpr(-(2**31))


@triton.jit
def _score(x, mask, SOFTMAX: tl.constexpr):
    """Return each row's softmax over the columns in `mask`, 0 in the others; or the sigmoid."""
    if SOFTMAX:
        x = tl.where(mask, x, float("-inf"))
        e = tl.where(mask, tl.exp(x - tl.max(x, 1)[:, None]), 0.0)
        score = e / tl.sum(e, 1)[:, None]
    else:
        score = 1.0 / (1.0 + tl.exp(-x))
    return score


@triton.jit
def _order(x):
    """Return int32 keys in the order of the floats, NaN highest; none of them is _LOWEST."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, key)


@triton.jit
def _exclude_groups(
    choice, order, is_expert,
    NUM_GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr,
    TOP2_SUM: tl.constexpr, BLOCK_T: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Return `order` with _LOWEST at the experts outside each token's TOP_GROUPS best groups."""
    values = tl.reshape(tl.where(is_expert, choice, float("-inf")), (BLOCK_T, GROUPS, SIZE))
    best = tl.max(values, 2)
    if TOP2_SUM:
        first = tl.argmax(values, 2)
        member = tl.arange(0, SIZE)
        rest = tl.where(member[None, None, :] == first[:, :, None], float("-inf"), values)
        second = tl.max(rest, 2)
        if GROUP_SIZE > 1:
            best += second
    group = tl.arange(0, GROUPS)
    keys = tl.where((group < NUM_GROUPS)[None, :], _order(best), _LOWEST)
    is_chosen = tl.zeros((BLOCK_T, GROUPS), tl.int32)
    for _ in tl.static_range(TOP_GROUPS):
        here = group[None, :] == tl.argmax(keys, 1)[:, None]
        is_chosen = tl.where(here, 1, is_chosen)
        keys = tl.where(here, _LOWEST, keys)
    is_chosen = tl.broadcast_to(is_chosen[:, :, None], (BLOCK_T, GROUPS, SIZE))
    return tl.where(tl.reshape(is_chosen, (BLOCK_T, GROUPS * SIZE)) > 0, order, _LOWEST)


@triton.jit(do_not_specialize=["num_tokens"])
def _topk_routing_fwd_kernel(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr,
    stride_t, stride_e, stride_b, num_tokens, scaling_factor,
    TOP_K: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    TOP_GROUPS: tl.constexpr, TOP2_SUM: tl.constexpr, SOFTMAX: tl.constexpr,
    SCORE_BEFORE: tl.constexpr, RENORMALIZE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Choose the experts of BLOCK_T tokens, and write all of their weights and ids.

    Grid (cdiv(num_tokens, BLOCK_T),): one program owns BLOCK_T tokens. SLOTS is TOP_K rounded up to
    a power of two. Needs nothing initialised.
    """
    EXPERTS: tl.constexpr = GROUPS * SIZE
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    column = tl.arange(0, EXPERTS)
    group = column // SIZE
    member = column % SIZE
    expert = group * GROUP_SIZE + member
    is_expert = ((group < NUM_GROUPS) & (member < GROUP_SIZE))[None, :]
    mask = (t < num_tokens)[:, None] & is_expert
    pointers = logits_ptr + t[:, None] * stride_t + expert[None, :].to(tl.int64) * stride_e
    logits = tl.load(pointers, mask=mask, other=0).to(tl.float32)
    scores = logits
    if SCORE_BEFORE:
        scores = _score(logits, is_expert, SOFTMAX)
    choice = scores
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert * stride_b, mask=expert < NUM_GROUPS * GROUP_SIZE, other=0)
        choice += bias.to(tl.float32)[None, :]
    order = tl.where(is_expert, _order(choice), _LOWEST)
    if TOP_GROUPS < NUM_GROUPS:
        order = _exclude_groups(
            choice,
            order,
            is_expert,
            NUM_GROUPS,
            GROUP_SIZE,
            TOP_GROUPS,
            TOP2_SUM,
            BLOCK_T,
            GROUPS,
            SIZE,
        )
    slot = tl.arange(0, SLOTS)
    ids = tl.zeros((BLOCK_T, SLOTS), tl.int32)
    weights = tl.zeros((BLOCK_T, SLOTS), tl.float32)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(order, 1)[:, None]
        here = column[None, :] == best
        at_slot = slot[None, :] == k
        ids = tl.where(at_slot, (best // SIZE) * GROUP_SIZE + best % SIZE, ids)
        score = tl.sum(tl.where(here, scores, 0.0), 1)[:, None]
        weights = tl.where(at_slot, score, weights)
        order = tl.where(here, _LOWEST, order)
    is_slot = (slot < TOP_K)[None, :]
    if not SCORE_BEFORE:
        weights = _score(weights, is_slot, SOFTMAX)
    if RENORMALIZE:
        weights /= tl.sum(tl.where(is_slot, weights, 0.0), 1)[:, None] + _EPSILON
    weights *= scaling_factor
    out = t[:, None] * TOP_K + slot[None, :]
    out_mask = (t < num_tokens)[:, None] & is_slot
    tl.store(weights_ptr + out, weights, mask=out_mask)
    tl.store(ids_ptr + out, ids, mask=out_mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _topk_routing_bwd_kernel(
    grad_ptr, logits_ptr, ids_ptr, grad_logits_ptr,
    stride_gt, stride_gk, stride_t, stride_e, stride_it, stride_ik,
    num_tokens, num_experts, scaling_factor,
    TOP_K: tl.constexpr, SOFTMAX: tl.constexpr, SCORE_BEFORE: tl.constexpr,
    RENORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of BLOCK_T rows of logits, and write all of it, zeros included.

    Grid (cdiv(num_tokens, BLOCK_T),): one program owns BLOCK_T tokens. EXPERTS and SLOTS are E and
    K rounded up to powers of two. Needs nothing initialised.
    """
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    slot = tl.arange(0, SLOTS)
    in_tokens = (t < num_tokens)[:, None]
    is_expert = (expert < num_experts)[None, :]
    is_slot = (slot < TOP_K)[None, :]
    pointers = logits_ptr + t[:, None] * stride_t + expert[None, :].to(tl.int64) * stride_e
    logits = tl.load(pointers, mask=in_tokens & is_expert, other=0).to(tl.float32)
    scores = logits
    if SCORE_BEFORE:
        scores = _score(logits, is_expert, SOFTMAX)
    id_pointers = ids_ptr + t[:, None] * stride_it + slot[None, :] * stride_ik
    ids = tl.load(id_pointers, mask=in_tokens & is_slot, other=-1).to(tl.int32)
    grad_pointers = grad_ptr + t[:, None] * stride_gt + slot[None, :] * stride_gk
    grad = tl.load(grad_pointers, mask=in_tokens & is_slot, other=0).to(tl.float32)
    weights = tl.zeros((BLOCK_T, SLOTS), tl.float32)
    for k in tl.static_range(TOP_K):
        id_k = tl.sum(tl.where(slot[None, :] == k, ids, 0), 1)[:, None]
        score = tl.sum(tl.where(expert[None, :] == id_k, scores, 0.0), 1)[:, None]
        weights = tl.where(slot[None, :] == k, score, weights)
    if not SCORE_BEFORE:
        weights = _score(weights, is_slot, SOFTMAX)
    weights = tl.where(is_slot, weights, 0.0)
    grad *= scaling_factor
    if RENORMALIZE:
        total = tl.sum(weights, 1)[:, None] + _EPSILON
        grad = (grad - tl.sum(grad * weights, 1)[:, None] / total) / total
    dot = tl.sum(grad * weights, 1)[:, None]
    selected = grad * weights * (1.0 - weights)
    out = tl.zeros((BLOCK_T, EXPERTS), tl.float32)
    if SOFTMAX:
        selected = weights * (grad - dot)
    if SOFTMAX and SCORE_BEFORE:
        # The unselected ones get a gradient from the denominator, which they share.
        out = -scores * dot
    for k in tl.static_range(TOP_K):
        id_k = tl.sum(tl.where(slot[None, :] == k, ids, 0), 1)[:, None]
        value = tl.sum(tl.where(slot[None, :] == k, selected, 0.0), 1)[:, None]
        out = tl.where(expert[None, :] == id_k, value, out)
    tl.store(
        grad_logits_ptr + t[:, None] * num_experts + expert[None, :],
        out.to(grad_logits_ptr.dtype.element_ty), mask=in_tokens & is_expert,
    )  # fmt: skip

# SPDX-License-Identifier: Apache-2.0
"""Sort slots by expert for routing_indices: few in one program, others in two passes over chunks.

The two passes are a stable counting sort. The first counts each chunk's slots for each expert. The
second adds up the counts before its chunk and places the chunk's slots. Dropped slots follow the kept
ones, in slot order. They need no count, since every slot that is not kept is dropped.
"""

import triton
import triton.language as tl

from moe_ops._triton.kernels.dependent_launch import follow_on


@triton.jit
def _load_experts(ids_ptr, stride_t, stride_k, slots, num_slots, top_k, num_experts):
    """Return each slot's expert; num_experts if it is dropped or past the last slot."""
    token = (slots // top_k).to(tl.int64)
    k = (slots % top_k).to(tl.int64)
    ids = tl.load(ids_ptr + token * stride_t + k * stride_k, mask=slots < num_slots, other=-1)
    return tl.where((ids >= 0) & (ids < num_experts), ids, num_experts).to(tl.int32)


@triton.jit
def _sort_slots(of_slot, BLOCK: tl.constexpr):
    """Return the expert and the number of each of a block's slots: by expert, then by slot."""
    key = tl.sort(of_slot * BLOCK + tl.arange(0, BLOCK))
    return key // BLOCK, key % BLOCK


@triton.jit(do_not_specialize=["num_slots"])
def _routing_indices_sort_kernel(
    ids_ptr, token_counts_ptr, gather_ptr, scatter_ptr,
    stride_t, stride_k, num_slots, top_k, num_experts,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sort at most BLOCK slots, and count them. Grid (1,). Needs nothing initialised."""
    if PDL:
        follow_on()
    i = tl.arange(0, BLOCK)
    of_slot = _load_experts(ids_ptr, stride_t, stride_k, i, num_slots, top_k, num_experts)
    counts = tl.histogram(of_slot, EXPERTS, mask=of_slot < num_experts)
    experts = tl.arange(0, EXPERTS)
    tl.store(token_counts_ptr + experts, counts, mask=experts < num_experts)
    # Dropped slots come last, and what is past the last slot behind them.
    _, slots = _sort_slots(of_slot, BLOCK)
    tl.store(gather_ptr + i, slots, mask=i < num_slots)
    tl.store(scatter_ptr + slots, i, mask=slots < num_slots)


@triton.jit(do_not_specialize=["num_slots", "num_blocks"])
def _routing_indices_count_kernel(
    ids_ptr, counts_ptr, stride_t, stride_k, num_slots, top_k, num_experts, num_blocks,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Count the slots of one chunk for each expert.

    Grid (num_chunks,): one program owns a chunk, num_blocks * BLOCK slots. Writes all of the row
    counts_ptr[chunk, :EXPERTS], and needs nothing initialised.
    """
    chunk = tl.program_id(0)
    counts = tl.zeros((EXPERTS,), tl.int32)
    for block in range(num_blocks):
        slots = (chunk * num_blocks + block) * BLOCK + tl.arange(0, BLOCK)
        of_slot = _load_experts(ids_ptr, stride_t, stride_k, slots, num_slots, top_k, num_experts)
        counts += tl.histogram(of_slot, EXPERTS, mask=of_slot < num_experts)
    tl.store(counts_ptr + chunk * EXPERTS + tl.arange(0, EXPERTS), counts)


@triton.jit(do_not_specialize=["num_slots", "num_blocks", "num_chunks"])
def _routing_indices_place_kernel(
    ids_ptr, counts_ptr, token_counts_ptr, gather_ptr, scatter_ptr,
    stride_t, stride_k, num_slots, top_k, num_experts, num_blocks, num_chunks,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Place the slots of one chunk in gather_ptr and scatter_ptr; chunk 0 writes token_counts.

    Grid (num_chunks,): one program owns a chunk. Needs all of counts_ptr from the first pass.
    """
    chunk = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    before = tl.zeros((EXPERTS,), tl.int32)
    total = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, num_chunks, CHUNKS):
        chunks = first + tl.arange(0, CHUNKS)
        counts = tl.load(
            counts_ptr + chunks[:, None] * EXPERTS + experts[None, :],
            mask=(chunks < num_chunks)[:, None], other=0,
        )  # fmt: skip
        before += tl.sum(tl.where((chunks < chunk)[:, None], counts, 0), 0)
        total += tl.sum(counts, 0)
    if chunk == 0:
        tl.store(token_counts_ptr + experts, total, mask=experts < num_experts)
    next_row = tl.cumsum(total, 0) - total + before
    num_kept = tl.sum(total, 0)
    kept_before = tl.sum(before, 0)
    i = tl.arange(0, BLOCK)
    for block in range(num_blocks):
        first_slot = (chunk * num_blocks + block) * BLOCK
        of_slot = _load_experts(
            ids_ptr, stride_t, stride_k, first_slot + i, num_slots, top_k, num_experts
        )
        # An expert's slots become neighbours, dropped ones come last.
        of_slot, of_block = _sort_slots(of_slot, BLOCK)
        slots = first_slot + of_block
        is_kept = of_slot < num_experts
        counts = tl.histogram(of_slot, EXPERTS, mask=is_kept)
        kept = tl.sum(counts, 0)
        of_expert = next_row - tl.cumsum(counts, 0) + counts
        of_dropped = num_kept + first_slot - kept_before - kept
        rows = i + tl.where(
            is_kept, tl.gather(of_expert, tl.minimum(of_slot, EXPERTS - 1), 0), of_dropped
        )
        valid = slots < num_slots
        tl.store(scatter_ptr + slots, rows, mask=valid)
        tl.store(gather_ptr + rows, slots, mask=valid)
        next_row += counts
        kept_before += kept

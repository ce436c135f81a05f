# SPDX-License-Identifier: Apache-2.0
"""Place slots, and move and sum rows, when experts are spread over ranks.

T num_tokens of this rank, K top_k, E experts on W ranks, L = E / W on each, C capacity, H hidden
size, S = min(K, L) columns. A rank sends W * C rows, C to each rank: row r * C + i is the i-th that
goes to rank r. The place of a slot is row * S + j: the j-th slot that its token has for that rank.
senders (W * C,) holds 1 + the token of each row, and 0 where there is none.

With PUSH a kernel writes into the other ranks' memory, and with PULL it reads what they wrote into
this rank's (_triton/symmetric.py). peers_ptr holds the address of every rank's pool. A pool has two
halves, and an exchange uses the one that turn_ptr names. What a rank would send to itself does not go
through its pool. Without PUSH the parts for all ranks lie in one buffer.

Places and ids from outside are compared with their range before each use.
"""

import triton
import triton.language as tl


# Its assertion is part of what it does, and Triton compiles one only where it is asked to.
@triton.jit(debug=True, do_not_specialize=["capacity", "num_units", "half_bytes", "to_sizes", "me"])
def begin_exchange_kernel(
    peers_ptr, turn_ptr, capacity, num_units, half_bytes, to_sizes, me,
    WORLD_SIZE: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Go to the other half of the pool, and compare sizes: every exchange begins with this. Grid (1,).

    All ranks learn this exchange's capacity and how much of a half it takes. They lie to_sizes bytes
    behind the half's begin, a number for each rank. What the ranks said of the last exchange is
    compared here: behind its barrier all have come, and before this one's nobody says more. The
    first exchange finds zeros. RANKS is W rounded up to a power of two.
    """
    turn = tl.load(turn_ptr) & 1
    rank = tl.arange(0, RANKS)
    is_rank = rank < WORLD_SIZE
    own = tl.load(peers_ptr + me) + turn * half_bytes + to_sizes
    own_ptr = own.to(tl.pointer_type(tl.int64))
    differs = is_rank & (tl.load(own_ptr + rank, mask=is_rank, other=0) != tl.load(own_ptr + me))
    tl.device_assert(
        tl.sum(differs.to(tl.int32), 0) == 0,
        "moe_ops: ranks exchanged different numbers of tokens; pass max_tokens_per_rank",
    )
    turn ^= 1
    size = tl.cast(capacity, tl.int64) << 32 | num_units
    to = tl.load(peers_ptr + rank, mask=is_rank, other=0) + turn * half_bytes + to_sizes
    tl.store(to.to(tl.pointer_type(tl.int64)) + me, size, mask=is_rank)
    tl.store(turn_ptr, turn)


@triton.jit
def _half(peers_ptr, turn_ptr, rank, half_bytes):
    """Return the address of the half of a rank's pool that this exchange uses."""
    return tl.load(peers_ptr + rank) + (tl.load(turn_ptr) & 1) * half_bytes


@triton.jit
def _aligned(address, dtype: tl.constexpr):
    """Return an address as a pointer, of which Triton learns that 16 divides it."""
    return tl.multiple_of(address.to(dtype), 16)


@triton.jit
def _ranks(ids, num_experts, num_local):
    """Return the rank of each id, -1 if it is out of range."""
    is_expert = (ids >= 0) & (ids < num_experts)
    return tl.where(is_expert, ids // num_local, -1).to(tl.int32)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def count_visits_kernel(
    ids_ptr, counts_ptr, num_dropped_ptr, stride_t, stride_k, num_tokens, num_experts, num_local,
    world_size, num_blocks,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Count a block's tokens that visit each rank: counts[rank, block].

    Grid (num_blocks,): one program owns BLOCK_T tokens. The first one zeros num_dropped. SLOTS is K
    rounded up to a power of two. Needs nothing initialised.
    """
    block = tl.program_id(0)
    t = (block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    k = tl.arange(0, SLOTS)
    mask = (t < num_tokens)[:, None] & (k < TOP_K)[None, :]
    pointers = ids_ptr + t[:, None] * stride_t + k[None, :].to(tl.int64) * stride_k
    rank_TK = _ranks(tl.load(pointers, mask=mask, other=-1), num_experts, num_local)
    for rank in range(world_size):
        visits = tl.max((rank_TK == rank).to(tl.int32), 1)
        tl.store(counts_ptr + rank * num_blocks + block, tl.sum(visits, 0))
    if block == 0:
        tl.store(num_dropped_ptr, 0)


@triton.jit
def _count(counts_ptr, block, num_blocks, BLOCKS: tl.constexpr):
    """Return the sum of the counts before a block, and of all."""
    before = tl.zeros((BLOCKS,), tl.int32)
    total = tl.zeros((BLOCKS,), tl.int32)
    for first in range(0, num_blocks, BLOCKS):
        blocks = first + tl.arange(0, BLOCKS)
        counts = tl.load(counts_ptr + blocks, mask=blocks < num_blocks, other=0)
        before += tl.where(blocks < block, counts, 0)
        total += counts
    return tl.sum(before, 0), tl.sum(total, 0)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "capacity", "half_bytes", "me"])
def place_slots_kernel(
    ids_ptr, weights_ptr, counts_ptr, sent_slots_ptr, senders_ptr, num_dropped_ptr,
    to_ids_ptr, to_weights_ptr, peers_ptr, turn_ptr,
    stride_t, stride_k, stride_wt, stride_wk, part_ids, part_weights, half_bytes, me,
    num_tokens, num_experts, num_local, world_size, capacity, columns, num_blocks,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCKS: tl.constexpr, PUSH: tl.constexpr,
):  # fmt: skip
    """Place the slots of a block's tokens, first come, first served, and send ids and weights.

    Writes sent_slots (T, K), all of senders, and adds to num_dropped. Of the ids and weights for
    each rank it writes all C * S, with -1 and 0 where no slot is. Those for rank r begin at
    to_ids_ptr + r * part_ids and to_weights_ptr + r * part_weights. With PUSH they go to part `me`
    of that rank's pool, part_ids and part_weights bytes behind the half's begin; this rank's own go
    to part `me` of to_ids and to_weights.

    Grid (num_blocks,): one program owns BLOCK_T tokens, and of the rows without a token it fills in
    cdiv(C, num_blocks) for each rank. Needs counts and num_dropped from count_visits_kernel. Adding
    integers gives the same sum in any order.
    """
    block = tl.program_id(0)
    i = tl.arange(0, BLOCK_T)
    t = (block * BLOCK_T + i).to(tl.int64)
    k = tl.arange(0, SLOTS)
    s = tl.arange(0, COLUMNS)
    is_token = t < num_tokens
    mask = is_token[:, None] & (k < TOP_K)[None, :]
    pointers = ids_ptr + t[:, None] * stride_t + k[None, :].to(tl.int64) * stride_k
    ids_TK = tl.load(pointers, mask=mask, other=-1)
    rank_TK = _ranks(ids_TK, num_experts, num_local)
    local_TK = (ids_TK % num_local).to(tl.int32)
    pointers = weights_ptr + t[:, None] * stride_wt + k[None, :].to(tl.int64) * stride_wk
    weights_TK = tl.load(pointers, mask=mask, other=0)
    # Which of its token's slots for the same rank each slot is.
    column_TK = tl.zeros((BLOCK_T, SLOTS), tl.int32)
    for j in range(TOP_K):
        ids_T = tl.load(ids_ptr + t * stride_t + j * stride_k, mask=is_token, other=-1)
        rank_T = _ranks(ids_T, num_experts, num_local)
        column_TK += ((rank_TK == rank_T[:, None]) & (k > j)[None, :]).to(tl.int32)
    place_TK = tl.full((BLOCK_T, SLOTS), -1, tl.int32)
    share = tl.cdiv(capacity, num_blocks)
    for rank in range(world_size):
        before, total = _count(counts_ptr + rank * num_blocks, block, num_blocks, BLOCKS)
        if PUSH:
            half = _half(peers_ptr, turn_ptr, rank, half_bytes)
            first = tl.cast(me, tl.int64) * capacity * columns
            ids_at = tl.where(rank == me, to_ids_ptr.to(tl.int64), half + part_ids)
            weights_at = tl.where(rank == me, to_weights_ptr.to(tl.int64), half + part_weights)
            to_ids = ids_at.to(tl.pointer_type(tl.int32)) + first
            to_weights = weights_at.to(weights_ptr.dtype) + first
        else:
            to_ids = to_ids_ptr + tl.cast(rank, tl.int64) * part_ids
            to_weights = to_weights_ptr + tl.cast(rank, tl.int64) * part_weights
        is_here_TK = rank_TK == rank
        visits_T = tl.max(is_here_TK.to(tl.int32), 1)
        index_T = before + tl.cumsum(visits_T, 0) - 1
        has_room_T = (visits_T > 0) & (index_T < capacity)
        index_T = tl.where(has_room_T, index_T, 0)
        row_T = rank * capacity + index_T
        tl.store(senders_ptr + row_T, (t + 1).to(tl.int32), mask=has_room_T)
        is_placed_TK = is_here_TK & has_room_T[:, None] & (column_TK < columns)
        place_TK = tl.where(is_placed_TK, row_T[:, None] * columns + column_TK, place_TK)
        at_TK = index_T[:, None] * columns + column_TK
        tl.store(to_ids + at_TK, local_TK, mask=is_placed_TK)
        tl.store(to_weights + at_TK, weights_TK, mask=is_placed_TK)
        # The columns of these rows that no slot fills, then this program's rows without a token.
        num_slots_T = tl.sum(is_placed_TK.to(tl.int32), 1)
        is_free_TS = (s[None, :] >= num_slots_T[:, None]) & (s < columns)[None, :]
        is_free_TS = is_free_TS & has_room_T[:, None]
        at_TS = index_T[:, None] * columns + s[None, :]
        tl.store(to_ids + at_TS, -1, mask=is_free_TS)
        tl.store(to_weights + at_TS, 0.0, mask=is_free_TS)
        for start in range(0, share, BLOCK_T):
            index = block * share + start + i
            is_empty = (start + i < share) & (index >= total) & (index < capacity)
            tl.store(senders_ptr + rank * capacity + index, 0, mask=is_empty)
            at_TS = index[:, None] * columns + s[None, :]
            is_free_TS = is_empty[:, None] & (s < columns)[None, :]
            tl.store(to_ids + at_TS, -1, mask=is_free_TS)
            tl.store(to_weights + at_TS, 0.0, mask=is_free_TS)
    tl.store(sent_slots_ptr + t[:, None] * TOP_K + k[None, :], place_TK, mask=mask)
    is_dropped = (rank_TK >= 0) & (place_TK < 0)
    tl.atomic_add(num_dropped_ptr, tl.sum(tl.sum(is_dropped.to(tl.int32), 1), 0))


@triton.jit(do_not_specialize=["num_slots", "num_places"])
def invert_places_kernel(
    places_ptr, senders_ptr, stride_t, stride_k, num_slots, num_places, columns,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write senders: the token of each row that has one. senders must hold zeros.

    Grid (cdiv(num_slots, BLOCK),): one program owns BLOCK slots. A token's first slot on a rank
    stands for its row.
    """
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    t, k = slot // TOP_K, slot % TOP_K
    place = tl.load(places_ptr + t * stride_t + k * stride_k, mask=slot < num_slots, other=-1)
    is_row = (place >= 0) & (place < num_places) & (place % columns == 0)
    tl.store(senders_ptr + place // columns, (t + 1).to(tl.int32), mask=is_row)


@triton.jit(do_not_specialize=["num_source_rows", "capacity", "half_bytes", "to_flags", "me"])
def send_rows_kernel(
    source_ptr, senders_ptr, ids_ptr, to_ptr, peers_ptr, turn_ptr,
    stride_r, stride_h, stride_ids, num_source_rows, world_size, capacity, width,
    half_bytes, to_rows, to_flags, me,
    HAS_SENDERS: tl.constexpr, HAS_IDS: tl.constexpr, HAS_FLAGS: tl.constexpr,
    HAS_TO: tl.constexpr, PUSH: tl.constexpr, BLOCK_H: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Send row d to rank d // C, as row d % C of this rank's part there.

    Its source is the row of the token senders[d] - 1, or with HAS_IDS row d if ids[d] is not
    negative, or else row d. What has no source does not move. With PUSH it goes to_rows bytes behind
    the half's begin, to part `me`; else, and for this rank itself, to row d of to_ptr. Without HAS_TO
    this rank's own rows do not move. With HAS_FLAGS the peer also gets 0 for each row that moves, and
    -1 for one that does not, to_flags bytes behind the half's begin.

    Grid (W * C, max(1, cdiv(width, BLOCK_H))): one program owns BLOCK_H columns of a row. Programs
    that follow each other send to different ranks, so no rank's link has to take all at once.
    """
    stride_r *= UNIT
    width *= UNIT
    rank = tl.program_id(0) % world_size
    i = (tl.program_id(0) // world_size).to(tl.int64)
    d = rank * tl.cast(capacity, tl.int64) + i
    source = d
    is_filled = d >= 0
    if HAS_SENDERS:
        source = tl.load(senders_ptr + d).to(tl.int64) - 1
        is_filled = (source >= 0) & (source < num_source_rows)
    if HAS_IDS:
        is_filled = tl.load(ids_ptr + d * stride_ids) >= 0
    if PUSH and not HAS_TO:
        is_filled = is_filled & (rank != me)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = h < tl.where(is_filled, width, 0)
    x = tl.load(source_ptr + source * stride_r + h.to(tl.int64) * stride_h, mask=mask)
    if PUSH:
        half = _half(peers_ptr, turn_ptr, rank, half_bytes)
        row = me * tl.cast(capacity, tl.int64) + i
        rows_at = half + to_rows
        if HAS_TO:
            rows_at = tl.where(rank == me, to_ptr.to(tl.int64), rows_at)
        tl.store(_aligned(rows_at, source_ptr.dtype) + row * width + h, x, mask=mask)
        if HAS_FLAGS:  # noqa: SIM102 - a constant
            if tl.program_id(1) == 0:
                flags_ptr = (half + to_flags).to(tl.pointer_type(tl.int32))
                tl.store(flags_ptr + row, tl.where(is_filled, 0, -1))
    else:
        tl.store(to_ptr + d * width + h, x, mask=mask)


@triton.jit(do_not_specialize=["capacity", "half_bytes", "from_ids", "from_weights", "me"])
def receive_rows_kernel(
    output_ptr, local_ids_ptr, local_weights_ptr, peers_ptr, turn_ptr,
    capacity, width, columns, half_bytes, from_ids, from_weights, me,
    HAS_SLOTS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_H: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Copy the rows that came from other ranks out of the pool, and with HAS_SLOTS ids and weights.

    A row came if its first id is not negative. The rows lie at the half's begin, the ids from_ids
    bytes behind it, `columns` for each row, the weights from_weights bytes behind it. The flags of
    send_rows_kernel are ids too, of one column. COLUMNS is columns rounded up to a power of two.

    Grid ((W - 1) * C, max(1, cdiv(width, BLOCK_H))): one program owns BLOCK_H columns of a row.
    """
    width *= UNIT
    d = tl.program_id(0).to(tl.int64)
    d = tl.where(d < me * tl.cast(capacity, tl.int64), d, d + capacity)
    half = _half(peers_ptr, turn_ptr, me, half_bytes)
    ids_ptr = (half + from_ids).to(tl.pointer_type(tl.int32)) + d * columns
    is_filled = tl.load(ids_ptr) >= 0
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = h < tl.where(is_filled, width, 0)
    x = tl.load(_aligned(half, output_ptr.dtype) + d * width + h, mask=mask)
    tl.store(output_ptr + d * width + h, x, mask=mask)
    if HAS_SLOTS:  # noqa: SIM102 - a constant
        if tl.program_id(1) == 0:
            s = tl.arange(0, COLUMNS)
            is_column = s < columns
            ids = tl.load(ids_ptr + s, mask=is_column)
            tl.store(local_ids_ptr + d * columns + s, ids, mask=is_column)
            weights_ptr = (half + from_weights).to(local_weights_ptr.dtype) + d * columns
            weights = tl.load(weights_ptr + s, mask=is_column)
            tl.store(local_weights_ptr + d * columns + s, weights, mask=is_column)


@triton.jit(do_not_specialize=["num_rows", "num_places", "capacity", "half_bytes", "me"])
def sum_over_ranks_kernel(
    rows_ptr, places_ptr, output_ptr, peers_ptr, turn_ptr,
    stride_pt, stride_pk, num_rows, num_places, columns, width, capacity, half_bytes, me,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr, IS_FP64: tl.constexpr,
    PULL: tl.constexpr, BLOCK_H: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Sum each token's rows over the ranks, in rank order; rows that it does not fill are not read.

    Grid (num_tokens, cdiv(width, BLOCK_H)): one program owns BLOCK_H columns of a token. SLOTS is K
    rounded up to a power of two, PARTS = min(K, W) the most rows that a token has. With PULL the rows
    lie at the half's begin, but for part `me`, which lies in rows_ptr. That must be aligned then.
    """
    width *= UNIT
    t = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, SLOTS)
    pointers = places_ptr + t * stride_pt + k.to(tl.int64) * stride_pk
    place_K = tl.load(pointers, mask=k < TOP_K, other=-1)
    # A token's first slot on a rank stands for the row. Places of other slots count as none.
    is_row_K = (place_K >= 0) & (place_K < num_places) & (place_K % columns == 0)
    row_K = tl.where(is_row_K, place_K // columns, num_rows).to(tl.int32)
    if PULL:
        half = _half(peers_ptr, turn_ptr, me, half_bytes)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    accumulator: tl.constexpr = tl.float64 if IS_FP64 else tl.float32
    total = tl.zeros((BLOCK_H,), accumulator)
    last = -1
    for _ in tl.static_range(PARTS):
        row = tl.min(tl.where(row_K > last, row_K, num_rows), 0)
        mask = h < tl.where(row < num_rows, width, 0)
        from_ptr = rows_ptr
        if PULL:
            is_own = (row >= me * capacity) & (row < (me + 1) * capacity)
            from_ptr = _aligned(tl.where(is_own, rows_ptr.to(tl.int64), half), rows_ptr.dtype)
        x = tl.load(from_ptr + row.to(tl.int64) * width + h, mask=mask, other=0)
        total += x.to(accumulator)
        last = row
    total = total.to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + t * width + h, total, mask=h < width)


@triton.jit(
    do_not_specialize=["num_slots", "num_places", "own_places", "half_bytes", "from_values", "me"]
)
def take_values_kernel(
    values_ptr, places_ptr, output_ptr, peers_ptr, turn_ptr,
    stride_pt, stride_pk, num_slots, num_places, own_places, half_bytes, from_values, me,
    TOP_K: tl.constexpr, PULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write output[slot] = values[places[slot]], or 0 where a slot has no place.

    Grid (cdiv(num_slots, BLOCK),): one program owns BLOCK slots. With PULL the values lie
    from_values bytes behind the half's begin, but for the own_places of part `me`, which lie in
    values_ptr.
    """
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_slot = slot < num_slots
    pointers = places_ptr + (slot // TOP_K) * stride_pt + (slot % TOP_K) * stride_pk
    place = tl.load(pointers, mask=is_slot, other=-1)
    is_place = (place >= 0) & (place < num_places)
    if PULL:
        is_own = is_place & (place >= me * own_places) & (place < (me + 1) * own_places)
        half = _half(peers_ptr, turn_ptr, me, half_bytes)
        came_ptr = (half + from_values).to(values_ptr.dtype)
        came = tl.load(came_ptr + place, mask=is_place & ~is_own, other=0)
        values = tl.where(is_own, tl.load(values_ptr + place, mask=is_own, other=0), came)
    else:
        values = tl.load(values_ptr + place, mask=is_place, other=0)
    tl.store(output_ptr + slot, values, mask=is_slot)

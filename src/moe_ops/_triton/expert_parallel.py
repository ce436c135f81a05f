# SPDX-License-Identifier: Apache-2.0
"""Launch the kernels that place slots, and move and sum rows, over ranks.

T num_tokens of this rank, K top_k, E experts on W ranks, C capacity, H hidden size,
S = min(K, E / W) columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_ops._triton.kernels.expert_parallel import (
    begin_exchange_kernel,
    count_visits_kernel,
    invert_places_kernel,
    place_slots_kernel,
    receive_rows_kernel,
    send_rows_kernel,
    sum_over_ranks_kernel,
    take_values_kernel,
)
from moe_ops._triton.launch import cdiv, launch, next_power_of_2, unit_of

# A program places a tile of so many slots: few enough that 8,192 tokens of 8 slots give each SM one.
_SLOTS = 512
# A program reads so many counts at a time.
_COUNTS = 512
# A program on 4 warps moves 4 KB of a row: each thread has two loads of 16 bytes on the way. 16 such
# programs on each of 132 SMs keep 8 MB on the way. HBM at 4.3 TB/s and 800 ns needs 3.4 MB of them, a
# link at 450 GB/s and 2 us needs 0.9 MB. Smaller pieces would only be more programs to start.
_MOVED_BYTES = 4096
# A sum has up to min(K, W) pieces on the way at a time, and fp32 totals in registers: half as much.
_SUMMED_BYTES = 2048
# Values that lie alone: each is a read of its own.
_VALUES = 1024
# The bytes that a thread moves at a time.
_VECTOR = 16
# Where a part of a pool's half begins. Cache lines have 128 bytes.
_ALIGNMENT = 256


class Sizes(NamedTuple):
    """The sizes of a call.

    Attributes:
        num_experts: E.
        world_size: W.
        capacity: C.
        top_k: K.
    """

    num_experts: int
    world_size: int
    capacity: int
    top_k: int

    @property
    def num_local(self) -> int:
        """Return the number of experts of a rank."""
        return self.num_experts // self.world_size

    @property
    def columns(self) -> int:
        """Return S, the most slots that a token has on one rank."""
        return min(self.top_k, self.num_local)

    @property
    def num_rows(self) -> int:
        """Return W * C, the rows that a rank sends, and that it receives."""
        return self.world_size * self.capacity

    @property
    def num_places(self) -> int:
        """Return W * C * S."""
        return self.num_rows * self.columns


class Window(NamedTuple):
    """The memory through which ranks exchange rows (symmetric.py).

    Attributes:
        peers ((W,), int64): the address of each rank's pool.
        turn ((1,), int32): its lowest bit names the half of the pools that this exchange uses.
        half_bytes: how many bytes the second half begins behind the first.
        sizes: how many bytes behind a half's begin the ranks' sizes lie (begin_exchange_kernel).
        me: this rank.
    """

    peers: Tensor
    turn: Tensor
    half_bytes: int
    sizes: int
    me: int


class Layout(NamedTuple):
    """Where things lie in a half of a pool, in bytes from its begin: rows first.

    Attributes:
        ids: ids, or flags that tell which rows came.
        weights: weights.
        end: how many bytes there are.
    """

    ids: int
    weights: int
    end: int

    @classmethod
    def of(cls, row_bytes: int, id_bytes: int, weight_bytes: int) -> Layout:
        """Return the layout for so many bytes of rows, ids and weights."""
        ids = _aligned(row_bytes)
        weights = ids + _aligned(id_bytes)
        return cls(ids, weights, weights + _aligned(weight_bytes))


def _aligned(num_bytes: int) -> int:
    return cdiv(num_bytes, _ALIGNMENT) * _ALIGNMENT


def _pool(window: Window | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if window is None else (window.peers, window.turn)


def sizes_bytes(world_size: int) -> int:
    """Return the bytes that the ranks' sizes take behind each half."""
    return _aligned(8 * world_size)


def begin_exchange(window: Window, num_bytes: int, capacity: int) -> None:
    """Go to the other half of the pools, of which this exchange takes num_bytes.

    The device stops with an error if the last exchange was not of the same sizes on all ranks.
    """
    world_size = window.peers.shape[0]
    launch(
        begin_exchange_kernel, (1,),
        window.peers, window.turn, capacity, num_bytes // _ALIGNMENT, window.half_bytes,
        window.sizes, window.me,
        WORLD_SIZE=world_size, RANKS=next_power_of_2(world_size), num_warps=1,
        on=window.turn,
    )  # fmt: skip


def place_slots(
    topk_ids: Tensor,
    topk_weights: Tensor,
    sizes: Sizes,
    to: Sequence[Tensor],
    window: Window | None = None,
    layout: Layout | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Place the slots, and send their ids and weights.

    Args:
        topk_ids: (T, K).
        topk_weights: (T, K).
        sizes: of the call.
        to: the ids and weights (W, C * S) for all ranks; rows may be further apart than that. With a
            window they take only what this rank sends to itself.
        window: where the ranks exchange.
        layout: where things lie in it.

    Returns:
        sent_slots (T, K), senders (W * C,) and num_dropped (1,).
    """
    num_tokens, device = topk_ids.shape[0], topk_ids.device
    # One program at least writes that there is nothing.
    slots = next_power_of_2(sizes.top_k)
    block_t = max(1, _SLOTS // slots)
    num_blocks = max(1, cdiv(num_tokens, block_t))
    counts = torch.empty(sizes.world_size, num_blocks, dtype=torch.int32, device=device)
    num_dropped = torch.empty(1, dtype=torch.int32, device=device)
    sent_slots = torch.empty(num_tokens, sizes.top_k, dtype=torch.int32, device=device)
    senders = torch.empty(sizes.num_rows, dtype=torch.int32, device=device)
    launch(
        count_visits_kernel, (num_blocks,),
        topk_ids, counts, num_dropped, *topk_ids.stride(),
        num_tokens, sizes.num_experts, sizes.num_local, sizes.world_size, num_blocks,
        TOP_K=sizes.top_k, SLOTS=slots, BLOCK_T=block_t,
        on=topk_ids,
    )  # fmt: skip
    parts = [t.stride(0) for t in to] if layout is None else [layout.ids, layout.weights]
    launch(
        place_slots_kernel, (num_blocks,),
        topk_ids, topk_weights, counts, sent_slots, senders, num_dropped, *to,
        *_pool(window), *topk_ids.stride(), *topk_weights.stride(), *parts,
        0 if window is None else window.half_bytes, 0 if window is None else window.me,
        num_tokens, sizes.num_experts, sizes.num_local, sizes.world_size, sizes.capacity,
        sizes.columns, num_blocks,
        TOP_K=sizes.top_k, SLOTS=slots, COLUMNS=next_power_of_2(sizes.columns), BLOCK_T=block_t,
        BLOCKS=_COUNTS, PUSH=window is not None, num_warps=8,
        on=topk_ids,
    )  # fmt: skip
    return sent_slots, senders, num_dropped


def invert_places(sent_slots: Tensor, sizes: Sizes) -> Tensor:
    """Return senders (W * C,): 1 + the token of each row that is sent, 0 where there is none."""
    senders = torch.zeros(sizes.num_rows, dtype=torch.int32, device=sent_slots.device)
    num_slots = sent_slots.numel()
    if num_slots > 0 and sizes.num_rows > 0:
        launch(
            invert_places_kernel, (cdiv(num_slots, _VALUES),),
            sent_slots, senders, *sent_slots.stride(), num_slots, sizes.num_places, sizes.columns,
            TOP_K=sizes.top_k, BLOCK=_VALUES,
            on=sent_slots,
        )  # fmt: skip
    return senders


def send_rows(
    source: Tensor,
    world_size: int,
    capacity: int,
    *,
    to: Tensor | None = None,
    senders: Tensor | None = None,
    ids: Tensor | None = None,
    window: Window | None = None,
    offset: int = 0,
    flags: int | None = None,
) -> None:
    """Send W * C rows, C to each rank.

    Args:
        source: rows of tokens where senders are given, else W * C rows.
        world_size: W.
        capacity: C.
        to: what takes the rows (W * C, H) for all ranks. With a window it takes what this rank sends
            to itself; None: nothing takes that.
        senders: 1 + the row of source for each row that is sent, 0 for none.
        ids ((W * C, S), index): a row moves if its first id is not negative.
        window: where the ranks exchange.
        offset: how many bytes behind the half's begin the rows go.
        flags: how many bytes behind it the peers learn which rows came; None: they do not.
    """
    width = source.shape[1]
    num_rows = world_size * capacity
    if num_rows == 0 or (width == 0 and flags is None):
        return
    block_h = _columns_of(source, _MOVED_BYTES)
    unit = unit_of(source.stride(0), width)
    launch(
        send_rows_kernel, (num_rows, max(1, cdiv(width, block_h))),
        source, senders, ids, to, *_pool(window),
        source.stride(0) // unit, source.stride(1), 0 if ids is None else ids.stride(0),
        source.shape[0], world_size, capacity, width // unit,
        0 if window is None else window.half_bytes, offset, 0 if flags is None else flags,
        0 if window is None else window.me,
        HAS_SENDERS=senders is not None, HAS_IDS=ids is not None, HAS_FLAGS=flags is not None,
        HAS_TO=to is not None, PUSH=window is not None, BLOCK_H=block_h, UNIT=unit,
        on=source,
    )  # fmt: skip


def receive_rows(
    output: Tensor,
    sizes: Sizes,
    window: Window,
    layout: Layout,
    slots: Sequence[Tensor] | None = None,
) -> None:
    """Copy what came from other ranks out of the pool: rows, and ids and weights (W * C, S) if given.

    Without those, flags tell which rows came.
    """
    width = output.shape[1]
    num_rows = sizes.num_rows - sizes.capacity
    if num_rows == 0 or (width == 0 and slots is None):
        return
    ids, weights = (None, None) if slots is None else slots
    columns = 1 if ids is None else ids.shape[1]
    block_h = _columns_of(output, _MOVED_BYTES)
    unit = unit_of(width)
    launch(
        receive_rows_kernel, (num_rows, max(1, cdiv(width, block_h))),
        output, ids, weights, *_pool(window), sizes.capacity, width // unit, columns,
        window.half_bytes, layout.ids, layout.weights, window.me,
        HAS_SLOTS=slots is not None, COLUMNS=next_power_of_2(columns), BLOCK_H=block_h, UNIT=unit,
        on=output,
    )  # fmt: skip


def sum_over_ranks(
    rows: Tensor, sent_slots: Tensor, sizes: Sizes, window: Window | None = None
) -> Tensor:
    """Sum each token's rows in fp32 (fp64 for fp64), in rank order: (T, H).

    Args:
        rows: (W * C, H), contiguous. With a window only this rank's own are read from here.
        sent_slots: (T, K).
        sizes: of the call.
        window: where the ranks exchange.
    """
    num_tokens, width = sent_slots.shape[0], rows.shape[1]
    output = rows.new_empty(num_tokens, width)
    if output.numel() == 0:
        return output
    if window is not None and rows.data_ptr() % _VECTOR != 0:
        rows = rows.clone()
    block_h = _columns_of(rows, _SUMMED_BYTES)
    unit = unit_of(width)
    launch(
        sum_over_ranks_kernel, (num_tokens, cdiv(width, block_h)),
        rows, sent_slots, output, *_pool(window), *sent_slots.stride(),
        sizes.num_rows, sizes.num_places, sizes.columns, width // unit, sizes.capacity,
        0 if window is None else window.half_bytes, 0 if window is None else window.me,
        TOP_K=sizes.top_k, SLOTS=next_power_of_2(sizes.top_k),
        PARTS=min(sizes.top_k, sizes.world_size), IS_FP64=rows.dtype == torch.float64,
        PULL=window is not None, BLOCK_H=block_h, UNIT=unit,
        on=rows,
    )  # fmt: skip
    return output


def take_values(
    values: Tensor, sent_slots: Tensor, sizes: Sizes, window: Window | None = None, offset: int = 0
) -> Tensor:
    """Return the value at each slot's place, 0 where it has none: (T, K).

    Args:
        values: (W * C, S), contiguous. With a window only this rank's own are read from here, and
            the others `offset` bytes behind the half's begin.
        sent_slots: (T, K).
        sizes: of the call.
        window: where the ranks exchange.
        offset: see above.
    """
    output = values.new_empty(sent_slots.shape)
    num_slots = sent_slots.numel()
    if num_slots > 0:
        launch(
            take_values_kernel, (cdiv(num_slots, _VALUES),),
            values, sent_slots, output, *_pool(window), *sent_slots.stride(),
            num_slots, sizes.num_places, sizes.capacity * sizes.columns,
            0 if window is None else window.half_bytes, offset,
            0 if window is None else window.me,
            TOP_K=sizes.top_k, PULL=window is not None, BLOCK=_VALUES,
            on=values,
        )  # fmt: skip
    return output


def _columns_of(rows: Tensor, num_bytes: int) -> int:
    """Return how many columns of a row a program owns."""
    return min(num_bytes // rows.itemsize, next_power_of_2(rows.shape[1]))

# SPDX-License-Identifier: Apache-2.0
"""Where each slot goes when experts are spread over ranks: what ep_dispatch and ep_combine share.

T num_tokens of this rank, K top_k, E experts on W ranks, L = E / W experts on each, C capacity,
S = min(K, L) slots of a token on one rank. A rank sends W * C rows, C to each rank. The place of a
slot is row * S + j: the j-th slot that its token has for that rank.

Everything has a static size, so that a GPU's counts stay on the GPU. Places are compared with their
range before each use: corrupt ones count as not sent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops._pytorch.rows import chunks


def num_columns(top_k: int, num_experts: int, world_size: int) -> int:
    """Return S, the most slots that a token has on one rank."""
    return min(top_k, num_experts // world_size)


def places_of_slots(
    topk_ids: Tensor, num_experts: int, world_size: int, capacity: int
) -> tuple[Tensor, Tensor]:
    """Return the place of each slot (T, K), -1 where it is not sent, and how many have no room (1,)."""
    num_local = num_experts // world_size
    columns = num_columns(topk_ids.shape[1], num_experts, world_size)
    ids_TK = topk_ids.long()
    in_range_TK = (ids_TK >= 0) & (ids_TK < num_experts)
    # Ids that are out of range become one more rank.
    rank_TK = torch.where(in_range_TK, ids_TK // num_local, world_size)
    is_same_TKK = rank_TK[:, :, None] == rank_TK[:, None, :]
    column_TK = is_same_TKK.tril(-1).sum(-1)
    visits_TW = ids_TK.new_zeros(ids_TK.shape[0], world_size + 1).scatter_(1, rank_TK, 1)
    index_TK = (visits_TW.cumsum(0) - 1).gather(1, rank_TK)
    has_room_TK = (index_TK < capacity) & (column_TK < columns)
    place_TK = (rank_TK * capacity + index_TK) * columns + column_TK
    place_TK = torch.where(in_range_TK & has_room_TK, place_TK, -1)
    num_dropped = (in_range_TK & ~has_room_TK).sum().reshape(1)
    return place_TK.int(), num_dropped.int()


def within(sent_slots: Tensor, num_places: int) -> Tensor:
    """Return the places as int64, -1 where they are not in [0, num_places)."""
    place_TK = sent_slots.long()
    return torch.where((place_TK >= 0) & (place_TK < num_places), place_TK, -1)


def invert(places: Tensor, num_places: int) -> Tensor:
    """Return the index in places (N,) of each place, -1 where there is none, (num_places,)."""
    # What has no place goes behind the others, and is cut off.
    index = torch.where(places >= 0, places, num_places)
    inverse = places.new_full((num_places + 1,), -1)
    inverse.scatter_(0, index, torch.arange(places.shape[0], device=places.device))
    return inverse[:num_places]


def rows_to_send(input: Tensor, places: Tensor, columns: int, num_rows: int) -> Tensor:
    """Return the rows that a rank sends, (num_rows, H): of each token one for every rank it visits.

    Rows that no token fills hold some token's numbers, or zeros where there is no token.
    """
    num_tokens, top_k = places.shape
    if num_tokens == 0:
        return input.new_zeros(num_rows, input.shape[1])
    # A token's first slot on a rank stands for the row.
    row_TK = torch.where((places >= 0) & (places % columns == 0), places // columns, -1)
    slots = invert(row_TK.flatten(), num_rows)
    return input.index_select(0, slots.clamp(min=0) // top_k)


def sum_over_ranks(rows: Tensor, places: Tensor, columns: int, world_size: int) -> Tensor:
    """Return the sum of each token's rows (W * C, H), in fp32 (fp64 for fp64) in rank order, (T, H).

    Rows that no token fills are not read.
    """
    (num_tokens, top_k), width = places.shape, rows.shape[1]
    output = rows.new_empty(num_tokens, width)
    num_rows = rows.shape[0]
    if num_rows == 0:
        return output.zero_()
    accumulator = torch.promote_types(rows.dtype, torch.float32)
    row_TK = torch.where((places >= 0) & (places % columns == 0), places // columns, num_rows)
    # A token has at most so many rows.
    row_TP = row_TK.sort(1).values[:, : min(top_k, world_size)]
    for part in chunks(num_tokens, row_TP.shape[1] * width):
        total = rows.new_zeros(row_TP[part].shape[0], width, dtype=accumulator)
        for row_T in row_TP[part].unbind(1):
            found = rows.index_select(0, row_T.clamp(max=num_rows - 1)).to(accumulator)
            total += found.masked_fill_((row_T == num_rows)[:, None], 0.0)
        output[part] = total
    return output

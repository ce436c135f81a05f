# SPDX-License-Identifier: Apache-2.0
"""What expert parallelism costs, computed: bytes, memory and times of a block on W ranks.

T num_tokens of a rank, H hidden_size, I intermediate_size, K top_k, E experts, L = E / W of them on
each rank, S = min(K, L), C capacity. Times are in seconds, sizes in bytes, elements of two bytes.

Routing is uniform: a token's K experts are any K of the E alike. Links carry both directions at once,
and a GPU's link within the host and its link to other hosts work at the same time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.suite import Shape

ELEMENT = 2
# Of an id in int32 and a router weight.
SLOT = 4 + ELEMENT
# The products hide so much of the time of reading their weights and writing their gradients. It was
# chosen: with it the speed of qwen3-30b gives the times of the 13 other models that were measured on
# one H200 within 20%; with 0 and 1 it does not.
HIDDEN_WEIGHTS = 0.5


@dataclass(frozen=True)
class Machine:
    """Bytes a second that a GPU sends to its host's others, to other hosts, and moves in memory.

    host_size: GPUs of a host.
    """

    host_size: int
    within: float
    between: float
    memory: float


@dataclass(frozen=True)
class Rates:
    """What only a measurement tells.

    Attributes:
        dispatch, combine: the shares of a link's bandwidth that they reach.
        dispatch_seconds, combine_seconds: what each takes however few tokens there are.
        forward, both: FLOP/s of the experts' products in forward, and in forward and backward.
    """

    dispatch: float
    combine: float
    dispatch_seconds: float
    combine_seconds: float
    forward: float
    both: float


def visit_probability(num_experts: int, top_k: int, num_local: int) -> float:
    """That a token has one of `num_local` experts: 1 - C(E - L, K) / C(E, K)."""
    return 1 - math.comb(num_experts - num_local, top_k) / math.comb(num_experts, top_k)


@dataclass(frozen=True)
class Layout:
    """A block on W ranks, the hosts filled one after the other.

    Attributes:
        padded: C rows go to each rank, filled or not, as functional collectives send them.
        capacity_factor: as of ExpertParallel; None: room for all tokens of a rank.
    """

    shape: Shape
    world_size: int
    host_size: int
    padded: bool = False
    capacity_factor: float | None = None

    @property
    def num_local(self) -> int:
        return self.shape.num_experts // self.world_size

    @property
    def slots(self) -> int:
        """S, slots of a received token."""
        return min(self.shape.top_k, self.num_local)

    def fill(self, group_size: int = 1) -> float:
        """How many ranks a token visits; groups of ranks, such as hosts, where they are larger."""
        local = self.num_local * group_size
        shape = self.shape
        groups = shape.num_experts / local
        return groups * visit_probability(shape.num_experts, shape.top_k, local)

    @property
    def capacity(self) -> int:
        shape = self.shape
        if self.capacity_factor is None:
            return shape.num_tokens
        even = shape.num_tokens * shape.top_k / self.world_size
        return min(shape.num_tokens, math.ceil(self.capacity_factor * even))

    @property
    def rows_to_a_rank(self) -> float:
        if self.padded:
            return self.capacity
        return min(self.capacity, self.shape.num_tokens * self.fill() / self.world_size)

    @property
    def peers(self) -> tuple[int, int]:
        """How many other ranks are on this host, and on others."""
        here = min(self.world_size, self.host_size)
        return here - 1, self.world_size - here

    @property
    def row_bytes(self) -> int:
        return self.shape.hidden_size * ELEMENT

    def message(self, with_ids: bool) -> float:
        """Bytes from one rank to another: a dispatch's have ids and weights with the rows."""
        return self.rows_to_a_rank * (self.row_bytes + self.slots * SLOT * with_ids)

    @property
    def received(self) -> float:
        """Rows that a rank receives, its own among them."""
        return self.world_size * self.rows_to_a_rank

    @property
    def weight_bytes(self) -> float:
        return self.shape.num_weights / self.world_size * ELEMENT

    @property
    def rows_memory(self) -> int:
        """Of one buffer of W * C rows."""
        return self.world_size * self.capacity * self.row_bytes

    @property
    def pre_activation_memory(self) -> int:
        """Of gate and up of W * C * S slots."""
        rows = self.world_size * self.capacity * self.slots
        return rows * 2 * self.shape.intermediate_size * ELEMENT


def flops(shape: Shape, both: bool) -> float:
    """Of the products for T * K rows; backward has twice as many as forward."""
    return 6 * shape.num_rows * shape.hidden_size * shape.intermediate_size * (3 if both else 1)


def experts_memory_seconds(layout: Layout, machine: Machine, both: bool) -> float:
    """What the experts' memory traffic adds to their products.

    Weights are read in forward; in both passes they are read twice and their gradients written. The
    sum over a token's slots reads T * K rows and writes those received, and once more in backward.
    """
    weights = layout.weight_bytes * (3 if both else 1) * (1 - HIDDEN_WEIGHTS)
    rows = (layout.shape.num_rows + layout.received) * layout.row_bytes * (2 if both else 1)
    return (weights + rows) / machine.memory


def rate_of_experts(layout: Layout, machine: Machine, both: bool, seconds: float) -> float:
    """The FLOP/s of products with which `experts_seconds` is what was measured."""
    return flops(layout.shape, both) / (seconds - experts_memory_seconds(layout, machine, both))


@dataclass(frozen=True)
class Costs:
    """The times of a layout on a machine."""

    layout: Layout
    machine: Machine
    rates: Rates

    def local_seconds(self, is_dispatch: bool) -> float:
        """Received rows are copied out; combine reads them and writes the tokens."""
        layout = self.layout
        written = layout.received if is_dispatch else layout.shape.num_tokens
        return (layout.received + written) * layout.row_bytes / self.machine.memory

    def link_seconds(self, is_dispatch: bool) -> float:
        """The slower link's time for its messages, at its whole bandwidth."""
        message = self.layout.message(with_ids=is_dispatch)
        within, between = self.layout.peers
        return message * max(within / self.machine.within, between / self.machine.between)

    @property
    def dispatch(self) -> float:
        rates = self.rates
        link = self.link_seconds(is_dispatch=True) / rates.dispatch
        return rates.dispatch_seconds + self.local_seconds(is_dispatch=True) + link

    @property
    def combine(self) -> float:
        rates = self.rates
        link = self.link_seconds(is_dispatch=False) / rates.combine
        return rates.combine_seconds + self.local_seconds(is_dispatch=False) + link

    def experts(self, both: bool) -> float:
        rate = self.rates.both if both else self.rates.forward
        memory = experts_memory_seconds(self.layout, self.machine, both)
        return flops(self.layout.shape, both) / rate + memory

    def exchange(self, both: bool) -> float:
        """Backward sends as much as forward, the other way round."""
        return (self.dispatch + self.combine) * (2 if both else 1)

    def block(self, both: bool) -> float:
        return self.exchange(both) + self.experts(both)

    @property
    def recomputed(self) -> float:
        """Both passes where backward dispatches and computes again."""
        return self.block(both=True) + self.dispatch + self.experts(both=False)

    def communication(self, both: bool) -> float:
        return self.exchange(both) / self.block(both)

    def overlapped(self, both: bool) -> float:
        """The block's time over what it is if exchange and experts hide each other wholly."""
        return self.block(both) / max(self.exchange(both), self.experts(both))


def fsdp_bytes(layout: Layout, num_shards: int) -> float:
    """What a GPU sends for one layer's experts in a step: two gathers, and the gradients' sum."""
    return 3 * layout.weight_bytes * (num_shards - 1) / num_shards

# SPDX-License-Identifier: Apache-2.0
"""One product as a configuration sees it: what is multiplied, what is done on top, how many rows."""

from __future__ import annotations

from dataclasses import dataclass

# Mean rows per expert up to which a product is bound by reading the weight.
FEW_ROWS = 32


@dataclass(frozen=True)
class Problem:
    """What a configuration depends on, without the exact number of rows.

    Attributes:
        kind: a key of PASSES.
        dtype: such as "bfloat16".
        num_experts, out_features, in_features: E, N, D of the op.
        rows: the mean number of rows per expert, rounded up to a power of two.
        flags: what else the kernel does, of "gather" (rows of x are gathered), "scatter" (rows of
            the output are scattered), "scale" (they are multiplied by topk_weights), "bias", "dots"
            (the router gradient), "transposed" (the weight is a transposed view), "fp8" (the weight
            is, with scales), "gated" (what follows is the activation of a gated block; after dX its
            backward, where Hopper has a kernel that does both), "activated" (the activation of
            another), in this order.
    """

    kind: str
    dtype: str
    num_experts: int
    out_features: int
    in_features: int
    rows: int
    flags: tuple[str, ...] = ()

    @property
    def has_activation(self) -> bool:
        """Whether the kernel computes an activation of its product."""
        return self.kind == "forward" and not {"gated", "activated"}.isdisjoint(self.flags)

    @property
    def key(self) -> str:
        """The problem as one string: the key of tables and caches."""
        sizes = f"E{self.num_experts} N{self.out_features} D{self.in_features} rows{self.rows}"
        return " ".join([self.kind, self.dtype, sizes, *self.flags])


def rows_bucket(num_rows: int, num_experts: int) -> int:
    """The mean number of rows per expert, rounded up to a power of two; at least 1."""
    mean = -(-num_rows // max(num_experts, 1))
    return 1 << max(mean - 1, 0).bit_length()

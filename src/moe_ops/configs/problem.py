# SPDX-License-Identifier: Apache-2.0
"""One product as a configuration sees it: what is multiplied, what is done on top, how many rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Mean rows per expert up to which a product is bound by reading the weight.
FEW_ROWS = 32

Epilogue = Literal["none", "activation", "gated_activation", "gated_activation_backward"]
# What a key says of each. Of a forward "gated" is the activation, of a dX its backward.
_EPILOGUE_WORDS: dict[Epilogue, str] = {
    "activation": "activated",
    "gated_activation": "gated",
    "gated_activation_backward": "gated",
}


@dataclass(frozen=True)
class Problem:
    """What a configuration depends on, without the exact number of rows.

    Attributes:
        kind: a key of kernel_config.PASSES.
        dtype: such as "bfloat16".
        num_experts, out_features, in_features: E, N, D of the op.
        rows: the mean number of rows per expert, rounded up to a power of two.
        gather: rows of the input are gathered.
        scatter: rows of the output are scattered.
        scale: rows are multiplied by topk_weights.
        bias: a bias is added.
        dots: the router gradient is summed up.
        transposed: the weight is a transposed view.
        fp8: the weight is FP8 with scales.
        epilogue: what is computed on top of the product. "gated_activation_backward" is asked of a
            dX where Hopper has a kernel that does both; other kernels leave it to a second one.
    """

    kind: str
    dtype: str
    num_experts: int
    out_features: int
    in_features: int
    rows: int
    gather: bool = False
    scatter: bool = False
    scale: bool = False
    bias: bool = False
    dots: bool = False
    transposed: bool = False
    fp8: bool = False
    epilogue: Epilogue = "none"

    @property
    def has_activation(self) -> bool:
        """Whether every kernel computes an activation of the product."""
        return self.epilogue in {"activation", "gated_activation"}

    @property
    def flags(self) -> tuple[str, ...]:
        """The words of the key that say what the kernel does beside the product."""
        names = ("gather", "scatter", "scale", "bias", "dots", "transposed", "fp8")
        words = [name for name in names if getattr(self, name)]
        if self.epilogue != "none":
            words.append(_EPILOGUE_WORDS[self.epilogue])
        return tuple(words)

    @property
    def key(self) -> str:
        """The problem as one string: the key of tables and caches."""
        sizes = f"E{self.num_experts} N{self.out_features} D{self.in_features} rows{self.rows}"
        return " ".join([self.kind, self.dtype, sizes, *self.flags])


def rows_bucket(num_rows: int, num_experts: int) -> int:
    """The mean number of rows per expert, rounded up to a power of two; at least 1."""
    mean = -(-num_rows // max(num_experts, 1))
    return 1 << max(mean - 1, 0).bit_length()

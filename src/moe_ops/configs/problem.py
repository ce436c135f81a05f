# SPDX-License-Identifier: Apache-2.0
"""Describe one product: what is multiplied, what is computed on top, and for how many rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from moe_ops.configs.device import Device

# A product gets one configuration for each of these ranges of the mean number of rows per expert.
# A range is named by its end; the last has none. They are few because each configuration is another
# kernel to compile. They end where the choice changes: at one row, as in decoding; where a tile of
# 16, 32 or 64 rows is full; where reading the weight no longer takes long beside multiplying.
ROWS_BUCKETS = (1, 8, 32, 64, 176, 512, 1024)
# Up to this mean number of rows per expert, tiles are low and reading the weight is the only bound.
FEW_ROWS = 32
# Up to this one, reading the weight is the bound of higher tiles, too.
MORE_ROWS = 64
# Up to this one, an expert seldom has more than 192 rows: one tall tile.
TALL_ROWS = 176
# Up to this one, reading the weight takes a third of the time to multiply or more.
SOME_ROWS = 512

Epilogue = Literal["none", "activation", "gated_activation", "gated_activation_backward"]
# The words in a key. In a forward "gated" is the activation, in a dX its backward.
_EPILOGUE_WORDS: dict[Epilogue, str] = {
    "activation": "activated",
    "gated_activation": "gated",
    "gated_activation_backward": "gated",
}
_FLAGS = ("gather", "scatter", "scale", "bias", "dots", "transposed")


@dataclass(frozen=True)
class Problem:
    """Describe what a configuration depends on; the exact number of rows is left out.

    Attributes:
        kind: a key of kernel_config.PASSES.
        dtype: the dtype's name, such as "bfloat16".
        num_experts, out_features, in_features: E, N, D of the op.
        rows: the mean number of rows per expert, as one of ROWS_BUCKETS.
        gather: whether rows of the input are gathered.
        scatter: whether rows of the output are scattered.
        scale: whether rows are multiplied by topk_weights.
        bias: whether a bias is added.
        dots: whether the router gradient is summed.
        transposed: whether the weight is a transposed view.
        epilogue: what is computed on top of the product. A dX gets "gated_activation_backward"
            where Hopper has a kernel that does both; with other kernels a second one does it.
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
    epilogue: Epilogue = "none"

    @property
    def has_activation(self) -> bool:
        """Return whether an activation is on top, which every kernel computes."""
        return self.epilogue in {"activation", "gated_activation"}

    @property
    def contracted(self) -> int:
        """Return how many elements a sum of forward or of dX has: those of a row of x."""
        return self.in_features if self.kind == "forward" else self.out_features

    @property
    def weight_row(self) -> int:
        """Return how many elements of the weight lie side by side."""
        return self.out_features if self.transposed else self.in_features

    @property
    def flags(self) -> tuple[str, ...]:
        """Return the words of the key that say what the kernel does beside the product."""
        words = [name for name in _FLAGS if getattr(self, name)]
        if self.epilogue != "none":
            words.append(_EPILOGUE_WORDS[self.epilogue])
        return tuple(words)

    @property
    def itemsize(self) -> int:
        """Return the bytes of an element of the operands."""
        return 4 if self.dtype == "float32" else 2

    @property
    def key(self) -> str:
        """Return the problem as one string, the key of tables and caches."""
        sizes = f"E{self.num_experts} N{self.out_features} D{self.in_features} rows{self.rows}"
        return " ".join([self.kind, self.dtype, sizes, *self.flags])


class Operands(NamedTuple):
    """Say which operands TMA can describe: address and strides are multiples of 16 bytes.

    x is the left operand of a product and b the right one. y stands for everything else that the
    kernel stores or reads.
    """

    x: bool = True
    b: bool = True
    y: bool = True


def dense_operands(problem: Problem) -> Operands:
    """Return which operands TMA can describe where all tensors are dense and aligned.

    Their rows must be multiples of 16 bytes: of 8 elements of 16 bits. TMA loads zeros past the
    ends of a tensor and stores nothing there, so no width need be a multiple of a tile's.
    """
    size = problem.itemsize
    out_features, in_features = problem.out_features, problem.in_features
    if problem.kind == "backward_dW":
        sides = _is_described(out_features, size), _is_described(in_features, size)
        left, right = reversed(sides) if problem.transposed else sides
        return Operands(left, right, right)
    row = problem.weight_row
    if problem.epilogue == "gated_activation":
        # Gate and up are described apart.
        out_features //= 2
        row = out_features if problem.transposed else row
    b = _is_described(row, size)
    if problem.kind == "backward_dX":
        return Operands(_is_described(out_features, size), b, _is_described(in_features, size))
    return Operands(_is_described(in_features, size), b, _is_described(out_features, size))


def fused_operands(projection: str, problem: Problem) -> Operands:
    """Return the same for a product within fused_experts, whose own rows begin at sectors.

    The hidden states, the weights, the pre-activation and its gradient are dense and aligned.

    Args:
        projection: "up" or "down".
        problem: the product.
    """
    dense = dense_operands(problem)
    is_down = projection == "down"
    if problem.kind == "backward_dW":
        # One side is the gradient of the pre-activation, or h. The product that makes h pads its rows
        # where it stores by TMA.
        is_padded = is_down and problem.rows > FEW_ROWS
        own = (True, is_padded) if is_down else (False, True)
        x, b = reversed(own) if problem.transposed else own
        return Operands(dense.x or x, dense.b or b, dense.y)
    if problem.has_activation:
        # Rows that are not gathered were moved, to where TMA can load them.
        return Operands(dense.x or not problem.gather, dense.b, dense.y)
    # The activation's backward reads the pre-activation.
    return Operands(dense.x or is_down, dense.b, problem.epilogue == "none" or dense.y)


def _is_described(width: int, itemsize: int) -> bool:
    return width > 0 and width * itemsize % 16 == 0


def is_vector(width: int) -> bool:
    """Return whether pointers read rows of this width in vectors: Triton knows that 16 divides it.

    Else they read number by number, and the addresses take registers that a wide tile then lacks.
    Descriptors do not need it: theirs is the rule of 16 bytes (dense_operands).
    """
    return width % 16 == 0


def copies(problem: Problem, device: Device, operands: Operands) -> Operands:
    """Return which operands are worth a copy that TMA can load, if a configuration wants that.

    Pointers would read them number by number: x and b if TMA cannot describe them, and gathered
    rows whose width is no multiple of 16. Few rows are not worth a copy. x is not copied if b goes by
    pointers.
    """
    if 0 in {problem.out_features, problem.in_features}:
        return Operands(False, False, False)
    b = not operands.b and problem.rows > FEW_ROWS
    if problem.epilogue == "gated_activation" and problem.transposed:
        # Gate and up are halves of a row of the weight, in its copy too.
        b = b and _is_described(problem.out_features // 2, 2)
    gathers_numbers = problem.gather and not is_vector(problem.contracted)
    x = (operands.b or b) and problem.rows > FEW_ROWS and (gathers_numbers or not operands.x)
    return Operands(device.has_tma and x, device.has_tma and b, False)


def rows_bucket(num_rows: int, num_experts: int) -> int:
    """Return the range of the mean number of rows per expert, as one of ROWS_BUCKETS."""
    mean = -(-num_rows // max(num_experts, 1))
    return next((end for end in ROWS_BUCKETS if mean <= end), ROWS_BUCKETS[-1])

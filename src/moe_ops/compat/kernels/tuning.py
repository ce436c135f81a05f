# SPDX-License-Identifier: Apache-2.0
"""The kernel configurations with the names and fields that Unsloth's kernels give them.

Each class here is a subclass of the class in moe_ops that has its name. It goes wherever that one
goes, into moe_ops.kernel_config too, and an op gets the same from both.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from moe_ops.configs import kernel_config

__all__ = ["KernelConfigBackward_dW", "KernelConfigBackward_dX", "KernelConfigForward"]

# Unsloth's names for the sides of a tile, and ours.
_BLOCK_SIZES = {f"BLOCK_SIZE_{letter}": f"BLOCK_{letter}" for letter in "MNK"}

C = TypeVar("C", bound="UnslothKernelConfig")


@dataclass(frozen=True)
class UnslothKernelConfig(kernel_config.KernelConfig):
    """What Unsloth's configurations have beside the fields of moe_ops.

    BLOCK_SIZE_M, BLOCK_SIZE_N and BLOCK_SIZE_K stand for BLOCK_M, BLOCK_N and BLOCK_K: as keyword
    arguments, as attributes, and in `from_dict`.

    Attributes:
        permute_x, permute_y, fuse_mul_post (bool): a record of what the configuration was tuned for,
            given by name. No kernel reads them: the arguments of the call say what is computed.

    Raises:
        ValueError: a field is out of its range, or is given under both of its names.
        TypeError: a field has another type.
    """

    permute_x: bool = field(default=False, kw_only=True)
    permute_y: bool = field(default=False, kw_only=True)
    fuse_mul_post: bool = field(default=False, kw_only=True)

    if TYPE_CHECKING:
        # _take_block_sizes adds these arguments to the constructor.
        BLOCK_SIZE_M: int = field(default=128, kw_only=True)
        BLOCK_SIZE_N: int = field(default=128, kw_only=True)
        BLOCK_SIZE_K: int = field(default=64, kw_only=True)
    else:
        BLOCK_SIZE_M = property(operator.attrgetter("BLOCK_M"))
        BLOCK_SIZE_N = property(operator.attrgetter("BLOCK_N"))
        BLOCK_SIZE_K = property(operator.attrgetter("BLOCK_K"))

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any]) -> C:
        """Return the configuration of a dict of fields; a missing field has its default.

        Raises:
            ValueError: an unknown field, a field given twice, or a value out of range.
            TypeError: a value of another type, or no dict.
        """
        if isinstance(values, dict):
            for alias, name in _BLOCK_SIZES.items():
                if alias in values and name in values:
                    raise ValueError(f"{cls.__name__}: {name} is given twice, once as {alias}")
            values = {_BLOCK_SIZES.get(name, name): value for name, value in values.items()}
        return super().from_dict(values)


def _take_block_sizes(cls: type[C]) -> type[C]:
    """Let the constructor take BLOCK_SIZE_* for BLOCK_*."""
    made = cls.__init__
    names = [declared.name for declared in fields(cls)]

    @functools.wraps(made)
    def init(self: C, *args: Any, **given: Any) -> None:
        for alias, name in _BLOCK_SIZES.items():
            if alias in given:
                if name in given or names.index(name) < len(args):
                    raise ValueError(f"{cls.__name__}: {name} is given twice, once as {alias}")
                given[name] = given.pop(alias)
        made(self, *args, **given)

    cls.__init__ = init  # type: ignore[assignment]
    return cls


@_take_block_sizes
@dataclass(frozen=True)
class KernelConfigForward(UnslothKernelConfig, kernel_config.KernelConfigForward):
    """The configuration of grouped_gemm: moe_ops.KernelConfigForward with Unsloth's fields."""


@_take_block_sizes
@dataclass(frozen=True)
class KernelConfigBackward_dX(  # noqa: N801
    UnslothKernelConfig, kernel_config.KernelConfigBackward_dX
):
    """The configuration of dX: moe_ops.KernelConfigBackward_dX with Unsloth's fields."""


@_take_block_sizes
@dataclass(frozen=True)
class KernelConfigBackward_dW(  # noqa: N801
    UnslothKernelConfig, kernel_config.KernelConfigBackward_dW
):
    """The configuration of dW: moe_ops.KernelConfigBackward_dW with Unsloth's fields."""

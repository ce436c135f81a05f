# SPDX-License-Identifier: Apache-2.0
"""The configurations of grouped_gemm's three kernels: forward, dX and dW.

M counts routed rows, N out_features and K in_features, in all three.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

# Rows and columns of a tile in the ping-pong kernels, and in the tall one. The tiles of the cooperative
# kernels are wider than the first.
PINGPONG_TILE = (128, 128)
TALL_TILE = (192, 256)
# Rows in place of a tall tile's where a kernel's blocks are powers of two.
TALL_BLOCK_ROWS = 128

C = TypeVar("C", bound="KernelConfig")


@dataclass(frozen=True)
class KernelConfig:
    """Holds the fields that the three configurations share, and checks them.

    Attributes:
        BLOCK_M (int): rows of a tile; a power of two from 16 to 256, or 192 (warp_specialize).
        BLOCK_N (int): out_features of a tile; a power of two from 16 to 256.
        BLOCK_K (int): in_features of a tile; a power of two from 16 to 256.
        num_warps (int): warps of a program: 1, 2, 4, 8 or 16.
        num_stages (int): depth of the software pipeline, 1 to 8.
        group_m (int): row tiles that share a weight's columns in the L2 cache; 1 or more.
        programs_per_sm (int): programs launched per streaming multiprocessor; 1 or more.
        flatten (bool): make one loop of the loop over tiles and the loop over the contraction. The
            next tile's loads then begin early. Not beside a bias; in dW only where Triton can.
        use_tma_store (bool): store the output through a tensor descriptor.
        epilogue_subtile (int): 1, or 2 to store a tile in two halves, one after the other. The
            store then needs half the shared memory, which may serve another stage.
        warp_specialize (bool): use a kernel for Hopper (compute capability 9.x), in which one warp
            loads while two groups of four warps multiply and store. Both groups share a tile of
            128x256 or 256x128 (cooperative), or in forward and dX one of 192x256 (tall). Of tiles
            of 128x128 each group has its own, and they multiply in turns (ping-pong).
        launch_pdl (bool): start while the kernel before it ends (programmatic dependent launch).
            It helps short launches. It applies to forward and dX from compute capability 9.0 on.

    Descriptors (`use_tma_*`) apply from compute capability 9.0 on, where addresses and strides are
    multiples of 16 bytes and no row is gathered or scattered. Operands of many rows that break this
    are copied first. Elsewhere the kernel uses pointers, with the same result.

    `warp_specialize` applies to 16-bit operands that descriptors load. Cooperative and tall kernels
    compute bare products. Ping-pong kernels also take a bias, router weights and scattered rows. They also
    compute two parts of fused_experts: the gated up projection with its activation, whose rows are
    copied into expert order first, and dX with the activation's backward, where gate and up are
    stored apart. Elsewhere the other fields hold, without it, and 192 rows are 128.

    Raises:
        ValueError: a field is out of its range.
        TypeError: a field has another type.
    """

    # The fields that are the rows and the columns of an output tile, and what a step contracts.
    TILE: ClassVar[tuple[str, str, str]] = ("BLOCK_M", "BLOCK_N", "BLOCK_K")

    BLOCK_M: int = 128
    BLOCK_N: int = 128
    BLOCK_K: int = 64
    num_warps: int = 8
    num_stages: int = 3
    group_m: int = 8
    programs_per_sm: int = 1
    flatten: bool = True
    use_tma_store: bool = False
    epilogue_subtile: int = 1
    launch_pdl: bool = False
    warp_specialize: bool = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        for declared in fields(self):
            value, kind = getattr(self, declared.name), type(declared.default)
            if type(value) is not kind:
                expected, got = f"{declared.name} of type {kind.__name__}", type(value).__name__
                raise TypeError(f"{name}: expected {expected}, got {value!r} ({got})")
        for block in ("BLOCK_M", "BLOCK_N", "BLOCK_K"):
            size = getattr(self, block)
            if block == self.TILE[0] and self.is_tall:
                continue
            if not 16 <= size <= 256 or size & (size - 1):
                expected = f"{block} to be a power of two from 16 to 256"
                raise ValueError(f"{name}: expected {expected}, got {size}")
        if self.num_warps not in {1, 2, 4, 8, 16}:
            raise ValueError(
                f"{name}: expected num_warps in (1, 2, 4, 8, 16), got {self.num_warps}"
            )
        if not 1 <= self.num_stages <= 8:
            raise ValueError(f"{name}: expected num_stages from 1 to 8, got {self.num_stages}")
        if self.epilogue_subtile not in {1, 2}:
            raise ValueError(
                f"{name}: expected epilogue_subtile in (1, 2), got {self.epilogue_subtile}"
            )
        for count in ("group_m", "programs_per_sm"):
            if getattr(self, count) < 1:
                raise ValueError(f"{name}: expected {count} >= 1, got {getattr(self, count)}")
        if self.warp_specialize:
            self._check_warp_specialize()

    @property
    def tile(self) -> tuple[int, int, int]:
        """Return the rows and columns of an output tile, and the elements contracted in a step."""
        rows, columns, contracted = (getattr(self, name) for name in self.TILE)
        return rows, columns, contracted

    @property
    def is_pingpong(self) -> bool:
        """Return whether it asks for a ping-pong kernel."""
        return self.warp_specialize and self.tile[:2] == PINGPONG_TILE

    @property
    def is_tall(self) -> bool:
        """Return whether it asks for the tall kernel, which computes no dW."""
        return self.warp_specialize and self.tile[:2] == TALL_TILE and self.TILE[0] == "BLOCK_M"

    def _check_warp_specialize(self) -> None:
        rows, columns, contracted = self.tile
        # A group of warps multiplies at least 64 rows. Its registers hold at most 64 * 256 sums.
        # In the tall kernel it has three times 64 * 128.
        is_wide = min(rows, columns) >= 128 and rows * columns <= 128 * 256
        if not (is_wide or self.is_tall) or contracted < 32:
            tall = "" if self.TILE[0] != "BLOCK_M" else ", {}x{}".format(*TALL_TILE)
            raise ValueError(
                f"{type(self).__name__}: expected {self.TILE[0]} x {self.TILE[1]} to be 128x128, "
                f"128x256{tall} or 256x128, and {self.TILE[2]} >= 32, with warp_specialize, got "
                f"{rows}x{columns} and {contracted}"
            )
        if self.num_stages < 2:
            # The kernel frees a step's buffer one step later.
            raise ValueError(
                f"{type(self).__name__}: expected num_stages >= 2 with warp_specialize, got "
                f"{self.num_stages}"
            )
        loads = [field.name for field in fields(self) if field.name.startswith("use_tma_")]
        needed = {"num_warps": 8, "programs_per_sm": 1}
        needed |= dict.fromkeys(loads, True) | {"launch_pdl": False}
        if not self.is_pingpong:
            needed["epilogue_subtile"] = 1
        for name, value in needed.items():
            if (got := getattr(self, name)) != value:
                raise ValueError(
                    f"{type(self).__name__}: expected {name}={value} with warp_specialize, got {got}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as `from_dict` takes them."""
        return asdict(self)

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any]) -> C:
        """Make a configuration from a dict of fields. A missing field has its default.

        Raises:
            ValueError: an unknown field, or a value out of range.
            TypeError: a value of another type, or no dict.
        """
        if not isinstance(values, dict):
            got = f"{values!r} ({type(values).__name__})"
            raise TypeError(f"{cls.__name__}: expected a dict of fields, got {got}")
        known = {declared.name for declared in fields(cls)}
        for name in values:
            if name not in known:
                raise ValueError(f"{cls.__name__}: unknown field {name!r}")
        return cls(**values)


@dataclass(frozen=True)
class KernelConfigForward(KernelConfig):
    """Configures grouped_gemm: tiles of BLOCK_M by BLOCK_N, contracted over BLOCK_K.

    Attributes:
        tail_tiles (bool): compute an expert's last rows in a tile of half the height where they
            fit. It helps where experts have few rows, and excludes `flatten`.
        use_tma_load_x (bool): load the rows through a descriptor.
        use_tma_load_w (bool): load the weight through a descriptor.
    """

    tail_tiles: bool = False
    use_tma_load_x: bool = False
    use_tma_load_w: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_tail_tiles(self, self.tail_tiles)


@dataclass(frozen=True)
class KernelConfigBackward_dX(KernelConfig):  # noqa: N801
    """Configures grouped_gemm_dx: tiles of BLOCK_M by BLOCK_K, contracted over BLOCK_N.

    Attributes:
        tail_tiles (bool): as in KernelConfigForward.
        use_tma_load_dy (bool): load the rows of the output's gradient through a descriptor.
        use_tma_load_w (bool): load the weight through a descriptor.
    """

    TILE: ClassVar[tuple[str, str, str]] = ("BLOCK_M", "BLOCK_K", "BLOCK_N")

    tail_tiles: bool = False
    use_tma_load_dy: bool = False
    use_tma_load_w: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_tail_tiles(self, self.tail_tiles)


@dataclass(frozen=True)
class KernelConfigBackward_dW(KernelConfig):  # noqa: N801
    """Configures grouped_gemm_dw: tiles of BLOCK_N by BLOCK_K, contracted over BLOCK_M.

    Attributes:
        use_tma_load_dy (bool): load the rows of the output's gradient through a descriptor.
        use_tma_load_x (bool): load the rows of the input through a descriptor.
    """

    TILE: ClassVar[tuple[str, str, str]] = ("BLOCK_N", "BLOCK_K", "BLOCK_M")

    use_tma_load_dy: bool = False
    use_tma_load_x: bool = False


def _check_tail_tiles(config: KernelConfig, tail_tiles: bool) -> None:
    name = type(config).__name__
    if tail_tiles and config.warp_specialize:
        raise ValueError(f"{name}: expected not (tail_tiles and warp_specialize), got both")
    if tail_tiles and config.flatten:
        raise ValueError(f"{name}: expected not (tail_tiles and flatten), got both")
    if tail_tiles and config.BLOCK_M < 32:
        raise ValueError(f"{name}: expected BLOCK_M >= 32 with tail_tiles, got {config.BLOCK_M}")


PASSES: dict[str, type[KernelConfig]] = {
    "forward": KernelConfigForward,
    "backward_dX": KernelConfigBackward_dX,
    "backward_dW": KernelConfigBackward_dW,
}

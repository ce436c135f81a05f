# SPDX-License-Identifier: Apache-2.0
"""The module that stores a quantised weight.

E num_experts, N out_features, D in_features, G blocks of a row.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops._core.checks import check_weight_dtype, dtype_name
from moe_ops._core.sharded import refuse_sharded
from moe_ops.quantization import adopt, storage
from moe_ops.quantization.adopt import Tensors
from moe_ops.quantization.bitsandbytes import from_bitsandbytes
from moe_ops.quantization.format import Layout
from moe_ops.quantization.storage import Packed, layout_of
from moe_ops.quantization.stored import TENSOR_NAMES

_HERE = "moe_ops.QuantizedWeight"
# What torch.nn.Module calls the state that get_extra_state returns.
_DESCRIPTION = "_extra_state"


class QuantizedWeight(nn.Module):
    """Store the experts' weights (E, N, D) quantised.

    moe_ops.quantize_weight makes one, and the from_ methods adopt the tensors of other libraries.

    The stored tensors are parameters without gradient, experts first, and bytes: FP8 codes and scales
    in fp32 are seen as uint8. So casting a model changes none of them, and fully_shard shards them by
    expert (before torch 2.12 it takes floating parameters only). What says how to read them is plain
    attributes, constants to a compiler. A state dict has it too, as the bytes `_extra_state`.

    Parameters, all uint8:
        codes (E, N, bytes of a row).
        scale (E, rows of blocks, bytes of G scales).
        nested_scale (E, 4 * ceil(N * G / 256)) in fp32, or None where scales are not nested.
        nested_offset (E, 4) in fp32, or None where scales are not nested.

    Attributes:
        format (str): as of moe_ops.quantize_weight.
        shape (torch.Size): (E, N, D), also while the parameters are sharded.
        dtype (torch.dtype): what dequantize() returns.
        group_size (int): the size of a block along in_features.
        scale_encoding (str): "float32", "bfloat16", "e8m0" or "nested".
    """

    codes: nn.Parameter
    scale: nn.Parameter
    nested_scale: nn.Parameter | None
    nested_offset: nn.Parameter | None

    def __init__(self, weight: Packed, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        if not isinstance(weight, Packed):
            raise TypeError(
                f"{_HERE}: expected weight to be what .packed of a quantised weight is, got "
                f"{type(weight).__name__}; call moe_ops.quantize_weight, or a from_ method"
            )
        layout, tensors = weight
        check_weight_dtype(_HERE, dtype)
        self.format, _, self.group_size, self.scale_encoding = layout
        self.shape = torch.Size(layout.shape)
        self.dtype = dtype
        for name in TENSOR_NAMES:
            tensor = tensors.get(name)
            parameter = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, parameter)

    @classmethod
    def empty(
        cls,
        shape: Sequence[int],
        format: str,
        group_size: int | None = None,
        *,
        scale_encoding: str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> QuantizedWeight:
        """Return a weight that is not initialised, to load a state into.

        Args:
            shape (E, N, D): its sizes.
            format (str): as of moe_ops.quantize_weight.
            group_size (int or None): the size of a block, or the format's default.
            scale_encoding (str or None): how scales are stored, or as quantize_weight does.
            dtype (torch.dtype): what dequantize() returns.
            device: of the parameters; "meta" allocates nothing.

        Raises:
            ValueError: an unknown format; a group_size or scale_encoding that the format does not have;
                a shape that is not (E, N, D).
            TypeError: dtype is not a floating one of 16 bits or more; shape is not of integers.
        """
        layout = layout_of(f"{_HERE}.empty", format, shape, group_size, scale_encoding)
        return cls(storage.empty(layout, device), dtype)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], prefix: str = "") -> QuantizedWeight:
        """Return the weight whose state_dict(prefix=prefix) is in `state`, with its very tensors.

        Raises:
            TypeError: `state` is no mapping.
            ValueError: `state` has no description of a weight under that prefix, or describes a format
                that this version does not know.
            RuntimeError: a tensor is missing, or has another shape or dtype.
        """
        function = f"{_HERE}.from_state_dict"
        if not isinstance(state, Mapping):
            raise TypeError(
                f"{function}: expected state to be a mapping of names to tensors, got "
                f"{type(state).__name__}"
            )
        if prefix + _DESCRIPTION not in state:
            raise ValueError(
                f"{function}: expected state to have {prefix}{_DESCRIPTION}, "
                f"got {', '.join(state) or 'nothing'}"
            )
        try:
            layout, dtype = _described(state[prefix + _DESCRIPTION])
        except ValueError as error:
            raise ValueError(f"{function}: {error}") from error
        # Outside of the try, since its errors name the function already.
        layout = layout_of(function, *layout)
        weight = cls(storage.empty(layout, "meta"), dtype)
        mine = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
        weight.load_state_dict(mine, assign=True)
        return weight

    @classmethod
    def from_mxfp4(
        cls, blocks: Tensors, scales: Tensors, dtype: torch.dtype = torch.bfloat16
    ) -> QuantizedWeight:
        """Adopt e2m1 codes with a power of two for each 32, without a copy if they are contiguous.

        Args:
            blocks (Tensor (E, N, D / 32, 16) or (E, N, D / 2), uint8, int8 or float4_e2m1fn_x2): two
                codes in a byte, the first in the low half. The former shape is gpt-oss's, the latter
                DeepSeek-V4's.
            scales (Tensor (E, N, D / 32), uint8 or float8_e8m0fnu): 2 ** (byte - 127); 255 is NaN.
            dtype (torch.dtype): what dequantize() returns.

        Each may be a sequence of the experts' tensors instead, which costs a copy.

        Raises:
            TypeError: blocks, scales or dtype is of another dtype.
            ValueError: a shape or a device does not fit.
        """
        return cls(adopt.from_mxfp4(f"{_HERE}.from_mxfp4", blocks, scales), dtype)

    @classmethod
    def from_fp8_block(
        cls, weight: Tensors, weight_scale_inv: Tensors, dtype: torch.dtype = torch.bfloat16
    ) -> QuantizedWeight:
        """Adopt FP8 codes with a scale for each 128 x 128, without a copy if they are contiguous.

        Args:
            weight (Tensor (E, N, D), float8_e4m3fn): the codes.
            weight_scale_inv (Tensor (E, ceil(N / 128), ceil(D / 128))): float32, float8_e8m0fnu or
                that as uint8. Codes are multiplied by it, despite the name.
            dtype (torch.dtype): what dequantize() returns.

        Each may be a sequence of the experts' tensors instead, which costs a copy.

        Raises:
            TypeError: weight, weight_scale_inv or dtype is of another dtype.
            ValueError: a shape or a device does not fit.
        """
        function = f"{_HERE}.from_fp8_block"
        return cls(adopt.from_fp8_block(function, weight, weight_scale_inv), dtype)

    @classmethod
    def from_compressed_int4(
        cls,
        weight_packed: Tensors,
        weight_scale: Tensors,
        shape: Sequence[int] | Tensor,
        group_size: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> QuantizedWeight:
        """Adopt compressed-tensors' symmetric int4, without a copy if it is contiguous.

        Args:
            weight_packed (Tensor (E, N, D / 8), int32): code + 8, eight in a word, the first lowest.
            weight_scale (Tensor (E, N, D / group_size), bfloat16, float16 or float32): float16 is
                converted to float32, which costs a copy of the scales.
            shape ((E, N, D) or (N, D)): the weight's, or weight_shape of one expert.
            group_size (int): 32 or 128.
            dtype (torch.dtype): what dequantize() returns.

        Each tensor may be a sequence of the experts' tensors instead, which costs a copy.

        Raises:
            TypeError: weight_packed, weight_scale or dtype is of another dtype.
            ValueError: a shape, a device or group_size does not fit.
        """
        function = f"{_HERE}.from_compressed_int4"
        weight = adopt.from_compressed_int4(
            function, weight_packed, weight_scale, shape, group_size
        )
        return cls(weight, dtype)

    @classmethod
    def from_bitsandbytes(
        cls,
        data: Tensors,
        quant_state: Any | Sequence[Any],
        dtype: torch.dtype = torch.bfloat16,
    ) -> QuantizedWeight:
        """Adopt bitsandbytes' NF4, without a copy if one state has all experts.

        Args:
            data (Tensor): the bytes of bitsandbytes.functional.quantize_4bit or a Params4bit.
            quant_state (QuantState): its state, of a weight (E, N, D), or (N, D) for one expert.
            dtype (torch.dtype): what dequantize() returns.

        Both may be sequences, with the bytes and the state of each expert. That costs a copy.

        A quantised absmax stays so, with the offset of each expert. It becomes fp32 where one state's
        blocks of 256 do not end with an expert, where states differ in having it, and where its code
        or its block is not bitsandbytes' default.

        Raises:
            TypeError: the state is not bitsandbytes' or lacks a part; absmax or dtype is of another dtype.
            ValueError: the state is not NF4 in blocks of 64; 64 does not divide in_features, as blocks
                would run on into the next row; a length, a shape or a device does not fit.
        """
        return cls(from_bitsandbytes(f"{_HERE}.from_bitsandbytes", data, quant_state), dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight (E, N, D) in `dtype`, or in `.dtype` where that is None.

        It is codes times scale in fp32, which is then rounded to the dtype. Scales that are NaN or
        infinite propagate. It is not differentiable, and deterministic bit for bit.

        It calls the op moe::dequantize_weight, which a compiler does not look into. The PyTorch
        implementation takes one expert at a time, with temporaries of a few times its size in fp32.

        Raises:
            TypeError: the weight is spread over ranks.
        """
        refuse_sharded(f"{_HERE}.dequantize", "codes", self.codes, "dequantise it")
        return torch.ops.moe.dequantize_weight.default(
            *self.stored, self.shape[2], dtype or self.dtype
        )

    @property
    def stored(self) -> tuple[Tensor | str | int | None, ...]:
        """Return what ops take of a weight: its four tensors, and what says how to read them."""
        tensors = (self.codes, self.scale, self.nested_scale, self.nested_offset)
        return (*tensors, self.format, self.group_size, self.scale_encoding)

    def check_width(self, function: str, name: str, width: int, axis: str) -> None:
        """Refuse another size than this weight's along in_features.

        Raises:
            ValueError: it is another.
        """
        if self.shape[2] != width:
            raise ValueError(
                f"{function}: expected {name}.shape[2] == {axis} ({width}), got {self.shape[2]}"
            )

    @property
    def packed(self) -> Packed:
        """Return the layout and the stored tensors."""
        layout = Layout(self.format, tuple(self.shape), self.group_size, self.scale_encoding)
        tensors = {name: getattr(self, name) for name in self._parameters}
        return Packed(layout, {name: t for name, t in tensors.items() if t is not None})

    @property
    def device(self) -> torch.device:
        """Return the device of the stored tensors."""
        return self.codes.device

    @property
    def ndim(self) -> int:
        """Return 3."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all stored tensors; of the whole weight where they are sharded."""
        return sum(parameter.nbytes for parameter in self.parameters())

    @property
    def requires_grad(self) -> bool:
        """Return False. Setting it to True is an error."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> QuantizedWeight:
        """Return this weight.

        Raises:
            ValueError: requires_grad is True.
        """
        if requires_grad:
            raise ValueError(
                f"{_HERE}.requires_grad_: expected requires_grad to be False, since a quantised weight "
                "has no gradient, got True; train LoRA adapters beside it (moe_ops.layers.lora), or a "
                "parameter made of its .dequantize()"
            )
        return self

    def __getitem__(self, experts: slice) -> QuantizedWeight:
        if not isinstance(experts, slice):
            raise TypeError(
                f"{_HERE}: expected a slice of experts as index, got {experts!r}; "
                "use weight[e : e + 1] for one expert"
            )
        layout, tensors = self.packed
        mine = {name: tensor.detach()[experts].contiguous() for name, tensor in tensors.items()}
        shape = (mine["codes"].shape[0], *layout.shape[1:])
        return QuantizedWeight(Packed(layout._replace(shape=shape), mine), self.dtype)

    def get_extra_state(self) -> Tensor:
        """Return what says how to read the stored tensors, as the bytes of a JSON object."""
        description = {**self.packed.layout._asdict(), "dtype": dtype_name(self.dtype)}
        text = json.dumps(description).encode()
        return torch.tensor(list(text), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take the dtype that get_extra_state returned.

        Raises:
            ValueError: the rest is not as this weight's.
        """
        layout, dtype = _described(state)
        if layout != self.packed.layout:
            raise ValueError(f"expected a state of {self.packed.layout}, got one of {layout}")
        self.dtype = dtype

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load as any module, but nothing of a weight that is stored in another way."""
        try:
            if prefix + _DESCRIPTION in state_dict:
                self.set_extra_state(state_dict[prefix + _DESCRIPTION])
            for key in (prefix + name for name in self.packed.tensors):
                if key in state_dict and (dtype := state_dict[key].dtype) != torch.uint8:
                    raise ValueError(f"expected {key}.dtype == uint8, got {dtype_name(dtype)}")
        except ValueError as error:
            error_msgs.append(f"{prefix.removesuffix('.') or _HERE}: {error}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        """Return the format and the sizes, for print(module)."""
        return (
            f"{self.format}, shape={tuple(self.shape)}, group_size={self.group_size}, "
            f"scale_encoding={self.scale_encoding!r}, dtype={dtype_name(self.dtype)}"
        )


def _described(state: Tensor) -> tuple[Layout, torch.dtype]:
    """Return the layout and the dtype that get_extra_state wrote.

    Raises:
        ValueError: somebody else wrote the state.
    """
    try:
        description = json.loads(bytes(state.tolist()))
        dtype = getattr(torch, description.pop("dtype"))
        check_weight_dtype(_DESCRIPTION, dtype)
        shape = tuple(map(operator.index, description.pop("shape")))
        return Layout(shape=shape, **description), dtype
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"expected {_DESCRIPTION} to be what get_extra_state returns, got other bytes"
        ) from error

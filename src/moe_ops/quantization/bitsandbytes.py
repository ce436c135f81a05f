# SPDX-License-Identifier: Apache-2.0
"""Read bitsandbytes' NF4 weights. bitsandbytes is not imported.

Its quant_state has .quant_type, .blocksize, .shape, .absmax and, if absmax is quantised too, .offset
and .state2. Blocks run through the whole weight, row after row, so rows of whole blocks are blocks
along in_features, as ours are.

E num_experts, N out_features, D in_features, G D / 64 blocks of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moe_ops._core.checks import check_tensor
from moe_ops.quantization.adopt import as_bytes, check_beside, check_dtype
from moe_ops.quantization.formats.nf4 import NF4
from moe_ops.quantization.scales import DYNAMIC_CODE, FLOAT32, NESTED, NESTED_BLOCK
from moe_ops.quantization.storage import Packed, are_integers, layout_of, shapes

_BLOCK = 64


def from_bitsandbytes(
    function: str, data: Tensor | Sequence[Tensor], quant_state: Any | Sequence[Any]
) -> Packed:
    """Return (E, N, D) of the bytes and the state of all experts, or of those of each."""
    # A Params4bit iterates over its rows, but is no Sequence.
    datas = list(data) if isinstance(data, Sequence) else [data]
    states = list(quant_state) if isinstance(quant_state, Sequence) else [quant_state]
    if len(datas) != len(states):
        raise ValueError(
            f"{function}: expected len(data) == len(quant_state) ({len(states)}), got {len(datas)}"
        )
    sizes = _sizes(function, states)
    codes = [_codes(function, *pair, sizes) for pair in zip(datas, states, strict=True)]
    layout = layout_of(function, "nf4", (len(states) * sizes[0], *sizes[1:]), _BLOCK, NESTED.name)
    scales = [_nested(state, sizes[0]) for state in states]
    if not all(scales):
        layout = layout._replace(scale_encoding=FLOAT32.name)
        scales = [{"scale": as_bytes(_absmax(state))} for state in states]
    tensors = {name: [scale[name] for scale in scales] for name in scales[0]} | {"codes": codes}
    sizes_of = shapes(layout)
    return Packed(layout, {n: _joined(parts).view(sizes_of[n]) for n, parts in tensors.items()})


def joined_rows(states: Sequence[Any]) -> Any:
    """Return the state (N, D) of weights that stand under each other. Its absmax is in fp32.

    Blocks of 256 scales and their offsets belong to one state, so a quantised absmax does not stay so.
    One state alone is returned as it is.
    """
    if len(states) == 1:
        return states[0]
    rows, (width,) = sum(s.shape[0] for s in states), {s.shape[1] for s in states}
    return SimpleNamespace(
        quant_type=states[0].quant_type,
        blocksize=states[0].blocksize,
        shape=(rows, width),
        absmax=torch.cat([_absmax(state) for state in states]),
        state2=None,
    )


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _sizes(function: str, states: list[Any]) -> tuple[int, int, int]:
    """Return the (E, N, D) that every state has. A state of (N, D) has one expert.

    Raises:
        TypeError: a state is none of bitsandbytes.
        ValueError: there is no state, a state is not NF4 in blocks of 64 or has other values, or
            their shapes differ.
    """
    sizes = "(out_features, in_features), or that after num_experts"
    for state in states:
        attributes = ("quant_type", "blocksize", "absmax", "shape", "state2")
        _check_state(function, "quant_state", state, *attributes)
        for name, expected in (("quant_type", "nf4"), ("blocksize", _BLOCK)):
            if (value := getattr(state, name)) != expected:
                raise ValueError(
                    f"{function}: expected quant_state.{name} == {expected!r}, got {value!r}"
                )
        code = getattr(state, "code", None)
        if code is not None:
            check_tensor(function, "quant_state.code", code)
        if code is not None and not code.is_meta and tuple(code.tolist()) != NF4:
            raise ValueError(
                f"{function}: expected quant_state.code to be the 16 values of nf4, got "
                f"{code.tolist()}"
            )
        if not are_integers(state.shape):
            raise TypeError(
                f"{function}: expected quant_state.shape to be {sizes}, got {state.shape}"
            )
    shapes = {tuple(state.shape) for state in states}
    if len(shapes) != 1:
        raise ValueError(
            f"{function}: expected quant_state to have states of one shape, "
            f"got {sorted(shapes) or 'none'}"
        )
    (shape,) = shapes
    if len(shape) not in (2, 3):
        raise ValueError(f"{function}: expected quant_state.shape to be {sizes}, got {shape}")
    if shape[-1] % _BLOCK:
        raise ValueError(
            f"{function}: expected quant_state.shape[-1] to be a multiple of {_BLOCK}, since a "
            f"block would run on into the next row, got {shape[-1]}; dequantise it with bitsandbytes and call "
            "moe_ops.quantize_weight"
        )
    return (1, *shape) if len(shape) == 2 else shape


def _check_state(function: str, name: str, state: Any, *attributes: str) -> None:
    """Refuse what is no state of bitsandbytes.

    Raises:
        TypeError: it lacks one of the attributes.
    """
    lacking = ", ".join(a for a in attributes if not hasattr(state, a))
    if lacking:
        got = "None" if state is None else f"{type(state).__name__} without {lacking}"
        raise TypeError(
            f"{function}: expected {name} to be a QuantState of bitsandbytes, got {got}"
        )


def _codes(function: str, data: Tensor, state: Any, sizes: tuple[int, int, int]) -> Tensor:
    """Return the bytes (E, N, D / 2) of data, whatever its dtype, which quant_storage chose.

    Raises:
        ValueError, TypeError: data or a tensor of its state has another length, dtype or device.
    """
    check_tensor(function, "data", data)
    codes = as_bytes(data.detach().as_subclass(Tensor).flatten())
    count = math.prod(sizes)
    if codes.numel() != count // 2:
        raise ValueError(
            f"{function}: expected data to have {count // 2} bytes, two weights of "
            f"{tuple(state.shape)} in each, got {codes.numel()}"
        )
    check_tensor(function, "quant_state.absmax", state.absmax)
    tensors = [("quant_state.absmax", state.absmax, count // _BLOCK)]
    if state.state2 is not None:
        _check_nested(function, state)
        length = -(-state.absmax.numel() // state.state2.blocksize)
        tensors.append(("quant_state.state2.absmax", state.state2.absmax, length))
    check_dtype(function, tensors[-1][0], tensors[-1][1], torch.float32)
    for name, tensor, length in tensors:
        check_beside(function, name, tensor, (length,), codes.device)
    return codes.view(*sizes[:2], sizes[2] // 2)


def _check_nested(function: str, state: Any) -> None:
    """Refuse a quantised absmax without all that decodes it.

    Raises:
        TypeError: it has another dtype, or something is missing or no tensor.
        ValueError: its offset is not one number.
    """
    check_dtype(function, "quant_state.absmax", state.absmax, torch.uint8)
    _check_state(function, "quant_state.state2", state.state2, "absmax", "blocksize", "code")
    offset: Any = getattr(state, "offset", None)
    for name, tensor in (
        ("state2.absmax", state.state2.absmax), ("state2.code", state.state2.code), ("offset", offset)
    ):  # fmt: skip
        check_tensor(function, f"quant_state.{name}", tensor)
    if tuple(offset.shape) not in ((), (1,)):
        raise ValueError(
            f"{function}: expected quant_state.offset to be one number, got {tuple(offset.shape)}"
        )


def _nested(state: Any, num_experts: int) -> dict[str, Tensor]:
    """Return the stored tensors of a quantised absmax, or nothing where it cannot stay so.

    In one state of several experts, blocks of 256 may run on from an expert to the next.
    """
    inner = state.state2
    if inner is None or inner.blocksize != NESTED_BLOCK:
        return {}
    if num_experts > 1 and state.absmax.numel() // num_experts % NESTED_BLOCK:
        return {}
    if not inner.code.is_meta and tuple(inner.code.tolist()) != DYNAMIC_CODE:
        return {}
    return {
        "scale": as_bytes(state.absmax),
        "nested_scale": as_bytes(inner.absmax),
        "nested_offset": as_bytes(state.offset.to(inner.absmax).expand(num_experts)),
    }


def _absmax(state: Any) -> Tensor:
    """Return absmax in fp32, as bitsandbytes computes it."""
    inner = state.state2
    if inner is None:
        return state.absmax
    outer = inner.absmax.repeat_interleave(inner.blocksize)[: state.absmax.numel()]
    return inner.code[state.absmax.int()] * outer + state.offset

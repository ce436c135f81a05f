# SPDX-License-Identifier: Apache-2.0
"""How checkpoints of other libraries store quantised experts, and how a QuantizedWeight takes them.

A part is what a checkpoint has of one projection: for each suffix of the weight's name, the tensors
of the experts in their order. Of a gated one that is stored as gate and up, there are two parts.

E num_experts, N out_features, D in_features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moe_ops.fp8 import BLOCK
from moe_ops.quantization import QuantizedWeight
from moe_ops.quantization.bitsandbytes import joined_rows

Part = Mapping[str, list[Tensor]]
Parts = Sequence[Part]


@dataclass(frozen=True)
class Source:
    """Say how a library's checkpoints call the tensors of a weight.

    Attributes:
        format: what its experts become.
        suffixes: what stands behind the weight's name.
        experts: makes a QuantizedWeight from (the weight's name, its parts, its dtype).
        check: raises a ValueError for (function, quantization_config) that is not adopted.
        stacked: names of weights that have all experts in one tensor.
        linear: whether other modules may be quantised too.
        renamings: other names for the same suffixes, as pairs of patterns.
    """

    format: str
    suffixes: tuple[str, ...]
    experts: Callable[[str, Parts, torch.dtype], QuantizedWeight]
    check: Callable[[str, Mapping[str, Any]], None]
    stacked: tuple[str, ...] = ()
    linear: bool = True
    renamings: tuple[tuple[str, str], ...] = ()


def method_of(config: Mapping[str, Any]) -> Any:
    """Return the method of a quantization_config. bitsandbytes' older files do not name theirs."""
    method = config.get("quant_method")
    if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        return "bitsandbytes"
    return method


def check_adoptable(function: str, config: Mapping[str, Any]) -> Source:
    """Return the source of a checkpoint with this quantization_config.

    Raises:
        ValueError: its experts are quantised in a way that no format stores.
    """
    method = method_of(config)
    # The tuple takes what has no hash too.
    if method not in tuple(SOURCES):
        raise ValueError(
            f"{function}: expected quant_method to be one of {', '.join(SOURCES)}, got {method!r}"
        )
    SOURCES[method].check(function, config)
    return SOURCES[method]


def required(function: str, config: object, name: str, path: str = "") -> Any:
    """Return what a config says. `path` leads to it within the quantization_config.

    Raises:
        ValueError: it does not say it.
    """
    where = f"{path} of the quantization_config" if path else "the quantization_config"
    if not isinstance(config, Mapping):
        raise ValueError(f"{function}: expected {where} to be a mapping, got {config!r}")
    if name not in config:
        raise ValueError(
            f"{function}: expected {where} to have {name}, got {', '.join(config) or 'nothing'}"
        )
    return config[name]


def _expect(
    function: str, config: Mapping[str, Any], name: str, *allowed: object, path: str = ""
) -> None:
    if (value := required(function, config, name, path)) not in allowed:
        raise ValueError(
            f"{function}: expected {name} of the quantization_config to be "
            f"{' or '.join(map(repr, allowed))}, got {value!r}"
        )


def _check_mxfp4(function: str, config: Mapping[str, Any]) -> None:
    """Take all of them: blocks of 32 are all that there is."""


def _mxfp4(name: str, parts: Parts, dtype: torch.dtype) -> QuantizedWeight:
    (part,) = parts
    ((blocks,), (scales,)) = _all(name, part, "_blocks", "_scales")
    return QuantizedWeight.from_mxfp4(blocks, scales, dtype)


def _check_fp8(function: str, config: Mapping[str, Any]) -> None:
    size = required(function, config, "weight_block_size")
    size = list(size) if isinstance(size, Sequence) else size
    _expect(function, {"weight_block_size": size}, "weight_block_size", [BLOCK, BLOCK])
    _expect(function, {"fmt": "e4m3", **config}, "fmt", "e4m3", "e4m3fn")


def _fp8(name: str, parts: Parts, dtype: torch.dtype) -> QuantizedWeight:
    found = [_all(name, part, "", "_scale_inv") for part in parts]
    rows = {codes[0].shape[0] for codes, _ in found[:-1]}
    if any(row % BLOCK for row in rows):
        raise ValueError(
            f"expected the rows of the gate in {name} to be a multiple of {BLOCK}, since its blocks and "
            f"those of the up projection are stored as one, got {sorted(rows)}"
        )
    codes, scales = (
        [torch.cat(t) for t in zip(*tensors, strict=True)] for tensors in zip(*found, strict=True)
    )
    if codes[0].dtype == torch.int8:
        # DeepSeek-V4 keeps its experts in four bits beside FP8.
        return QuantizedWeight.from_mxfp4(codes, scales, dtype)
    return QuantizedWeight.from_fp8_block([_as_e4m3(name, t) for t in codes], scales, dtype)


def _as_e4m3(name: str, codes: Tensor) -> Tensor:
    """Return FP8 codes, which transformers may have cast to a wider dtype."""
    if codes.dtype == torch.float8_e4m3fn:
        return codes
    found = f"{codes.dtype}"
    if codes.dtype in (torch.bfloat16, torch.float16, torch.float32):
        cast = codes.to(torch.float8_e4m3fn)
        if bool(((cast.to(codes.dtype) == codes) | codes.isnan()).all()):
            return cast
        found = f"values of {codes.dtype} that it does not have"
    raise ValueError(f"expected {name} to be stored in float8_e4m3fn, got {found}")


def _check_bitsandbytes(function: str, config: Mapping[str, Any]) -> None:
    _expect(function, config, "load_in_4bit", True)
    _expect(function, {"load_in_8bit": False, **config}, "load_in_8bit", False)
    _expect(function, config, "bnb_4bit_quant_type", "nf4")
    # Older files lack it, and are stored in bytes.
    storage = {"bnb_4bit_quant_storage": "uint8", **config}
    _expect(function, storage, "bnb_4bit_quant_storage", "uint8")


def _bitsandbytes(name: str, parts: Parts, dtype: torch.dtype) -> QuantizedWeight:
    """Join gate and up in one state, whose absmax stays in fp32: each has an offset of its own."""
    datas, states = [], []
    for part in parts:
        codes, *_ = _all(name, part, "", ".absmax", ".quant_state.bitsandbytes__nf4")
        datas.append(codes)
        states.append([_state(part, expert) for expert in range(len(codes))])
    joined = [
        (torch.cat([data.flatten() for data in expert[0]]), joined_rows(list(expert[1])))
        for expert in zip(zip(*datas, strict=True), zip(*states, strict=True), strict=True)
    ]
    return QuantizedWeight.from_bitsandbytes([j[0] for j in joined], [j[1] for j in joined], dtype)


def _state(part: Part, expert: int) -> Any:
    """Return the quant_state of an expert, as bitsandbytes.functional.QuantState has it."""
    packed = json.loads(bytes(part[".quant_state.bitsandbytes__nf4"][expert].tolist()))
    absmax = part[".absmax"][expert]
    state2 = offset = None
    if ".nested_absmax" in part:
        state2 = SimpleNamespace(
            absmax=part[".nested_absmax"][expert],
            code=part[".nested_quant_map"][expert],
            blocksize=packed["nested_blocksize"],
        )
        offset = torch.tensor(packed["nested_offset"], dtype=torch.float32, device=absmax.device)
    return SimpleNamespace(
        quant_type=packed["quant_type"],
        blocksize=packed["blocksize"],
        shape=tuple(packed["shape"]),
        absmax=absmax,
        offset=offset,
        state2=state2,
    )


_DENSE = {"format": "dense"}
# What compressed-tensors takes where a file does not say it, and what means the same.
_UNLESS_SAID: dict[str, tuple[object, ...]] = {
    "type": ("int",), "symmetric": (True,), "actorder": (None, False), "dynamic": (False, None)
}  # fmt: skip


def _check_compressed(function: str, config: Mapping[str, Any]) -> None:
    groups = required(function, config, "config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(
            f"{function}: expected config_groups of the quantization_config to have a group, got "
            f"{groups!r}"
        )
    for unread in ("sparsity_config", "transform_config"):
        # Older files lack them, newer ones have them empty. Dense is no sparsity.
        _expect(function, {unread: None, **config}, unread, None, {}, _DENSE)
    for key, group in groups.items():
        path = f"config_groups.{key}"
        weights = required(function, group, "weights", path)
        own = group if group.get("format") else config
        _expect(function, own, "format", "pack-quantized")
        path = f"{path}.weights"
        for name, allowed in (
            ("num_bits", (4,)), ("strategy", ("group",)), ("group_size", (32, 128))
        ):  # fmt: skip
            _expect(function, weights, name, *allowed, path=path)
        for name, same in _UNLESS_SAID.items():
            _expect(function, {name: same[0], **weights}, name, *same)
        _expect(function, {"input_activations": None, **group}, "input_activations", None)


def _compressed(name: str, parts: Parts, dtype: torch.dtype) -> QuantizedWeight:
    found = [_all(name, part, "_packed", "_scale", "_shape") for part in parts]
    words, scales, _ = (
        [torch.cat(t) for t in zip(*tensors, strict=True)] for tensors in zip(*found, strict=True)
    )
    rows = sum(int(shapes[0][0]) for *_, shapes in found)
    width = int(found[0][2][0][1])
    group_size = width // max(scales[0].shape[1], 1)
    return QuantizedWeight.from_compressed_int4(words, scales, (rows, width), group_size, dtype)


def _all(name: str, part: Part, *suffixes: str) -> list[list[Tensor]]:
    """Return the tensors of each suffix.

    Raises:
        ValueError: the checkpoint lacks some.
    """
    missing = [suffix for suffix in suffixes if suffix not in part]
    if missing:
        raise ValueError(
            f"expected the checkpoint to have {', '.join(f'*{suffix}' for suffix in missing)} of {name}, "
            f"got {', '.join(f'*{suffix}' for suffix in part)} alone"
        )
    return [part[suffix] for suffix in suffixes]


SOURCES = {
    "mxfp4": Source(
        "mxfp4", ("_blocks", "_scales"), _mxfp4, _check_mxfp4,
        stacked=("gate_up_proj", "down_proj"), linear=False,
    ),
    "fp8": Source(
        "fp8_block", ("_scale_inv",), _fp8, _check_fp8,
        renamings=((r"^(.+)\.scale$", r"\1.weight_scale_inv"),),
    ),
    "bitsandbytes": Source(
        "nf4",
        (
            ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map",
            ".quant_state.bitsandbytes__nf4",
        ),
        _bitsandbytes, _check_bitsandbytes,
    ),
    "compressed-tensors": Source(
        "int4", ("_packed", "_scale", "_shape"), _compressed, _check_compressed
    ),
}  # fmt: skip

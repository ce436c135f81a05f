# SPDX-License-Identifier: Apache-2.0
"""Load checkpoints whose experts another library quantised, as they are.

adopt_config makes our quantizer load a checkpoint in place of the one that its config names. Experts'
tensors go into a QuantizedWeight without being dequantised. Other quantised weights, such as those of
attention, are dequantised one by one while they are loaded: they are few, and train.

A source is how checkpoints call the tensors of a weight (sources.py).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

from moe_ops.integrations import transformers_private
from moe_ops.integrations.quantised_experts import set_quantized, turned
from moe_ops.integrations.sources import SOURCES, Source, check_adoptable, method_of, required
from moe_ops.quantization import QuantizedWeight

_HERE = "moe_ops.integrations.transformers.adopt_config"


def adopt_config(config: Any) -> Any:
    """Return a config with which from_pretrained keeps a checkpoint's quantised experts as they are.

        config = adopt_config(AutoConfig.from_pretrained(path))
        model = AutoModelForCausalLM.from_pretrained(
            path, config=config, experts_implementation="moe_ops"
        )

    | checkpoint                                             | its quant_method     | experts get |
    | ------------------------------------------------------ | -------------------- | ----------- |
    | gpt-oss                                                | "mxfp4"              | mxfp4       |
    | FineGrainedFP8: DeepSeek-V3, Qwen3-FP8                 | "fp8"                | fp8_block   |
    | bitsandbytes' NF4, experts stored one by one           | "bitsandbytes"       | nf4         |
    | compressed-tensors' int4, in groups of 32 or 128       | "compressed-tensors" | int4        |

    None of these libraries is needed, and a CPU will do. The model has no copy of the experts in full
    size, at no time. Other weights that the checkpoint has quantised are dequantised to the model's
    dtype, each by itself; all else is loaded as it is. transformers' own quantizers stay as they are,
    and are not used.

    Args:
        config: a config of transformers, as of AutoConfig.from_pretrained. It is not changed.

    Returns:
        config: a copy, whose quantization_config is a MoeOpsConfig's.

    Raises:
        TypeError: it is no config.
        ValueError: the checkpoint is not quantised, or in another way, or its quantization_config
            lacks what says in which.
    """
    from moe_ops.integrations.quantizer import METHOD, MoeOpsConfig, register

    if not hasattr(config, "get_text_config"):
        raise TypeError(
            f"{_HERE}: expected a config of transformers, as of AutoConfig.from_pretrained(path), got "
            f"{config!r}"
        )
    config = copy.deepcopy(config)
    holder = config
    if getattr(config, "quantization_config", None) is None:
        holder = config.get_text_config(decoder=True)
    theirs = getattr(holder, "quantization_config", None)
    if theirs is None:
        raise ValueError(
            f"{_HERE}: expected the config of a quantised checkpoint, got {type(config).__name__} "
            "without quantization_config; pass quantization_config=MoeOpsConfig(...) to from_pretrained "
            "to quantise it"
        )
    theirs = theirs.to_dict() if hasattr(theirs, "to_dict") else theirs
    if not isinstance(theirs, Mapping):
        raise ValueError(f"{_HERE}: expected quantization_config to be a mapping, got {theirs!r}")
    theirs = dict(theirs)
    register()
    if theirs.get("quant_method") == METHOD:
        required(_HERE, theirs, "format")
    else:
        source = check_adoptable(_HERE, theirs)
        holder.quantization_config = MoeOpsConfig(source.format, adopt=theirs).to_dict()
    return config


def conversions(quantizer: Any, theirs: list[Any], weights: list[str]) -> list[Any]:
    """Return the conversions that load an adopted checkpoint.

    Args:
        quantizer: a MoeOpsQuantizer.
        theirs: the model's own, for plain weights.
        weights: names of the experts' weights.
    """
    source = _source_of(quantizer)
    mine: list[Any] = [
        WeightRenaming(source_patterns=old, target_patterns=new) for old, new in source.renamings
    ]
    mine += [
        _for_experts(quantizer, source, conversion)
        if transformers_private.converts_to(conversion, weights)
        else conversion
        for conversion in theirs
    ]
    for stem in source.stacked:
        patterns = [rf"{stem}{suffix}$" for suffix in source.suffixes]
        adopt = _AdoptExperts(quantizer, [stem], None)
        mine.append(WeightConverter(patterns, stem, [adopt]))
    if source.linear:
        patterns = [f"weight{suffix}$" for suffix in ("", *source.suffixes)]
        mine.append(WeightConverter(patterns, "weight", [_Dequantize(quantizer)]))
    return mine


def finish(model: Any, saved: list[Any]) -> None:
    """Have an adopted model saved as one that was quantised here.

    Args:
        model: a PreTrainedModel that has been loaded.
        saved: the conversions for its plain weights, without ours.
    """
    model._weight_conversions = [
        conversion
        for conversion in saved
        if conversion.was_used() or hasattr(conversion, "operations")
    ]


def _source_of(quantizer: Any) -> Source:
    return SOURCES[method_of(quantizer.quantization_config.adopt)]


def _for_experts(quantizer: Any, source: Source, conversion: Any) -> Any:
    """Return a conversion of single experts' plain weights as one of their quantised tensors."""
    operations = conversion.operations
    usual = (MergeModulelist, Concatenate)
    sources = transformers_private.source_patterns(conversion)
    if not all(isinstance(op, usual) and op.dim == i for i, op in enumerate(operations)) or not all(
        pattern.endswith(".weight") for pattern in sources
    ):
        return conversion
    patterns = [f"{pattern}{suffix}$" for pattern in sources for suffix in ("", *source.suffixes)]
    adopt = _AdoptExperts(quantizer, sources, operations)
    return transformers_private.rewritten(
        conversion, patterns, list(conversion.target_patterns), [adopt]
    )


class _AdoptExperts(ConversionOps):
    """Put the quantised tensors of a projection of all experts where its parameter is.

    Args:
        hf_quantizer: a MoeOpsQuantizer. transformers loads tensors as they are for who has one.
        stems: what the names of a weight begin with, in the order of its rows: gate, up.
        plain: the conversions of plain weights, for layers that are not quantised.
    """

    def __init__(self, hf_quantizer: Any, stems: list[str], plain: list[Any] | None) -> None:
        self.hf_quantizer = hf_quantizer
        self.stems = stems
        self.plain = plain

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: Any = None,
        missing_keys: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return nothing, since the weight is in the model already; or plain weights."""
        source = _source_of(self.hf_quantizer)
        module_name, _, name = full_layer_name.rpartition(".")
        experts = model.get_submodule(module_name)
        parameter = getattr(experts, name)
        parts = [
            {
                suffix: tensors if isinstance(tensors, list) else [tensors]
                for suffix in ("", *source.suffixes)
                if (tensors := input_dict.pop(f"{stem}{suffix}$", None)) is not None
            }
            for stem in self.stems
        ]
        if self.plain is not None and all(set(part) == {""} for part in parts):
            return self._plain(parts, parameter.dtype, target_patterns, **kwargs)
        weight = source.experts(full_layer_name, parts, parameter.dtype)
        expected = tuple(turned(experts, parameter).shape)
        if tuple(weight.shape) != expected:
            raise ValueError(
                f"{_HERE}: expected {full_layer_name} of the checkpoint to have the shape {expected}, "
                f"got {tuple(weight.shape)}"
            )
        set_quantized(experts, name, weight)
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}

    def _plain(
        self,
        parts: list[dict[str, list[Tensor]]],
        dtype: torch.dtype,
        targets: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        tensors: dict[str, Any] = {
            stem: [tensor.to(dtype) for tensor in part[""]]
            for stem, part in zip(self.stems, parts, strict=True)
        }
        assert self.plain is not None
        for operation in self.plain:
            tensors = operation.convert(
                tensors, source_patterns=self.stems, target_patterns=targets, **kwargs
            )
        return tensors


class _Dequantize(ConversionOps):
    """Dequantise the weight of a module that is not an expert."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the weight in the dtype of the model's parameter."""
        source = _source_of(self.hf_quantizer)
        part = {
            pattern.removeprefix("weight").removesuffix("$"): tensors
            if isinstance(tensors, list)
            else [tensors]
            for pattern, tensors in input_dict.items()
        }
        dtype = model.get_parameter_or_buffer(full_layer_name).dtype
        if set(part) == {""}:
            return {full_layer_name: part[""][0].to(dtype)}
        weight: QuantizedWeight = source.experts(full_layer_name, [part], dtype)
        return {full_layer_name: weight.dequantize()[0]}

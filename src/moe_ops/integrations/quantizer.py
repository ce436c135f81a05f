# SPDX-License-Identifier: Apache-2.0
"""The quantizer of transformers' registry that quantises experts, and loads and saves quantised ones.

transformers makes a model on the meta device, asks the quantizer to prepare it, and then loads one
weight after the other. This module is imported by whoever uses transformers with quantised experts,
so `import moe_ops` does not import transformers.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moe_ops.integrations import adoption, peft_hook, transformers_private
from moe_ops.integrations.quantised_experts import (
    chosen_experts,
    dequantize_experts_,
    experts_modules,
    fits,
    names_in,
    quantized,
    quantized_weights,
    set_quantized,
    turned,
    weight_names,
)
from moe_ops.integrations.sources import required
from moe_ops.quantization import QuantizedWeight
from moe_ops.quantization.format import Layout
from moe_ops.quantization.formats import FORMATS
from moe_ops.quantization.storage import layout_of

METHOD = "moe_ops"
_FACADE = "moe_ops.integrations.transformers"
_HERE = f"{_FACADE}.MoeOpsConfig"

logger = logging.getLogger("moe_ops")


class MoeOpsConfig(QuantizationConfigMixin):
    """Quantise the experts of a model while from_pretrained loads it.

    Routers, shared experts, attention and everything else are loaded as without it.

        from_pretrained(
            path, quantization_config=MoeOpsConfig("nf4"), experts_implementation="moe_ops"
        )

    The model is trainable through adapters, and save_pretrained keeps the quantised weights. The
    saved config has a MoeOpsConfig too, with which from_pretrained loads them as they are.

    Args:
        format (str): "fp8_block", "nf4", "mxfp4" or "int4", as of moe_ops.quantize_weight.
        group_size (int or None): as of moe_ops.quantize_weight.
        modules (sequence of str or None): as of quantize_experts_.
        weights (mapping or None): the layouts of weights that are stored otherwise, by name:
            (format, group_size, scale_encoding). save_pretrained writes it.
        adopt (mapping or None): another library's quantisation of the checkpoint. adopt_config
            writes it.

    Raises:
        ValueError: an unknown format, or a group_size that the format does not have.
    """

    def __init__(
        self,
        format: str,
        group_size: int | None = None,
        modules: Sequence[str] | None = None,
        weights: Mapping[str, Sequence[Any]] | None = None,
        adopt: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        unknown = set(others) - {"quant_method"}
        if unknown:
            raise TypeError(f"{_HERE}: got unknown arguments {sorted(unknown)}")
        layout_of(_HERE, format, (0, 0, 0), group_size)
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format = format
        self.group_size = group_size
        self.modules = names_in(_HERE, modules)
        self.weights = {name: list(layout) for name, layout in (weights or {}).items()}
        self.adopt = None if adopt is None else dict(adopt)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the config that a config.json has, as transformers calls it.

        Raises:
            ValueError: it has no format, or as of the class.
        """
        required(_HERE, config_dict, "format")
        return super().from_dict(config_dict, *args, **kwargs)  # type: ignore[no-untyped-call]

    def layout(self, name: str, shape: tuple[int, ...]) -> Layout:
        """Return the layout of the weight called `name`."""
        for pattern, (format, group_size, scale_encoding) in self.weights.items():
            if fits(name, [pattern]):
                return layout_of(_HERE, format, shape, group_size, scale_encoding)
        return layout_of(_HERE, self.format, shape, self.group_size)


class MoeOpsQuantizer(HfQuantizer):
    """What transformers calls while it loads, trains and saves a model with quantised experts."""

    quantization_config: MoeOpsConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to load weights onto a disk.

        Raises:
            ValueError: the device map has a "disk".
        """
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                f"{_HERE}: expected a device_map without 'disk', since quantised experts stay in "
                "memory, got one with it; name devices only"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        chosen = chosen_experts(_HERE, model, config.modules)
        self._experts = chosen
        if not self.pre_quantized or config.adopt is not None:
            return
        for name, experts in chosen.items():
            for weight_name in weight_names(experts):
                plain = getattr(experts, weight_name)
                shape = tuple(turned(experts, plain).shape)
                layout = config.layout(f"{name}.{weight_name}", shape)
                empty = QuantizedWeight.empty(
                    layout.shape, layout.format, layout.group_size, dtype=plain.dtype,
                    scale_encoding=layout.scale_encoding, device="meta",
                )  # fmt: skip
                set_quantized(experts, weight_name, empty)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.quantization_config.adopt is not None:
            adoption.finish(model, self._saved_conversions)
        record(model, self)
        peft_hook.install(model)
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Tell whether a weight that is loaded is to be quantised."""
        module_name, _, name = param_name.rpartition(".")
        experts = self._experts.get(module_name)
        return not self.pre_quantized and experts is not None and name in weight_names(experts)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Return the bytes of an element, which device_map="auto" adds up."""
        if self.param_needs_quantization(model, param_name):
            # Scales add an eighth to int4's codes, and less to those of other formats.
            return FORMATS[self.quantization_config.format].codes.bits / 8 * 1.125
        return super().param_element_size(model, param_name, param)

    def get_quantize_ops(self) -> ConversionOps:
        """Return what quantises a weight that has been loaded."""
        return _Quantize(self)

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: Any = None
    ) -> list[Any]:
        """Return how the weights of a checkpoint become those of the model.

        transformers gives the model since 5.18.
        """
        names = self._weights()
        conversions = transformers_private.anchored(weight_conversions, names)
        if self.quantization_config.adopt is None:
            return conversions
        self._saved_conversions = conversions
        return adoption.conversions(self, conversions, names)

    def _weights(self) -> list[str]:
        return [f"{name}.{w}" for name, e in self._experts.items() for w in weight_names(e)]

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        dequantize_experts_(model, dtype=dtype)
        return model

    def is_serializable(self) -> bool:
        """Return True: save_pretrained keeps the quantised weights."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return True: adapters train beside the quantised weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Return True: the model compiles into one graph."""
        return True


class _Quantize(ConversionOps):
    """Quantise a weight of experts that has been loaded, and put it where its parameter is."""

    def __init__(self, hf_quantizer: MoeOpsQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        *args: Any,
        model: Any = None,
        full_layer_name: str = "",
        missing_keys: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return nothing, since the weight is in the model already."""
        ((_, value),) = input_dict.items()
        value = value[0] if isinstance(value, list) else value
        module_name, _, name = full_layer_name.rpartition(".")
        experts = model.get_submodule(module_name)
        config = self.hf_quantizer.quantization_config
        set_quantized(experts, name, quantized(experts, value, config.format, config.group_size))
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


def register() -> None:
    """Add the quantizer to transformers' registry, if it is not there."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(MoeOpsQuantizer)
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(MoeOpsConfig)


def unregister() -> None:
    """Take the quantizer out of transformers' registry."""
    transformers_private.forget(AUTO_QUANTIZER_MAPPING, METHOD, MoeOpsQuantizer)
    transformers_private.forget(AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD, MoeOpsConfig)


def record(model: nn.Module, quantizer: MoeOpsQuantizer | None = None) -> None:
    """Have a model's config and the model itself say which of its experts are quantised.

    Args:
        model: a PreTrainedModel, or a module that holds some.
        quantizer: what loaded it, if it was loaded.
    """
    inner: set[int] = set()
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or id(module) in inner:
            continue
        inner.update(id(part) for part in module.modules())
        config, present = _describe(module), getattr(module, "hf_quantizer", None)
        if present is not None and not isinstance(present, MoeOpsQuantizer):
            logger.warning(
                "%s: %s is quantised with %s, so save_pretrained cannot keep its quantised experts; "
                "save the adapters alone",
                _FACADE, type(module).__name__, type(present).__name__,
            )  # fmt: skip
            continue
        if config is None:
            if present is not None:
                present.remove_quantization_config(module)  # type: ignore[no-untyped-call]
            continue
        own = quantizer or MoeOpsQuantizer(config, pre_quantized=True)
        own.quantization_config = config
        for attribute, value in (
            ("hf_quantizer", own),
            ("is_quantized", True),
            ("quantization_method", METHOD),
        ):
            setattr(module, attribute, value)
        module.config.quantization_config = config
        weights = [
            f"{name}.{w}"
            for name, e in experts_modules(module).items()
            for w in quantized_weights(e)
        ]
        transformers_private.keep_names(module, weights)


def _describe(model: Any) -> MoeOpsConfig | None:
    """Return the config with which from_pretrained makes experts as the model has them."""
    prefix = f"{model.base_model_prefix}."
    found = {name.removeprefix(prefix): e for name, e in experts_modules(model).items()}
    layouts = {
        f"{name}.{weight_name}": (weight.format, weight.group_size, weight.scale_encoding)
        for name, experts in found.items()
        for weight_name, weight in quantized_weights(experts).items()
    }
    if not layouts:
        return None
    format, group_size, _ = Counter(layouts.values()).most_common(1)[0][0]
    usual = layout_of(_HERE, format, (0, 0, 0), group_size)
    quantised = [name for name, experts in found.items() if quantized_weights(experts)]
    return MoeOpsConfig(
        format,
        group_size,
        modules=None if len(quantised) == len(found) else quantised,
        weights={
            name: layout
            for name, layout in layouts.items()
            if layout != (usual.format, usual.group_size, usual.scale_encoding)
        },
    )

# SPDX-License-Identifier: Apache-2.0
"""What PEFT has to learn about quantised experts: to find their weights, and not to merge into them.

PEFT looks for parameters, and takes shape, dtype and device from them. A QuantizedWeight is a module.
So while PEFT adds an adapter, parameters stand where the quantised weights are. Adapters and their
names are then those of the plain model.

PEFT names neither the search for parameters nor the check before merging as an API. peft.py wraps
the two methods BaseTuner.inject_adapter and LoraModel._check_merge_allowed for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from moe_ops.integrations.quantised_experts import experts_modules, quantized_weights, turned
from moe_ops.quantization import QuantizedWeight

if TYPE_CHECKING:
    from peft.tuners.lora import LoraModel
    from peft.tuners.lora.layer import ParamWrapper

_HERE = "moe_ops.integrations.peft"
_ADVICE = (
    "serve the adapters beside the quantised weights, or call "
    "moe_ops.integrations.transformers.dequantize_experts_(model) first"
)


@contextlib.contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """Have parameters where the quantised weights of a model are, without memory for their values.

    Such a parameter has the layout of the plain one, transposed where the module stores it so.
    """
    replaced = {id(e): (e, quantized_weights(e)) for e in experts_modules(model).values()}
    for experts, weights in replaced.values():
        for name, weight in weights.items():
            delattr(experts, name)
            setattr(experts, name, _stand_in(experts, weight))
    try:
        yield
    finally:
        for experts, weights in replaced.values():
            others = [name for name, _ in experts.named_children()]
            for name, weight in weights.items():
                delattr(experts, name)
                setattr(experts, name, weight)
            # They stood before their activation, and do so again.
            for name in others:
                child = getattr(experts, name)
                delattr(experts, name)
                setattr(experts, name, child)


def _stand_in(experts: nn.Module, weight: QuantizedWeight) -> nn.Parameter:
    one = torch.empty((), dtype=weight.dtype, device=weight.device)
    tensor = one.expand(tuple(weight.shape))
    return nn.Parameter(turned(experts, tensor), requires_grad=False)


def check_merge_allowed(original: Callable[..., None], self: LoraModel) -> None:
    """Refuse to merge adapters into quantised weights, before PEFT has merged any other.

    Raises:
        ValueError: an adapter is on a quantised weight.
    """
    from peft.tuners.lora.layer import ParamWrapper

    for module in self.model.modules():
        if isinstance(module, ParamWrapper):
            _check_plain(module)
    original(self)


def merge(self: ParamWrapper, *args: Any, **kwargs: Any) -> None:
    """Merge as PEFT's wrapper does it, but not into a quantised weight.

    Raises:
        ValueError: the weight is quantised.
    """
    _check_plain(self)
    # Its class's, since this function is an attribute of the wrapper.
    type(self).merge(self, *args, **kwargs)


def adapted_weight(wrapper: ParamWrapper) -> Any:
    """Return the weight that a wrapper adapts: a parameter, or a QuantizedWeight."""
    return getattr(wrapper.get_base_layer(), wrapper.parameter_name)


def _check_plain(wrapper: ParamWrapper) -> None:
    weight = adapted_weight(wrapper)
    if isinstance(weight, QuantizedWeight):
        raise ValueError(
            f"{_HERE}: expected plain weights to merge adapters into, got {wrapper.parameter_name} in "
            f"{weight.format}: quantising the sum would lose most of the adapters; {_ADVICE}"
        )


def refuse(reason: str) -> NoReturn:
    """Refuse to compute adapters of quantised experts in another way than beside them.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"{_HERE}: expected quantised experts whose adapters can be computed beside the weights, but "
        f"{reason}. PEFT's own path merges them in each forward, which takes plain weights; change "
        "that, or call moe_ops.integrations.transformers.dequantize_experts_(model)"
    )

# SPDX-License-Identifier: Apache-2.0
"""Experts modules are told from others, ours as those of transformers, wrapped or not."""

from types import SimpleNamespace

import pytest
from torch import nn

from moe_ops.layers import Experts, MoE, Router
from moe_ops.layers.experts_modules import base_of, experts_in, is_interface_experts, num_experts_of
from moe_ops.layers.lora import LoraExperts


class OfTransformers(nn.Module):
    """What use_experts_implementation makes of a class, as far as it is asked for."""

    has_gate, is_transposed, num_experts = True, False, 6


class Wrapper(nn.Module):
    """As PEFT's ParamWrapper, or one of its layers around a linear one."""

    def __init__(self, base_layer, **attributes):
        super().__init__()
        self.base_layer = base_layer
        self.__dict__.update(attributes)


def wrapped(experts):
    """Wrap both projections, as PEFT nests them."""
    inner = Wrapper(experts, parameter_name="gate_up_proj")
    return Wrapper(inner, parameter_name="down_proj")


@pytest.mark.parametrize(
    ("module", "num_experts"),
    [
        (Experts(4, 8, 8), 4),
        (LoraExperts(Experts(4, 8, 8), 2), 4),
        (OfTransformers(), 6),
        (wrapped(OfTransformers()), 6),
    ],
)
def test_the_outermost_is_found_once(module, num_experts):
    model = nn.ModuleDict({"experts": module, "other": nn.Linear(8, 8)})
    ((name, found),) = experts_in(model)
    assert (name, found) == ("experts", module)
    assert num_experts_of(found) == num_experts


def test_the_experts_of_a_layer_are_found():
    moe = MoE(Router(8, 4, 2), Experts(4, 8, 8))
    assert list(experts_in(nn.Sequential(moe))) == [("0.experts", moe.experts)]


@pytest.mark.parametrize("around", [nn.Linear(8, 8), Experts(4, 8, 8)])
def test_a_wrapper_of_no_parameter_is_not_looked_into(around):
    """PEFT's layers around nn.Linear have a base_layer too."""
    module = Wrapper(around)
    assert base_of(module) is module
    assert [name for name, _ in experts_in(module)] == ["base_layer"] * isinstance(around, Experts)


def test_half_of_what_transformers_writes_is_not_enough():
    assert is_interface_experts(OfTransformers())
    assert not is_interface_experts(SimpleNamespace(is_transposed=False))  # type: ignore[arg-type]

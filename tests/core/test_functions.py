# SPDX-License-Identifier: Apache-2.0
"""The Python functions of the package have the signatures and texts of their ops' schemas."""

import inspect
import re
from typing import get_args, get_origin

import pytest
import torch

import moe_ops
from moe_ops._core import reference
from moe_ops._core.library import SCHEMAS
from moe_ops._core.schema import DTYPES, FLOAT64_DEVICES
from testing import checks
from testing.strategies import seeded_sample

# Autograd calls these, users do not.
INNER_OPS = {
    "topk_routing_backward",
    "unpermute_backward",
    "grouped_gemm_dx",
    "grouped_gemm_dw",
    "fused_experts_forward",
    "fused_experts_down_backward",
    "fused_experts_up_backward",
    "ep_dispatch_backward",
    "ep_combine_backward",
}
# QuantizedWeight's dequantize() calls the first. The functions grouped_gemm and fused_experts call
# the others for a QuantizedWeight, and their gradients the rest.
INNER_OPS |= {
    "dequantize_weight", "grouped_gemm_quantized", "grouped_gemm_quantized_dx",
    "fused_experts_quantized", "fused_experts_quantized_forward",
    "fused_experts_quantized_down_backward", "fused_experts_quantized_up_backward",
}  # fmt: skip
# moe_ops.layers.lora calls the first of each three.
INNER_OPS |= {
    "fused_experts_lora", "fused_experts_lora_forward", "fused_experts_lora_backward",
    "fused_experts_lora_quantized", "fused_experts_lora_quantized_forward",
    "fused_experts_lora_quantized_backward",
}  # fmt: skip
# Weights that functions take in either form. torch.ops.moe takes tensors alone.
QUANTISABLE = {("grouped_gemm", "weight"), ("fused_experts", "gate_up_proj"),
               ("fused_experts", "down_proj")}  # fmt: skip
PUBLIC = sorted(set(SCHEMAS) - INNER_OPS)
ANNOTATIONS = {
    "Tensor": torch.Tensor,
    "Optional[Tensor]": torch.Tensor | None,
    "int": int,
    "SymInt": int,
    "bool": bool,
    "float": float,
    "Optional[float]": float | None,
    "str": str,
    "Optional[str]": str | None,
}
public_functions = pytest.mark.parametrize("name", PUBLIC)


def test_every_op_is_known():
    assert set(SCHEMAS) == INNER_OPS | set(PUBLIC)
    others = {
        "dequantize_fp8",
        "quantize_fp8",
        "QuantizedWeight",
        "quantize_weight",
        "KernelConfigBackward_dW",
        "KernelConfigBackward_dX",
        "KernelConfigForward",
        "kernel_config",
        "tune",
    }
    assert set(moe_ops.__all__) == set(PUBLIC) | others


@public_functions
def test_signature_equals_the_schema(name):
    function, schema = getattr(moe_ops, name), getattr(torch.ops.moe, name).default._schema
    signature = inspect.signature(function, eval_str=True)
    assert list(signature.parameters) == [argument.name for argument in schema.arguments]
    for argument in schema.arguments:
        parameter = signature.parameters[argument.name]
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert not argument.kwarg_only
        default = argument.default_value if argument.has_default_value() else parameter.empty
        assert parameter.default == default, argument.name
        annotation = ANNOTATIONS[str(argument.type)]
        if (name, argument.name) in QUANTISABLE:
            annotation |= moe_ops.QuantizedWeight
        assert parameter.annotation == annotation, argument.name
    returned = signature.return_annotation
    if len(schema.returns) == 1:
        assert returned is torch.Tensor
    else:
        assert get_origin(returned) is tuple
        assert get_args(returned) == (torch.Tensor,) * len(schema.returns)


@public_functions
def test_is_the_same_op(name):
    sample = seeded_sample(SCHEMAS[name], 0, T=5, dtype=torch.float32)
    for got, want in zip(
        checks.as_tuple(getattr(moe_ops, name)(**sample.arguments)),
        checks.as_tuple(sample()),
        strict=True,
    ):
        assert torch.equal(got, want)


@public_functions
def test_docstring(name):
    text = inspect.getdoc(getattr(moe_ops, name))
    assert text is not None
    first, blank = text.splitlines()[:2]
    assert first.endswith(".")
    assert blank == ""
    positions = [text.index(f"\n{title}:") for title in ("Args", "Returns", "Raises", "Source")]
    assert positions == sorted(positions)
    for letter, meaning in SCHEMAS[name].dims.items():
        assert f"{letter} {meaning}" in text, "the legend of the letters"
    args = text[positions[0] : positions[1]]
    for argument in SCHEMAS[name].arguments:
        assert f"    {argument.name} (" in args or f"    {argument.name}:" in args, argument.name
        if argument.is_tensor:
            line = next(row for row in args.splitlines() if row.strip().startswith(argument.name))
            for expr in argument.shape:
                assert expr.text in line, f"{argument.name}: its shape"
    returns = text[positions[1] : positions[2]]
    for output in SCHEMAS[name].outputs:
        assert output.name in returns
    assert "ValueError" in text
    assert "TypeError" in text
    assert "ifferentiable" in text
    assert "eterminis" in text


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_reference_says_what_floating_is(name):
    """The texts name the very dtypes that the generated checks take."""
    schema = SCHEMAS[name]
    floating = any(argument.dtype == "floating" for argument in schema.tensors)
    for text in (reference.docstring(schema), reference.page(schema)):
        found = re.findall(r"^Floating: ([^;]*); (\w+) on (\w+)\.$", text, re.MULTILINE)
        assert len(found) == floating
        for anywhere, narrow, device in found:
            assert {*anywhere.split(", "), narrow} == set(DTYPES["floating"])
            assert (narrow, device.lower()) == ("float64", FLOAT64_DEVICES[0])


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_reference_says_what_is_expected(name):
    for text in (reference.docstring(SCHEMAS[name]), reference.page(SCHEMAS[name])):
        words = " ".join(text.split())
        for where in SCHEMAS[name].where:
            assert f"Expected `{where.expect.text}`: {where.because}." in words
        assert "Not `" not in words

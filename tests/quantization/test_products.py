# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm and fused_experts take a QuantizedWeight wherever they take a weight.

tests/ops/test_every_op.py holds the ops underneath against the oracle.
"""

import re
from typing import Any

import pytest
import torch

import moe_ops
from moe_ops import QuantizedWeight, quantize_weight
from moe_ops.quantization.formats import FORMATS
from testing import checks, oracle
from testing.quantized_problem import (
    HIDDEN,
    INTERMEDIATE,
    NUM_EXPERTS,
    make_experts,
    make_weights,
    values_of,
)

formats = pytest.mark.parametrize("format", FORMATS)
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
COUNTS = torch.tensor([3, 0, 5, 1])


@formats
@dtypes
@pytest.mark.parametrize("weights_before", [False, True])
@pytest.mark.parametrize("recompute", ["none", "pre_activation"])
def test_experts_equal_those_with_plain_weights(format, dtype, weights_before, recompute):
    """The two call the same products, so they agree bit for bit."""
    options = {"weights_before": weights_before, "recompute": recompute}
    experts = make_experts(format, dtype, **options)
    with checks.poisoned_memory():
        found = experts.gradients()
    for got, want in zip(found, experts.gradients(plain=True), strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@formats
def test_experts_match_the_oracle(format):
    experts = make_experts(format)
    output, *found = experts.gradients()
    tangent = torch.linspace(-1, 1, output.numel()).view(output.shape)
    weights = {
        "gate_up_proj": values_of(experts.gate_up_proj, torch.float64),
        "down_proj": values_of(experts.down_proj, torch.float64),
    }
    arguments = {**experts.leaves, **weights, **experts.others}
    expected = oracle.gradients(oracle.fused_experts, arguments, list(experts.leaves), tangent)
    checks.assert_close(output, oracle.fused_experts(**arguments))
    for got, (name, want) in zip(found, expected.items(), strict=True):
        checks.assert_close(got, want, what=name)


@pytest.mark.parametrize("down_format", FORMATS)
def test_the_two_weights_may_differ_in_format(down_format):
    experts = make_experts("nf4", down_format=down_format, bias=False)
    for got, want in zip(experts.gradients(), experts.gradients(plain=True), strict=True):
        assert torch.equal(got, want)


NEEDED = ["hidden_states", "topk_weights", "gate_up_bias", "down_bias"]


@pytest.mark.parametrize("needed", [*NEEDED, *[None]])
@pytest.mark.parametrize("weights_before", [False, True])
@pytest.mark.parametrize("recompute", ["none", "pre_activation"])
def test_gradients_that_are_not_needed_change_nothing(needed, weights_before, recompute):
    options = {"weights_before": weights_before, "recompute": recompute}
    everything = make_experts("nf4", **options).gradients()
    experts = make_experts("nf4", **options)
    for name, leaf in experts.leaves.items():
        leaf.requires_grad_(name == needed)
    output = experts()
    assert torch.equal(output, everything[0])
    assert output.requires_grad == (needed is not None)
    if needed is not None:
        tangent = torch.linspace(-1, 1, output.numel()).view(output.shape)
        (found,) = torch.autograd.grad(output, experts.leaves[needed], tangent)
        assert torch.equal(found, everything[1 + NEEDED.index(needed)])


@formats
@dtypes
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("permute", ["permute_x", "permute_y"])
def test_grouped_gemm_equals_that_with_plain_weights(format, dtype, bias, permute):
    weight, _ = make_weights(format)
    num_rows = int(COUNTS.sum())
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(num_rows, HIDDEN, generator=generator).to(dtype)
    options: dict[str, Any] = {
        "gather_indices": torch.randperm(num_rows, generator=generator),
        "topk_weights": torch.rand(num_rows, 1, generator=generator),
        "bias": torch.randn(NUM_EXPERTS, 2 * INTERMEDIATE, generator=generator).to(dtype),
        permute: True,
    }
    if not bias:
        del options["bias"]
    found = []
    for given in (weight, values_of(weight, dtype)):
        leaves = [input.clone().requires_grad_()]
        for name in ("topk_weights", "bias"):
            if name in options:
                options[name] = options[name].detach().clone().requires_grad_()
                leaves.append(options[name])
        output = moe_ops.grouped_gemm(leaves[0], given, COUNTS, **options)
        found.append([output, *torch.autograd.grad(output.float().square().sum(), leaves)])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("needed", ["input", "bias"])
def test_grouped_gemm_gives_one_gradient_alone(needed):
    weight, _ = make_weights("mxfp4")
    rows = {
        "input": torch.randn(9, HIDDEN),
        "bias": torch.randn(NUM_EXPERTS, 2 * INTERMEDIATE),
    }
    rows[needed].requires_grad_()
    found = []
    for given in (weight, weight.dequantize()):
        output = moe_ops.grouped_gemm(rows["input"], given, COUNTS, bias=rows["bias"])
        found.append(torch.autograd.grad(output.square().sum(), rows[needed])[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_the_rows_and_biases_alone(dtype):
    experts = make_experts("int4")
    with torch.autocast("cpu", dtype):
        output, *found = experts.gradients()
    assert output.dtype == dtype
    assert [gradient.dtype for gradient in found] == [torch.float32] * 4
    for name in ("hidden_states", "gate_up_bias", "down_bias"):
        experts.leaves[name] = experts.leaves[name].detach().to(dtype).requires_grad_()
    assert torch.equal(output, experts())


def test_without_rows_and_without_experts_rows():
    for num_tokens in (0, 1):
        experts = make_experts("nf4", num_tokens=num_tokens)
        for got, want in zip(experts.gradients(), experts.gradients(plain=True), strict=True):
            assert torch.equal(got, want)


def test_on_meta_tensors():
    experts = make_experts("nf4")
    meta = make_experts("nf4")
    meta.gate_up_proj.to("meta")
    meta.down_proj.to("meta")
    leaves = {name: leaf.detach().to("meta") for name, leaf in meta.leaves.items()}
    others = {"topk_ids": meta.others["topk_ids"].to("meta")}
    output = moe_ops.fused_experts(
        gate_up_proj=meta.gate_up_proj, down_proj=meta.down_proj, **leaves, **others
    )
    assert output.is_meta
    assert output.shape == experts().shape


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("recorded", [False, True])
def test_refuses_one_plain_weight_beside_a_quantised_one(name, recorded):
    experts = make_experts("nf4", bias=False)
    for leaf in experts.leaves.values():
        leaf.requires_grad_(recorded)
    weights: dict[str, Any] = {
        "gate_up_proj": experts.gate_up_proj, "down_proj": experts.down_proj
    }  # fmt: skip
    weights[name] = weights[name].dequantize()
    expected = (
        f"^moe::fused_experts: expected {name} to be a moe_ops.QuantizedWeight, since the other "
        r"weight is one, got Tensor; quantise it .*, or pass the other weight's \.dequantize\(\)$"
    )
    with pytest.raises(TypeError, match=expected):
        moe_ops.fused_experts(**weights, **experts.leaves, **experts.others)


@formats
def test_refuses_another_width(format):
    """A row that is padded to whole blocks does not show its width to the op."""
    weight = quantize_weight(torch.ones(NUM_EXPERTS, 6, 69), format)
    rows = torch.ones(9, 70)
    expected = r"^moe::grouped_gemm: expected weight.shape\[2\] == input.shape\[1\] \(70\), got 69$"
    with pytest.raises(ValueError, match=expected):
        moe_ops.grouped_gemm(rows, weight, COUNTS)
    experts = make_experts(format, bias=False)
    experts.leaves["hidden_states"] = torch.ones(9, 69)
    expected = (
        r"^moe::fused_experts: expected gate_up_proj.shape\[2\] == hidden_states.shape\[1\] \(69\), "
        "got 70$"
    )
    with pytest.raises(ValueError, match=expected):
        experts()
    experts = make_experts(format, bias=False, gated=False)
    expected = r"^moe::fused_experts: expected down_proj.shape\[2\] == gate_up_proj.shape\[1\] \(80\), got 40$"
    with pytest.raises(ValueError, match=expected):
        experts()


def test_refuses_rows_of_another_rank():
    weight, _ = make_weights("nf4")
    for rows in (torch.ones(()), torch.ones(HIDDEN), torch.ones(2, 9, HIDDEN)):
        with pytest.raises(
            ValueError, match=r"^moe::grouped_gemm_quantized: expected input.dim\(\) =="
        ):
            moe_ops.grouped_gemm(rows, weight, COUNTS)
        experts = make_experts("nf4", bias=False)
        experts.leaves["hidden_states"] = rows
        with pytest.raises(ValueError, match=r": expected hidden_states.dim\(\) == 2 "):
            experts()


def test_refuses_what_is_no_tensor():
    weight, _ = make_weights("nf4")
    gemm: Any = moe_ops.grouped_gemm
    with pytest.raises(TypeError, match=r"expected input to be a tensor, got None$"):
        gemm(None, weight, COUNTS)
    experts = make_experts("nf4", bias=False)
    leaves: dict[str, Any] = {**experts.leaves, "hidden_states": None}
    weights = {"gate_up_proj": experts.gate_up_proj, "down_proj": experts.down_proj}
    with pytest.raises(TypeError, match=r"expected hidden_states to be a tensor, got None$"):
        moe_ops.fused_experts(**weights, **leaves, **experts.others)


def test_refuses_another_number_of_experts_or_rows():
    experts = make_experts("nf4", bias=False)
    experts.down_proj = experts.down_proj[:3]
    expected = r"expected down_proj.shape\[0\] == gate_up_proj.shape\[0\] \(4\), got 3$"
    with pytest.raises(ValueError, match=expected):
        experts()
    weight, _ = make_weights("nf4")
    with pytest.raises(
        ValueError, match=r"token_counts.shape\[0\] == weight.shape\[0\] \(4\), got 3$"
    ):
        moe_ops.grouped_gemm(torch.ones(9, HIDDEN), weight, COUNTS[:3])


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"gate_up_bias": (4, 79)}, "gate_up_bias.shape[1] == gate_up_proj.shape[1] (80), got 79"),
        ({"gate_up_bias": (5, 80)}, "gate_up_bias.shape[0] == gate_up_proj.shape[0] (4), got 5"),
        ({"down_bias": (5, 70)}, "down_bias.shape[0] == gate_up_proj.shape[0] (4), got 5"),
        ({"gate_up_proj": (4, 79, 70)}, "gate_up_proj.shape[1] to be a multiple of 2, got 79"),
        ({"down_proj": (4, 71, 40)}, "down_proj.shape[1] == hidden_states.shape[1] (70), got 71"),
    ],
)
def test_errors_name_what_the_caller_passed(changed, expected):
    """Not the stored tensors that the op gets."""
    experts = make_experts("nf4")
    weights: dict[str, Any] = {
        "gate_up_proj": experts.gate_up_proj, "down_proj": experts.down_proj
    }  # fmt: skip
    for name, shape in changed.items():
        if name in weights:
            weights[name] = quantize_weight(torch.ones(shape), "nf4")
        else:
            experts.leaves[name] = torch.ones(shape)
    with pytest.raises(ValueError, match=re.escape(expected) + "$"):
        moe_ops.fused_experts(**weights, **experts.leaves, **experts.others)


def test_a_weight_on_another_device_is_named():
    weight, _ = make_weights("nf4")
    expected = r"expected weight.device == input.device \(meta\), got cpu$"
    with pytest.raises(ValueError, match=expected):
        moe_ops.grouped_gemm(torch.ones(9, HIDDEN, device="meta"), weight, COUNTS.to("meta"))


@pytest.mark.parametrize(
    ("name", "value", "error", "expected"),
    [
        ("format", "nf5", ValueError, "format in ('fp8_block', 'nf4', 'mxfp4', 'int4'), got 'nf5'"),
        ("group_size", 48, ValueError, "group_size in (32, 64, 128), got 48"),
        (
            "scale_encoding", "float16", ValueError,
            "scale_encoding in ('float32', 'bfloat16', 'e8m0', 'nested'), got 'float16'",
        ),
        ("in_features", -1, ValueError, "in_features >= 0, got -1"),
        ("in_features", 129, ValueError, "codes.shape[2] == "),
        ("in_features", 60, ValueError, "codes.shape[2] == "),
        ("output_dtype", torch.int8, TypeError, "output_dtype in (bfloat16, float16, float32, float64)"),
        ("codes", torch.zeros(2, 3, 64), TypeError, "codes.dtype in (uint8), got float32; moe_ops.qua"),
        ("codes", torch.zeros(2, 3, 63).byte(), ValueError, "codes.shape[2] == "),
        ("codes", torch.zeros(2, 192).byte(), ValueError, "codes.dim() == 3 (num_experts, "),
        ("scale", torch.zeros(2, 3, 1).byte(), ValueError, "scale.shape[2] == "),
        ("scale", torch.zeros(2, 3, 2), TypeError, "scale.dtype in (uint8), got float32"),
        ("nested_scale", None, ValueError, "(nested_scale is None) == (nested_offset is None) (nested"),
        ("nested_scale", torch.zeros(2, 8).byte(), ValueError, "nested_scale.shape[1] == "),
        ("nested_offset", torch.zeros(2, 2).byte(), ValueError, "nested_offset.shape[1] == 4 (4), got"),
    ],
)  # fmt: skip
def test_dequantize_weight_rejects(name, value, error, expected):
    weight = quantize_weight(torch.ones(2, 3, 128), "nf4")
    names = [a.name for a in torch.ops.moe.dequantize_weight.default._schema.arguments]
    arguments = dict(zip(names, (*weight.stored, 128, torch.bfloat16), strict=True))
    detached = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    checks.assert_rejects(
        error, (f"moe::dequantize_weight: expected {expected}",),
        torch.ops.moe.dequantize_weight, {**detached, name: value},
    )  # fmt: skip


def test_scales_and_their_encoding_go_together():
    weight = quantize_weight(torch.ones(2, 3, 128), "nf4")
    codes, scale, nested_scale, nested_offset, *_ = weight.stored
    with pytest.raises(
        ValueError, match=r"\(nested_scale is not None\) == \(scale_encoding == 'ne"
    ):
        torch.ops.moe.dequantize_weight(
            codes, scale, nested_scale, nested_offset, "nf4", 64, "e8m0", 128, torch.float32
        )


def test_a_gradient_of_the_weight_is_refused():
    weight, _ = make_weights("nf4")
    expected = r"expected requires_grad to be False, .*; train LoRA adapters .*\.dequantize\(\)$"
    with pytest.raises(ValueError, match=expected):
        weight.requires_grad_(True)


def test_double_backward_is_refused():
    experts = make_experts("nf4", bias=False)
    leaves = list(experts.leaves.values())
    output = experts()
    gradients = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no gradient of its own"):
        torch.autograd.grad(gradients[0].sum(), leaves)


def test_special_values_propagate():
    """A NaN of a scale stays in its expert: values are not checked."""
    weight = torch.ones(NUM_EXPERTS, 6, HIDDEN)
    weight[2, 0, 0] = float("nan")
    quantised: QuantizedWeight = quantize_weight(weight, "mxfp4")
    output = moe_ops.grouped_gemm(torch.ones(9, HIDDEN), quantised, COUNTS)
    assert output[3:8, 0].isnan().all()
    assert output[:3].isfinite().all()
    assert output[8:].isfinite().all()


def test_the_ops_know_the_formats():
    """A fifth format is a file, its name in formats/__init__.py, and in the choices of one schema."""
    schema = moe_ops._core.library.SCHEMAS["dequantize_weight"]
    assert schema.argument("format").choices == tuple(FORMATS)
    assert set(schema.argument("scale_encoding").choices) == set(moe_ops.quantization.scales.SCALES)
    sizes = {size for declared in FORMATS.values() for size in declared.group_sizes}
    assert set(schema.argument("group_size").choices) == sizes
    names = {name for name in moe_ops._core.library.SCHEMAS if "quantized" in name}
    assert names == {
        "grouped_gemm_quantized", "grouped_gemm_quantized_dx", "fused_experts_quantized",
        "fused_experts_quantized_forward", "fused_experts_quantized_down_backward",
        "fused_experts_quantized_up_backward", "fused_experts_lora_quantized",
        "fused_experts_lora_quantized_forward", "fused_experts_lora_quantized_backward",
    }  # fmt: skip

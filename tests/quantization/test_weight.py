# SPDX-License-Identifier: Apache-2.0
"""A quantised weight survives what happens to a module: casts, copies, saving and loading."""

import copy
import io
import json
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from moe_ops import QuantizedWeight, quantize_weight
from moe_ops.quantization.formats import FORMATS

# No block divides the width, and nf4's expert has two nested scales.
SHAPE = (4, 130, 150)
# Every format with every encoding of its scales.
KINDS = [(name, scale.name) for name, declared in FORMATS.items() for scale in declared.scales]
kinds = pytest.mark.parametrize(("format", "encoding"), KINDS)


def make(format, encoding, dtype=torch.float32):
    """Return a weight of any bits, but without NaN, which does not equal itself."""
    weight = QuantizedWeight.empty(SHAPE, format, scale_encoding=encoding, dtype=dtype)
    made = quantize_weight(torch.randn(SHAPE), format)
    for name, parameter in weight.named_parameters():
        if made.scale_encoding == encoding or name == "codes":
            parameter.copy_(getattr(made, name))
        elif encoding == "float32":
            parameter.view(torch.float32).uniform_()
        else:
            parameter.random_(120, 130)
    assert weight.dequantize().isfinite().all()
    return weight


def check_same(actual, expected, dtype=None):
    """Check that two weights have the same bytes and say the same of them."""
    assert type(actual) is QuantizedWeight
    assert actual.packed.layout == expected.packed.layout
    assert actual.shape == SHAPE
    assert isinstance(actual.shape, torch.Size)
    assert actual.dtype == (dtype or expected.dtype)
    names = dict(expected.named_parameters())
    assert list(dict(actual.named_parameters())) == list(names)
    for name, theirs in names.items():
        mine = getattr(actual, name)
        assert type(mine) is nn.Parameter
        assert not mine.requires_grad
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
    assert torch.equal(actual.dequantize(), expected.dequantize().to(actual.dtype))


class Model(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.down_proj = weight


@kinds
def test_attributes(format, encoding):
    weight = make(format, encoding, torch.bfloat16)
    assert (weight.format, weight.scale_encoding) == (format, encoding)
    assert (weight.shape, weight.ndim, weight.dtype) == (SHAPE, 3, torch.bfloat16)
    assert weight.group_size == {"fp8_block": 128, "nf4": 64}.get(format, 32)
    assert weight.device == torch.device("cpu")
    assert not weight.requires_grad
    assert weight.nbytes == sum(p.numel() * p.element_size() for p in weight.parameters())
    assert all(len(parameter) == SHAPE[0] for parameter in weight.parameters())
    assert {parameter.dtype for parameter in weight.parameters()} == {torch.uint8}
    assert f"{format}, shape=(4, 130, 150)" in repr(weight)


def test_bytes_of_the_docstring():
    weight = torch.randn(1, 1024, 2048)
    for format, group_size, expected in (
        ("fp8_block", None, 8.002), ("nf4", None, 4.127), ("mxfp4", None, 4.25),
        ("int4", None, 4.5), ("int4", 128, 4.125),
    ):  # fmt: skip
        bits = 8 * quantize_weight(weight, format, group_size).nbytes / weight.numel()
        assert bits == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_is_the_source_s(dtype):
    source = nn.Parameter(torch.randn(2, 3, 32, dtype=dtype))
    weight = quantize_weight(source, "int4")
    assert weight.dtype == weight.dequantize().dtype == dtype
    assert not weight.dequantize().requires_grad
    exact = weight.dequantize(torch.float64)
    assert exact.dtype == torch.float64
    assert torch.equal(exact.to(dtype), weight.dequantize())


CASTS = {
    "to_bfloat16": lambda module: module.to(torch.bfloat16),
    "to_float64": lambda module: module.to(torch.float64),
    "bfloat16": nn.Module.bfloat16,
    "half": nn.Module.half,
    "float": nn.Module.float,
    "double": nn.Module.double,
    "to_device_and_dtype": lambda module: module.to("cpu", torch.float16),
}


@kinds
@pytest.mark.parametrize("cast", CASTS)
def test_casts_change_nothing(format, encoding, cast):
    weight = make(format, encoding)
    expected = copy.deepcopy(weight)
    check_same(CASTS[cast](Model(weight)).down_proj, expected)


def test_prepared_for_training_by_peft():
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    weight = make("nf4", "nested")
    expected = copy.deepcopy(weight)
    model = Model(weight).bfloat16()
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert model.linear.weight.dtype == torch.float32
    check_same(model.down_proj, expected)


@kinds
def test_copies(format, encoding):
    weight = make(format, encoding)
    for copied in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        check_same(copied, weight)
        assert copied.codes.data_ptr() != weight.codes.data_ptr()


def through_torch(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_safetensors(state):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    return safetensors.load(safetensors.save(state))


SAVES = {"as_it_is": dict, "torch": through_torch, "safetensors": through_safetensors}


@kinds
@pytest.mark.parametrize("save", SAVES)
def test_state_dict(format, encoding, save):
    weight = make(format, encoding)
    state = SAVES[save](Model(weight).state_dict())
    # One that says another dtype loads it, in place and on the meta device.
    other = QuantizedWeight.empty(SHAPE, format, scale_encoding=encoding, dtype=torch.bfloat16)
    model = Model(other)
    model.load_state_dict(state)
    check_same(model.down_proj, weight)
    with torch.device("meta"):
        model = Model(QuantizedWeight.empty(SHAPE, format, scale_encoding=encoding))
    assert model.down_proj.device.type == "meta"
    model.load_state_dict(state, assign=True)
    check_same(model.down_proj, weight)
    assert model.down_proj.codes.data_ptr() == state["down_proj.codes"].data_ptr()
    # The state alone says what it is.
    check_same(QuantizedWeight.from_state_dict(state, "down_proj."), weight)


@kinds
def test_a_file_that_aligns_no_number(format, encoding, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    # The description has a length of its own, and fp8_block's codes have 15 bytes.
    weight = QuantizedWeight.empty((1, 3, 5), format, scale_encoding=encoding)
    for parameter in weight.parameters():
        parameter.random_(1, 100)
    safetensors.save_file(weight.state_dict(), tmp_path / "weight.safetensors")
    loaded = QuantizedWeight.from_state_dict(safetensors.load_file(tmp_path / "weight.safetensors"))
    torch.testing.assert_close(
        loaded.dequantize(), weight.dequantize(), rtol=0, atol=0, equal_nan=True
    )


@kinds
def test_to_empty(format, encoding):
    weight = make(format, encoding)
    with torch.device("meta"):
        other = QuantizedWeight.empty(SHAPE, format, scale_encoding=encoding)
    other.to_empty(device="cpu")
    assert other.device.type == "cpu"
    other.load_state_dict(weight.state_dict())
    check_same(other, weight)


@kinds
def test_to_another_device(format, encoding):
    weight = make(format, encoding).to("meta")
    assert weight.device.type == "meta"
    assert weight.dequantize().device.type == "meta"
    expected = QuantizedWeight.empty(SHAPE, format, scale_encoding=encoding)
    assert weight.packed.layout == expected.packed.layout


@pytest.mark.parametrize("format", FORMATS)
def test_quantize_weight_on_meta(format):
    made = quantize_weight(torch.empty(SHAPE, device="meta", dtype=torch.float16), format)
    expected = quantize_weight(torch.randn(SHAPE), format)
    assert made.device.type == "meta"
    assert made.packed.layout == expected.packed.layout
    assert made.dtype == torch.float16
    for mine, theirs in zip(made.parameters(), expected.parameters(), strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)


def load_errors(weight, state):
    with pytest.raises(RuntimeError) as caught:
        Model(weight).load_state_dict(state)
    return str(caught.value)


def test_refuses_a_state_of_another_weight():
    nested, plain = make("nf4", "nested"), make("nf4", "float32")
    before = plain.scale.clone()
    text = load_errors(plain, Model(nested).state_dict())
    assert "down_proj: expected a state of Layout(format='nf4'" in text
    assert "scale_encoding='nested'" in text
    assert torch.equal(plain.scale, before)
    assert "group_size=128" in load_errors(
        make("int4", "bfloat16"),
        Model(quantize_weight(torch.randn(SHAPE), "int4", 128)).state_dict(),
    )
    assert "format='int4'" in load_errors(
        make("mxfp4", "e8m0"), Model(make("int4", "float32")).state_dict()
    )


def test_refuses_a_state_that_was_cast():
    weight = make("int4", "bfloat16")
    state = {k: v.bfloat16() if "scale" in k else v for k, v in Model(weight).state_dict().items()}
    assert "expected down_proj.scale.dtype == uint8, got bfloat16" in load_errors(weight, state)


def test_refuses_a_state_without_a_tensor():
    weight = make("int4", "bfloat16")
    state = Model(weight).state_dict()
    del state["down_proj.scale"]
    assert 'Missing key(s) in state_dict: "down_proj.scale"' in load_errors(weight, state)
    with pytest.raises(RuntimeError, match="Missing key"):
        QuantizedWeight.from_state_dict(state, "down_proj.")
    del state["down_proj._extra_state"]
    with pytest.raises(
        ValueError, match=r"expected state to have down_proj\._extra_state, got lin"
    ):
        QuantizedWeight.from_state_dict(state, "down_proj.")


@kinds
def test_slices_of_experts(format, encoding):
    weight = make(format, encoding)
    whole = weight.dequantize()
    for experts in (
        slice(1, 3),
        slice(None),
        slice(3, 9),
        slice(-1, None),
        slice(2, 2),
        slice(0, 4, 2),
    ):
        part = weight[experts]
        assert type(part) is QuantizedWeight
        assert part.shape == whole[experts].shape
        assert part.dtype == weight.dtype
        assert torch.equal(part.dequantize(), whole[experts])
        assert all(p.is_contiguous() and not p.requires_grad for p in part.parameters())
    assert weight[1:3].codes.data_ptr() == weight.codes[1].data_ptr()


@pytest.mark.parametrize("index", [0, None, (slice(1), slice(2)), torch.tensor([0])], ids=str)
def test_refuses_other_indices(index):
    with pytest.raises(
        TypeError, match=r"^moe_ops.QuantizedWeight: expected a slice of experts as index"
    ):
        make("int4", "bfloat16")[index]


def test_refuses_a_gradient():
    weight = make("mxfp4", "e8m0")
    text = (
        "moe_ops.QuantizedWeight.requires_grad_: expected requires_grad to be False, since a "
        "quantised weight has no gradient, got True; train LoRA adapters beside it "
        "(moe_ops.layers.lora), or a parameter made of its .dequantize()"
    )
    with pytest.raises(ValueError, match="expected requires_grad") as caught:
        weight.requires_grad_()
    assert str(caught.value) == text
    with pytest.raises(ValueError, match="expected requires_grad"):
        weight.requires_grad = True
    assert weight.requires_grad_(False) is weight
    weight.requires_grad = False
    assert Model(weight).requires_grad_(False).down_proj is weight
    # The parameters themselves cannot have one.
    with pytest.raises(RuntimeError, match="floating point"):
        Model(weight).requires_grad_(True)
    model = Model(weight)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    assert model.linear.weight.requires_grad
    assert not model.down_proj.codes.requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((torch.ones(2, 3), "nf4"), ValueError, "expected weight.dim() == 3, got 2 (2, 3)"),
        (
            (torch.ones(2, 3, 4, dtype=torch.int32), "nf4"),
            TypeError,
            "expected weight.dtype in (bfloat16, float16, float32, float64), got int32",
        ),
        (
            (torch.ones(2, 3, 4).to(torch.float8_e4m3fn), "nf4"),
            TypeError,
            "expected weight.dtype in (bfloat16, float16, float32, float64), got float8_e4m3fn",
        ),
        (
            (torch.ones(2, 3, 4), "fp4"),
            ValueError,
            "expected format to be one of fp8_block, nf4, mxfp4, int4, got 'fp4'",
        ),
        (
            (torch.ones(2, 3, 4), "int4", 64),
            ValueError,
            "expected group_size of int4 to be 32 or 128, got 64",
        ),
        (
            (torch.ones(2, 3, 4), "nf4", 128),
            ValueError,
            "expected group_size of nf4 to be 64, got 128",
        ),
        (
            (torch.ones(2, 3, 4), "nf4", 0),
            ValueError,
            "expected group_size of nf4 to be 64, got 0",
        ),
        (
            (torch.ones(2, 3, 4), "int4", 32.0),
            ValueError,
            "expected group_size of int4 to be 32 or 128, got 32.0",
        ),
        ((None, "nf4"), TypeError, "expected weight to be a tensor, got None"),
        (([[[1.0]]], "nf4"), TypeError, "expected weight to be a tensor, got list"),
        (
            (torch.ones(2, 3, 4).to_sparse(), "nf4"),
            TypeError,
            "expected weight to be a dense tensor, got layout torch.sparse_coo",
        ),
        (
            (quantize_weight(torch.ones(1, 1, 1), "int4"), "nf4"),
            TypeError,
            ("expected weight to be a tensor, got QuantizedWeight; pass its .dequantize() to quantise it "
            "anew"),
        ),
        (
            (torch.ones(2, 3, 4), None),
            ValueError,
            "expected format to be one of fp8_block, nf4, mxfp4, int4, got None",
        ),
        (
            (torch.ones(2, 3, 4), ["nf4"]),
            ValueError,
            "expected format to be one of fp8_block, nf4, mxfp4, int4, got ['nf4']",
        ),
    ],
    ids=[
        "dim", "int32", "float8", "format", "group_size", "only_group_size", "zero", "float",
        "none", "list", "sparse", "quantised", "no_format", "formats",
    ],
)  # fmt: skip
def test_bad_input(arguments, error, text):
    with pytest.raises(error) as caught:
        quantize_weight(*arguments)
    assert type(caught.value) is error
    assert str(caught.value) == f"moe_ops.quantize_weight: {text}"


def test_bad_input_of_empty():
    at = r"^moe_ops.QuantizedWeight.empty: expected "
    with pytest.raises(ValueError, match=at + r"shape to be \(num_experts, .*\), got \(2, 3\)$"):
        QuantizedWeight.empty((2, 3), "nf4")
    with pytest.raises(ValueError, match=at + "scale_encoding of int4 to be bfloat16 or float32"):
        QuantizedWeight.empty((2, 3, 4), "int4", scale_encoding="e8m0")
    with pytest.raises(
        TypeError, match=r"^moe_ops.QuantizedWeight: expected dtype in .*, got int8$"
    ):
        QuantizedWeight.empty((2, 3, 4), "int4", dtype=torch.int8)


SIZES = "(num_experts, out_features, in_features)"
# What mypy does not know of, since the calls are wrong.
WEIGHT: Any = QuantizedWeight


def described(**changed):
    """Return the state of a weight, whose description says something else."""
    state = quantize_weight(torch.ones(1, 2, 64), "nf4").state_dict()
    description = json.loads(bytes(state["_extra_state"].tolist()))
    text = json.dumps({**description, **changed}).encode()
    return {**state, "_extra_state": torch.tensor(list(text), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: WEIGHT.empty(None, "nf4"), TypeError, f".empty: expected shape to be {SIZES}, got None"),
        (lambda: WEIGHT.empty("abc", "nf4"), TypeError, f".empty: expected shape to be {SIZES}, got 'abc'"),
        (
            lambda: WEIGHT.empty((2, 3.0, 4), "nf4"), TypeError,
            f".empty: expected shape to be {SIZES}, got (2, 3.0, 4)",
        ),
        (
            lambda: WEIGHT.empty((2, 3, 4), "nf4", dtype="bf16"), TypeError,
            ": expected dtype in (bfloat16, float16, float32, float64), got 'bf16'",
        ),
        (
            lambda: WEIGHT(torch.ones(2, 3, 4)), TypeError,
            (": expected weight to be what .packed of a quantised weight is, got Tensor; call "
            "moe_ops.quantize_weight, or a from_ method"),
        ),
        (
            lambda: WEIGHT.from_state_dict(None), TypeError,
            ".from_state_dict: expected state to be a mapping of names to tensors, got NoneType",
        ),
        (
            lambda: WEIGHT.from_state_dict({"_extra_state": torch.zeros(3).byte()}), ValueError,
            ".from_state_dict: expected _extra_state to be what get_extra_state returns, got other bytes",
        ),
        (
            lambda: WEIGHT.from_state_dict({"_extra_state": None}), ValueError,
            ".from_state_dict: expected _extra_state to be what get_extra_state returns, got other bytes",
        ),
        # Files of a newer version.
        (
            lambda: WEIGHT.from_state_dict(described(format="nf5")), ValueError,
            ".from_state_dict: expected format to be one of fp8_block, nf4, mxfp4, int4, got 'nf5'",
        ),
        (
            lambda: WEIGHT.from_state_dict(described(scale_encoding="e5m3")), ValueError,
            ".from_state_dict: expected scale_encoding of nf4 to be nested or float32, got 'e5m3'",
        ),
        (
            lambda: WEIGHT.from_state_dict(described(shape=[1, 2])), ValueError,
            f".from_state_dict: expected shape to be {SIZES}, got (1, 2)",
        ),
        (
            lambda: WEIGHT.from_state_dict(described(shape="abc")), ValueError,
            ".from_state_dict: expected _extra_state to be what get_extra_state returns, got other bytes",
        ),
        (
            lambda: WEIGHT.from_state_dict(described(dtype="int8")), ValueError,
            ".from_state_dict: expected _extra_state to be what get_extra_state returns, got other bytes",
        ),
    ],
)  # fmt: skip
def test_arguments_of_another_kind(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert str(caught.value) == f"moe_ops.QuantizedWeight{text}"

# SPDX-License-Identifier: Apache-2.0
"""Adopted weights are what transformers, bitsandbytes and compressed-tensors make of the same bytes."""

import pytest
import torch

from moe_ops import QuantizedWeight, quantize_weight

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
E, N, D = 3, 40, 192


def equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def transformers_module(name):
    return pytest.importorskip(
        f"transformers.integrations.{name}", reason="the transformers extra is not installed"
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4_of_gpt_oss(dtype):
    theirs = transformers_module("mxfp4").convert_moe_packed_tensors
    blocks = torch.randint(0, 256, (E, N, D // 32, 16), dtype=torch.uint8)
    # Values that fp16 has too.
    scales = torch.randint(115, 140, (E, N, D // 32), dtype=torch.uint8)
    weight = QuantizedWeight.from_mxfp4(blocks, scales, dtype)
    equal(weight.dequantize(), theirs(blocks, scales, dtype=dtype).transpose(1, 2))


@pytest.mark.parametrize("as_bytes", [True, False])
def test_mxfp4_of_deepseek_v4(as_bytes):
    theirs = transformers_module("finegrained_fp8").Fp8Dequantize(None)
    blocks = torch.randint(-128, 128, (E, N, D // 2), dtype=torch.int8)
    scales = torch.randint(0, 255, (E, N, D // 32), dtype=torch.uint8)
    scales = scales if as_bytes else scales.view(torch.float8_e8m0fnu)
    weight = QuantizedWeight.from_mxfp4(blocks, scales)
    equal(weight.dequantize(), theirs._dequantize_one(blocks, scales, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float8_e8m0fnu, torch.uint8])
def test_fp8_block(dtype, scale_dtype):
    theirs = transformers_module("finegrained_fp8").Fp8Dequantize(None)
    weight = torch.randn(2, 256, 128).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2, 1)
    if scale_dtype != torch.float32:
        scale = torch.randint(120, 130, (2, 2, 1), dtype=torch.uint8).view(scale_dtype)
    actual = QuantizedWeight.from_fp8_block(weight, scale, dtype).dequantize()
    equal(actual, theirs._dequantize_one(weight, scale, dtype))


def bnb():
    return pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")


def adopt(pairs, dtype=torch.bfloat16):
    """Adopt the bytes and states of the experts."""
    datas, states = zip(*pairs, strict=True)
    return QuantizedWeight.from_bitsandbytes(datas, states, dtype)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_bitsandbytes_expert_by_expert(nested, dtype, storage):
    functional = bnb()
    # 100 x 3 absmax: two nested blocks, the second smaller.
    weight = torch.randn(E, 100, D).to(dtype)
    pairs = [
        functional.quantize_4bit(
            w, quant_type="nf4", compress_statistics=nested, quant_storage=storage
        )
        for w in weight
    ]
    adopted = adopt(pairs, dtype)
    assert adopted.scale_encoding == ("nested" if nested else "float32")
    expected = torch.stack([functional.dequantize_4bit(data, state) for data, state in pairs])
    equal(adopted.dequantize(), expected)


@pytest.mark.parametrize(("rows", "encoding"), [(256, "nested"), (100, "float32")])
def test_bitsandbytes_all_experts_in_one_state(rows, encoding):
    functional = bnb()
    weight = torch.randn(E, rows, D).bfloat16()
    data, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    adopted = QuantizedWeight.from_bitsandbytes(data, state)
    # 300 absmax an expert: blocks of 256 run on into the next expert.
    assert adopted.scale_encoding == encoding
    assert adopted.codes.data_ptr() == data.data_ptr()
    equal(adopted.dequantize(), functional.dequantize_4bit(data, state))


def test_bitsandbytes_where_states_differ():
    functional = bnb()
    pairs = [
        functional.quantize_4bit(
            torch.randn(64, 128).bfloat16(), quant_type="nf4", compress_statistics=nested
        )
        for nested in (True, False)
    ]
    adopted = adopt(pairs)
    assert adopted.scale_encoding == "float32"
    equal(adopted.dequantize(), torch.stack([functional.dequantize_4bit(*pair) for pair in pairs]))


def test_bitsandbytes_parameter():
    nn = pytest.importorskip("bitsandbytes.nn", reason="bitsandbytes is not installed")
    parameter = nn.Params4bit(
        torch.randn(64, 128).bfloat16(), requires_grad=False, quant_type="nf4"
    )
    parameter = parameter.to("cpu")
    adopted = QuantizedWeight.from_bitsandbytes(parameter, parameter.quant_state)
    assert type(adopted.codes) is torch.nn.Parameter
    assert type(adopted.codes.data) is torch.Tensor
    assert adopted.shape == (1, 64, 128)
    equal(adopted.dequantize()[0], bnb().dequantize_4bit(parameter, parameter.quant_state))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizes_as_bitsandbytes(dtype):
    functional = bnb()
    weight = torch.randn(E, 100, D).to(dtype)
    ours = quantize_weight(weight, "nf4").packed.tensors
    for expert, w in enumerate(weight):
        data, state = functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        equal(ours["codes"][expert].flatten(), data.flatten())
        # On a CPU bitsandbytes' search for the nearest code sometimes takes a neighbour.
        difference = ours["scale"][expert].flatten().int() - state.absmax.int()
        assert difference.abs().max() <= 1
        assert (difference != 0).sum() <= 0.02 * difference.numel()
        equal(ours["nested_scale"][expert].view(torch.float32), state.state2.absmax)
        equal(ours["nested_offset"][expert].view(torch.float32)[0], state.offset)


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 128])
def test_compressed_int4(scale_dtype, group_size):
    reason = "compressed-tensors is not installed"
    compressors = pytest.importorskip("compressed_tensors.compressors", reason=reason)
    quantization = pytest.importorskip("compressed_tensors.quantization", reason=reason)
    compressor = compressors.PackedQuantizationCompressor
    scheme = quantization.QuantizationScheme(
        targets=["Linear"],
        weights=quantization.QuantizationArgs(
            num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size
        ),
    )
    states, expected = [], []
    for _ in range(E):
        weight = torch.randn(N, 256).to(scale_dtype)
        scale = weight.unflatten(1, (-1, group_size)).abs().amax(2) / 7.5
        state = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        states.append(state)
        expected.append(compressor.decompress(state, scheme)["weight"])
    adopted = QuantizedWeight.from_compressed_int4(
        [state["weight_packed"] for state in states],
        [state["weight_scale"] for state in states],
        states[0]["weight_shape"],
        group_size,
        scale_dtype,
    )
    equal(adopted.dequantize(), torch.stack(expected))
    if scale_dtype == torch.bfloat16:
        # quantize_weight takes the same scale. It divides in fp32, they do so in bf16.
        again = quantize_weight(weight[None], "int4", group_size)
        equal(again.scale[0].view(torch.bfloat16), states[-1]["weight_scale"])
        ours, theirs = ((w - weight).abs() for w in (again.dequantize()[0], expected[-1]))
        assert ours.float().norm() <= theirs.float().norm()

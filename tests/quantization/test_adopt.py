# SPDX-License-Identifier: Apache-2.0
"""Adopted tensors are taken without a copy, and what does not fit gets an error that says what."""

from types import SimpleNamespace

import pytest
import torch

from moe_ops import QuantizedWeight, quantize_weight
from moe_ops.quantization.scales import DYNAMIC_CODE

E, N, D = 3, 130, 256


def state_of(absmax, shape, **changed):
    """Return a state as bitsandbytes makes without double quantisation."""
    plain = {"quant_type": "nf4", "blocksize": 64, "state2": None, "offset": None}
    return SimpleNamespace(**{**plain, "absmax": absmax, "shape": torch.Size(shape), **changed})


def nested_state(weight, shape, **changed):
    """Return a quantised weight's bytes, and a state of them as bitsandbytes makes."""
    inner = {
        "absmax": weight.nested_scale.view(torch.float32).flatten(),
        "blocksize": 256,
        "code": torch.tensor(DYNAMIC_CODE),
    }
    offset = weight.nested_offset.view(torch.float32)[0, 0]
    state2 = SimpleNamespace(**{**inner, **changed})
    state = state_of(weight.scale.flatten(), shape, state2=state2, offset=offset)
    return weight.codes.view(-1, 1), state


def fp8():
    return torch.randn(E, N, D).to(torch.float8_e4m3fn), torch.rand(E, 2, 2)


def mxfp4():
    return (
        torch.randint(0, 256, (E, N, D // 32, 16), dtype=torch.uint8),
        torch.randint(0, 256, (E, N, D // 32), dtype=torch.uint8),
    )


def int4(group_size=32):
    words = torch.randint(-(2**31), 2**31, (E, N, D // 8)).int()
    return words, torch.rand(E, N, D // group_size).bfloat16()


def nf4():
    return torch.randint(0, 256, (E * N * D // 2, 1), dtype=torch.uint8), torch.rand(
        E * N * D // 64
    )


def adopt_int4(words, scale):
    return QuantizedWeight.from_compressed_int4(words, scale, (N, D), 32)


def test_stacked_tensors_are_not_copied():
    for dtype in (torch.float32, torch.float8_e8m0fnu):
        weight, scale = fp8()
        scale = scale if dtype == torch.float32 else scale.to(dtype)
        adopted = QuantizedWeight.from_fp8_block(weight, scale)
        assert adopted.codes.data_ptr() == weight.data_ptr()
        assert adopted.scale.data_ptr() == scale.data_ptr()
    blocks, scales = mxfp4()
    flat = blocks.flatten(2)
    for b in (blocks, flat, flat.view(torch.int8), flat.view(torch.float4_e2m1fn_x2)):
        adopted = QuantizedWeight.from_mxfp4(b, scales)
        assert adopted.codes.data_ptr() == blocks.data_ptr()
        assert adopted.scale.data_ptr() == scales.data_ptr()
        assert adopted.shape == (E, N, D)
    for dtype in (torch.bfloat16, torch.float32):
        words, scale = int4()
        scale = scale.to(dtype)
        adopted = QuantizedWeight.from_compressed_int4(words, scale, (E, N, D), 32)
        assert adopted.codes.data_ptr() == words.data_ptr()
        assert adopted.scale.data_ptr() == scale.data_ptr()
    data, absmax = nf4()
    adopted = QuantizedWeight.from_bitsandbytes(data, state_of(absmax, (E, N, D)))
    assert adopted.codes.data_ptr() == data.data_ptr()
    assert adopted.scale.data_ptr() == absmax.data_ptr()
    weight = quantize_weight(torch.randn(1, N, D), "nf4")
    adopted = QuantizedWeight.from_bitsandbytes(*nested_state(weight, (N, D)))
    for name in ("codes", "scale", "nested_scale"):
        assert getattr(adopted, name).data_ptr() == getattr(weight, name).data_ptr()


def same(adopted, expected):
    assert adopted.shape == expected.shape
    assert adopted.scale_encoding == expected.scale_encoding
    assert torch.equal(adopted.codes, expected.codes)
    assert torch.equal(adopted.scale, expected.scale)


def test_experts_one_by_one():
    for make, adopt in (
        (fp8, QuantizedWeight.from_fp8_block),
        (mxfp4, QuantizedWeight.from_mxfp4),
        (int4, adopt_int4),
    ):
        codes, scale = make()
        same(adopt(list(codes), list(scale)), adopt(codes, scale))
    data, absmax = nf4()
    states = [state_of(part, (N, D)) for part in absmax.chunk(E)]
    adopted = QuantizedWeight.from_bitsandbytes(list(data.chunk(E)), states)
    same(adopted, QuantizedWeight.from_bitsandbytes(data, state_of(absmax, (E, N, D))))


def test_nested_absmax_of_each_expert_is_kept():
    weights = [quantize_weight(torch.randn(1, N, D), "nf4") for _ in range(E)]
    datas, states = zip(*(nested_state(weight, (N, D)) for weight in weights), strict=True)
    adopted = QuantizedWeight.from_bitsandbytes(datas, states)
    assert adopted.scale_encoding == "nested"
    expected = torch.cat([weight.dequantize() for weight in weights])
    assert torch.equal(adopted.dequantize(), expected.bfloat16())


@pytest.mark.parametrize(
    "changed",
    [
        {"code": torch.tensor(DYNAMIC_CODE) / 2},
        {"blocksize": 512, "absmax": torch.tensor([0.5, 2.0])},
    ],
    ids=["code", "blocksize"],
)
def test_absmax_of_another_code_or_block_becomes_fp32(changed):
    weights = [quantize_weight(torch.randn(1, N, D), "nf4") for _ in range(E)]
    pairs = [nested_state(weight, (N, D), **changed) for weight in weights]
    datas, states = zip(*pairs, strict=True)
    adopted = QuantizedWeight.from_bitsandbytes(datas, states)
    assert adopted.scale_encoding == "float32"
    for expert, state in enumerate(states):
        inner = state.state2
        outer = inner.absmax.repeat_interleave(inner.blocksize)[: N * D // 64]
        expected = inner.code[state.absmax.int()] * outer + state.offset
        assert torch.equal(adopted.scale[expert].view(torch.float32).flatten(), expected)


def test_a_shape_may_be_a_tensor():
    words, scale = int4()
    shape = torch.tensor([N, D])
    same(
        QuantizedWeight.from_compressed_int4(words, scale, shape, 32),
        adopt_int4(words, scale),
    )


def test_fp16_scales_are_exact_in_fp32():
    words, scale = int4()
    scale = scale.half()
    adopted = QuantizedWeight.from_compressed_int4(words, scale, (N, D), 32, torch.float16)
    assert adopted.scale_encoding == "float32"
    assert torch.equal(adopted.scale.view(torch.float32), scale.float())


def test_strided_tensors_and_parameters():
    weight, scale = fp8()
    expected = QuantizedWeight.from_fp8_block(weight, scale)
    strided = weight.view(torch.uint8).mT.contiguous().mT.view(torch.float8_e4m3fn)
    same(
        QuantizedWeight.from_fp8_block(torch.nn.Parameter(strided), torch.nn.Parameter(scale)),
        expected,
    )
    assert not QuantizedWeight.from_fp8_block(torch.nn.Parameter(weight), scale).codes.requires_grad


def test_dtype():
    assert QuantizedWeight.from_mxfp4(*mxfp4()).dtype == torch.bfloat16
    blocks, scales = mxfp4()
    weight = QuantizedWeight.from_mxfp4(blocks, scales, torch.float32)
    assert weight.dtype == weight.dequantize().dtype == torch.float32


def test_on_meta():
    for make, adopt in (
        (fp8, QuantizedWeight.from_fp8_block),
        (mxfp4, QuantizedWeight.from_mxfp4),
        (int4, adopt_int4),
    ):
        weight = adopt(*(tensor.to("meta") for tensor in make()))
        assert weight.device.type == "meta"
        assert weight.shape == (E, N, D)


HERE = "moe_ops.QuantizedWeight"
META = torch.device("meta")


def bad_calls():
    """Yield (call, its arguments, the error, its whole text)."""
    from_fp8, from_mxfp4 = QuantizedWeight.from_fp8_block, QuantizedWeight.from_mxfp4
    from_int4, from_bnb = QuantizedWeight.from_compressed_int4, QuantizedWeight.from_bitsandbytes

    yield from_fp8, (None, None), TypeError, (
        f"{HERE}.from_fp8_block: expected weight to be a tensor, got None"
    )  # fmt: skip
    yield from_mxfp4, ([torch.zeros(3), None], None), TypeError, (
        f"{HERE}.from_mxfp4: expected blocks[1] to be a tensor, got None"
    )  # fmt: skip
    yield from_bnb, (torch.zeros(3), None), TypeError, (
        f"{HERE}.from_bitsandbytes: expected quant_state to be a QuantState of bitsandbytes, got None"
    )  # fmt: skip
    yield from_int4, (*int4(), None, 32), TypeError, (
        f"{HERE}.from_compressed_int4: expected shape to be (out_features, in_features), or that after "
        "num_experts, got None"
    )  # fmt: skip
    weight, scale = fp8()
    at = f"{HERE}.from_fp8_block: expected "
    yield (
        from_fp8,
        (weight.float(), scale),
        TypeError,
        at + "weight.dtype == float8_e4m3fn, got float32",
    )
    yield from_fp8, (weight, scale.half()), TypeError, (
        at + "weight_scale_inv.dtype in (float32, float8_e8m0fnu, uint8), got float16"
    )  # fmt: skip
    yield from_fp8, (weight[0], scale), ValueError, (
        at + "weight.shape to be (num_experts, out_features, in_features), got (130, 256)"
    )  # fmt: skip
    yield from_fp8, (weight, scale[:, :1]), ValueError, (
        at + "weight_scale_inv.shape == (3, 2, 2), got (3, 1, 2)"
    )  # fmt: skip
    yield from_fp8, (weight, scale.to(META)), ValueError, (
        at + "weight_scale_inv.device == cpu, as its codes, got meta"
    )  # fmt: skip
    yield from_fp8, (weight, scale, torch.int8), TypeError, (
        f"{HERE}: expected dtype in (bfloat16, float16, float32, float64), got int8"
    )  # fmt: skip
    yield from_fp8, ([], scale), ValueError, (
        at + "weight to have tensors of one shape and dtype, an expert each, got none"
    )  # fmt: skip
    yield (
        from_fp8,
        ([weight[0], weight[0, 1:]], scale),
        ValueError,
        (
            at + "weight to have tensors of one shape and dtype, an expert each, "
            "got [((129, 256), 'float8_e4m3fn'), ((130, 256), 'float8_e4m3fn')]"
        ),
    )

    blocks, scales = mxfp4()
    at = f"{HERE}.from_mxfp4: expected "
    yield from_mxfp4, (blocks.int(), scales), TypeError, (
        at + "blocks.dtype in (uint8, int8, float4_e2m1fn_x2), got int32"
    )  # fmt: skip
    yield from_mxfp4, (blocks, scales.float()), TypeError, (
        at + "scales.dtype in (float8_e8m0fnu, uint8), got float32"
    )  # fmt: skip
    yield (
        from_mxfp4,
        (blocks[..., :8], scales),
        ValueError,
        (
            at + "blocks.shape to be (num_experts, out_features, in_features / 32, 16) or "
            "(num_experts, out_features, in_features / 2), got (3, 130, 8, 8)"
        ),
    )
    yield (
        from_mxfp4,
        (blocks.flatten(2)[..., :24], scales),
        ValueError,
        (
            at
            + "blocks.shape[2] to be a multiple of 16, since 16 bytes are a block of 32 weights, "
            "got 24; dequantise it and call moe_ops.quantize_weight"
        ),
    )
    yield from_mxfp4, (blocks, scales[..., :7]), ValueError, (
        at + "scales.shape == (3, 130, 8), got (3, 130, 7)"
    )  # fmt: skip

    yield from_mxfp4, ((b for b in blocks), scales), TypeError, (
        at + "blocks to be a tensor or a sequence of tensors, an expert each, got generator; pass a list"
    )  # fmt: skip

    words, scale = int4()
    at = f"{HERE}.from_compressed_int4: expected "
    yield from_int4, (words.long(), scale, (N, D), 32), TypeError, (
        at + "weight_packed.dtype == int32, got int64"
    )  # fmt: skip
    yield from_int4, (words, scale.double(), (N, D), 32), TypeError, (
        at + "weight_scale.dtype in (bfloat16, float16, float32), got float64"
    )  # fmt: skip
    yield from_int4, (words, scale, (N, D), 64), ValueError, (
        at + "group_size of int4 to be 32 or 128, got 64"
    )  # fmt: skip
    yield from_int4, (words, scale, (N, D), 128), ValueError, (
        at + "weight_scale.shape == (3, 130, 2), got (3, 130, 8)"
    )  # fmt: skip
    yield from_int4, (words[..., 1:], scale, (N, D), 32), ValueError, (
        at + "weight_packed.shape == (3, 130, 32), got (3, 130, 31)"
    )  # fmt: skip
    yield (
        from_int4,
        (words, scale, (N, 250), 32),
        ValueError,
        (
            at + "shape[-1] to be a multiple of group_size (32), got 250; dequantise it and call "
            "moe_ops.quantize_weight"
        ),
    )
    yield from_int4, (words, scale, (D,), 32), ValueError, (
        at + "shape to be (num_experts, out_features, in_features), got (256,)"
    )  # fmt: skip

    for wrong in (words[0, 0, 0], words[0]):
        yield from_int4, (wrong, scale, (N, D), 32), ValueError, (
            at + "weight_packed.shape to be (num_experts, out_features, in_features / 8), "
            f"got {tuple(wrong.shape)}"
        )  # fmt: skip
    for wrong in ((4.7, 64.9), torch.tensor([4.0, 64.0])):
        yield from_int4, (words, scale, wrong, 32), TypeError, (
            at + "shape to be (out_features, in_features), or that after num_experts, "
            f"got {wrong!r}"
        )  # fmt: skip
    yield from_int4, (words, scale, (N, D), None), ValueError, (
        at + "group_size of int4 to be 32 or 128, got None"
    )  # fmt: skip

    data, absmax = nf4()
    at = f"{HERE}.from_bitsandbytes: expected "
    shape = (E, N, D)
    yield from_bnb, (data, state_of(absmax, shape, quant_type="fp4")), ValueError, (
        at + "quant_state.quant_type == 'nf4', got 'fp4'"
    )  # fmt: skip
    yield (
        from_bnb,
        (data, state_of(absmax, shape, code=torch.ones(16))),
        ValueError,
        (at + f"quant_state.code to be the 16 values of nf4, got {[1.0] * 16}"),
    )
    yield from_bnb, (data, state_of(absmax, shape, code=[1.0] * 16)), TypeError, (
        at + "quant_state.code to be a tensor, got list"
    )  # fmt: skip
    yield from_bnb, (data, state_of(absmax, shape, blocksize=128)), ValueError, (
        at + "quant_state.blocksize == 64, got 128"
    )  # fmt: skip
    yield (
        from_bnb,
        (data, state_of(absmax, (E, D, 130))),
        ValueError,
        (
            at
            + "quant_state.shape[-1] to be a multiple of 64, since a block would run on into the next row, got 130; "
            "dequantise it with bitsandbytes and call moe_ops.quantize_weight"
        ),
    )
    yield (
        from_bnb,
        (data, state_of(absmax, (D,))),
        ValueError,
        (
            at + "quant_state.shape to be (out_features, in_features), or that after num_experts, "
            "got (256,)"
        ),
    )
    yield from_bnb, (data[1:], state_of(absmax, shape)), ValueError, (
        at + "data to have 49920 bytes, two weights of (3, 130, 256) in each, got 49919"
    )  # fmt: skip
    yield from_bnb, (data, state_of(absmax[1:], shape)), ValueError, (
        at + "quant_state.absmax.shape == (1560,), got (1559,)"
    )  # fmt: skip
    yield from_bnb, (data, state_of(absmax.half(), shape)), TypeError, (
        at + "quant_state.absmax.dtype == float32, got float16"
    )  # fmt: skip
    yield from_bnb, ([data, data], [state_of(absmax, shape)]), ValueError, (
        at + "len(data) == len(quant_state) (1), got 2"
    )  # fmt: skip
    yield from_bnb, (None, state_of(absmax, shape)), TypeError, (
        at + "data to be a tensor, got None"
    )  # fmt: skip
    yield from_bnb, ([], []), ValueError, at + "quant_state to have states of one shape, got none"
    weight = quantize_weight(torch.randn(1, N, D), "nf4")
    data, state = nested_state(weight, (N, D), absmax=torch.ones(1))
    yield from_bnb, (data, state), ValueError, (
        at + "quant_state.state2.absmax.shape == (3,), got (1,)"
    )  # fmt: skip
    data, state = nested_state(weight, (N, D), absmax=torch.ones(3).double())
    yield from_bnb, (data, state), TypeError, (
        at + "quant_state.state2.absmax.dtype == float32, got float64"
    )  # fmt: skip
    data, state = nested_state(weight, (N, D))
    state.absmax = torch.rand(N * D // 64)
    yield from_bnb, (data, state), TypeError, (
        at + "quant_state.absmax.dtype == uint8, got float32"
    )  # fmt: skip
    data, absmax = nf4()
    yield from_bnb, (data, SimpleNamespace(quant_type="nf4", blocksize=64, absmax=absmax)), TypeError, (
        at + "quant_state to be a QuantState of bitsandbytes, got SimpleNamespace without shape, state2"
    )  # fmt: skip
    yield from_bnb, (data, state_of(None, shape)), TypeError, (
        at + "quant_state.absmax to be a tensor, got None"
    )  # fmt: skip
    for wrong in (None, (E, N, 256.0)):
        state = state_of(absmax, shape)
        state.shape = wrong
        yield from_bnb, (data, state), TypeError, (
            at + "quant_state.shape to be (out_features, in_features), or that after num_experts, "
            f"got {wrong}"
        )  # fmt: skip
    yield from_bnb, (torch.tensor(1, dtype=torch.uint8), state_of(absmax, shape)), ValueError, (
        at + "data to have 49920 bytes, two weights of (3, 130, 256) in each, got 1"
    )  # fmt: skip
    data, state = nested_state(weight, (N, D))
    state.state2 = SimpleNamespace(absmax=state.state2.absmax)
    yield from_bnb, (data, state), TypeError, (
        at + "quant_state.state2 to be a QuantState of bitsandbytes, got SimpleNamespace without "
        "blocksize, code"
    )  # fmt: skip
    # Where blocks are of 256 the state is kept, and else read.
    for inner in ({}, {"blocksize": 512, "absmax": torch.ones(2)}):
        data, state = nested_state(weight, (N, D), **inner)
        state.offset = None
        yield from_bnb, (data, state), TypeError, (
            at + "quant_state.offset to be a tensor, got None"
        )  # fmt: skip
        data, state = nested_state(weight, (N, D), **inner)
        state.offset = torch.ones(3)
        yield from_bnb, (data, state), ValueError, (
            at + "quant_state.offset to be one number, got (3,)"
        )  # fmt: skip


@pytest.mark.parametrize(
    ("call", "arguments", "error", "text"),
    [pytest.param(*case, id=str(number)) for number, case in enumerate(bad_calls())],
)
def test_bad_input(call, arguments, error, text):
    with pytest.raises(error) as caught:
        call(*arguments)
    assert type(caught.value) is error
    assert str(caught.value) == text

# SPDX-License-Identifier: Apache-2.0
"""Writes tiny checkpoints as other libraries write quantised ones, without these libraries."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moe_ops import quantize_weight
from moe_ops.quantization.formats.nf4 import NF4
from moe_ops.quantization.scales import DYNAMIC_CODE
from testing import tiny_models

MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
BITSANDBYTES = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "uint8",
}  # fmt: skip
INT4 = {
    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32,
    "actorder": None, "dynamic": False,
}  # fmt: skip
COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized",
    "quantization_status": "compressed", "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4, "input_activations": None}},
}  # fmt: skip

# The model, and what quantises it, by what its experts become.
CHECKPOINTS = {
    "mxfp4": ("gpt_oss", MXFP4),
    "fp8_block": ("qwen3_moe", FP8),
    "nf4": ("qwen3_moe", BITSANDBYTES),
    "int4": ("mixtral", COMPRESSED),
}


def bytes_of(state):
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def as_mxfp4(name, weight):
    """Return the tensors of all experts, whose weights gpt-oss stores transposed."""
    stored = quantize_weight(weight.mT, "mxfp4")
    blocks = stored.codes.data.unflatten(2, (-1, 16))
    return {f"{name}_blocks": blocks, f"{name}_scales": stored.scale.data}, stored.dequantize().mT


def as_fp8(name, weight):
    stored = quantize_weight(weight[None], "fp8_block")
    codes = stored.codes.data[0].view(torch.float8_e4m3fn)
    scale = stored.scale.data[0].view(torch.float32)
    return {name: codes, f"{name}_scale_inv": scale}, stored.dequantize()[0]


def as_bitsandbytes(name, weight):
    stored = quantize_weight(weight[None], "nf4")
    tensors = stored.packed.tensors
    state = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape),
        "nested_blocksize": 256, "nested_dtype": "float32",
        "nested_offset": tensors["nested_offset"].view(torch.float32).item(),
    }  # fmt: skip
    packed = {
        name: tensors["codes"].data.reshape(-1, 1),
        f"{name}.absmax": tensors["scale"].data.flatten(),
        f"{name}.quant_map": torch.tensor(NF4),
        f"{name}.nested_absmax": tensors["nested_scale"].data[0].view(torch.float32),
        f"{name}.nested_quant_map": torch.tensor(DYNAMIC_CODE),
        f"{name}.quant_state.bitsandbytes__nf4": bytes_of(state),
    }
    return packed, stored.dequantize()[0]


def as_compressed(name, weight):
    stored = quantize_weight(weight[None], "int4")
    tensors = {
        f"{name}_packed": stored.codes.data[0].view(torch.int32),
        f"{name}_scale": stored.scale.data[0].view(torch.bfloat16),
        f"{name}_shape": torch.tensor(weight.shape),
    }
    return tensors, stored.dequantize()[0]


WRITERS = {"mxfp4": as_mxfp4, "fp8_block": as_fp8, "nf4": as_bitsandbytes, "int4": as_compressed}


def write_checkpoint(folder, format, leave=(), attention=True):
    """Write a checkpoint of two layers, and beside it the same with plain weights of its values.

    Args:
        folder: gets both, as "quantised" and "plain".
        format: a key of CHECKPOINTS.
        leave: ends of names that stay plain.
        attention: whether attention is quantised too, where the library does that.
    """
    name, quantization_config = CHECKPOINTS[format]
    tiny = tiny_models.MODELS[name]
    sizes = {"hidden_size": 128, "num_hidden_layers": 2}
    intermediate = "moe_intermediate_size" if name == "qwen3_moe" else "intermediate_size"
    options = {**tiny.options, **sizes, intermediate: 128}
    options.pop("layer_types", None)
    model = tiny_models.make_model(replace(tiny, options=options), torch.bfloat16)
    quantised, plain = Path(folder, "quantised"), Path(folder, "plain")
    for path in (quantised, plain):
        model.save_pretrained(path)
    values, stored = {}, {}
    for key, weight in load_file(plain / "model.safetensors").items():
        is_expert = ".experts." in key and "bias" not in key
        is_attention = attention and format != "mxfp4" and "self_attn" in key and "_proj" in key
        if (is_expert or is_attention) and not any(part in key for part in leave):
            tensors, values[key] = WRITERS[format](key, weight)
            stored.update(tensors)
        else:
            stored[key] = values[key] = weight
    for path, tensors in ((quantised, stored), (plain, values)):
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = quantization_config
    (quantised / "config.json").write_text(json.dumps(config))
    return quantised, plain

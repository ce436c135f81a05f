# SPDX-License-Identifier: Apache-2.0
"""adopt_config keeps the experts of other libraries' checkpoints as they are."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import auto

from moe_ops import QuantizedWeight
from moe_ops.integrations.transformers import MoeOpsConfig, adopt_config, dequantize_experts_
from testing.largest_floats import LargestFloats
from testing.quantised_checkpoints import (
    BITSANDBYTES,
    CHECKPOINTS,
    COMPRESSED,
    FP8,
    INT4,
    MXFP4,
    write_checkpoint,
)
from testing.tiny_models import run_step
from testing.tolerances import MODULE_NORM, relative_error


@pytest.fixture
def input_ids():
    return torch.randint(3, 48, (2, 12), generator=torch.Generator().manual_seed(0))


def load(folder, config=None, **options):
    options = {"attn_implementation": "eager", "experts_implementation": "moe_ops", **options}
    return AutoModelForCausalLM.from_pretrained(folder, config=config, **options)


def adopt(folder, **options):
    return load(folder, adopt_config(AutoConfig.from_pretrained(folder)), **options)


def assert_values(model, expected):
    """Hold every weight of a model, dequantised, bit for bit."""
    values = copy.deepcopy(model)
    dequantize_experts_(values)
    state, expected = values.state_dict(), expected.state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert state[key].dtype == tensor.dtype, key
        assert torch.equal(state[key], tensor), key


def weights_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedWeight)}


@pytest.mark.parametrize("format", CHECKPOINTS)
def test_a_checkpoint_has_its_values(format, tmp_path, input_ids):
    """Experts stay quantised, other weights are dequantised, and all have their values bit for bit."""
    quantised, plain = write_checkpoint(tmp_path, format)
    model, expected = adopt(quantised), load(plain)
    assert len(weights_of(model)) == 4
    assert {weight.format for weight in weights_of(model).values()} == {format}
    assert_values(model, expected)
    output, gradients = run_step(model, input_ids)
    expected_output, expected_gradients = run_step(expected, input_ids)
    assert relative_error(output, expected_output) <= MODULE_NORM[torch.bfloat16]
    for key in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
        error = relative_error(gradients[key], expected_gradients[key])
        assert error <= 2 * MODULE_NORM[torch.bfloat16], key


@pytest.mark.parametrize("format", ["mxfp4", "fp8_block"])
def test_transformers_own_loading_has_the_same_values(format, tmp_path):
    """On a CPU it dequantises these two."""
    quantised, _ = write_checkpoint(tmp_path, format)
    assert_values(adopt(quantised), load(quantised, experts_implementation="eager"))


@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_the_libraries_own_values(format, tmp_path):
    """Where they are installed, they make the same of the experts' tensors."""
    quantised, _ = write_checkpoint(tmp_path, format, attention=False)
    reference = {"nf4": _by_bitsandbytes, "int4": _by_compressed_tensors}[format]
    model = adopt(quantised)
    dequantize_experts_(model)
    experts = model.model.layers[1].mlp.experts
    gate = reference(quantised, "w1" if format == "int4" else "gate_proj")
    assert torch.equal(experts.gate_up_proj[2].chunk(2)[0], gate)


def _tensors(folder, projection):
    from safetensors.torch import load_file

    ends = f"experts.2.{projection}.weight"
    state = load_file(folder / "model.safetensors")
    (stem,) = {key.partition(ends)[0] + ends for key in state if "layers.1." in key and ends in key}
    return {key.removeprefix(stem): tensor for key, tensor in state.items() if key.startswith(stem)}


def _by_bitsandbytes(folder, projection):
    reason = "bitsandbytes is not installed"
    functional = pytest.importorskip("bitsandbytes.functional", reason=reason)
    tensors = _tensors(folder, projection)
    data = tensors.pop("")
    packed = {key.removeprefix("."): tensor for key, tensor in tensors.items()}
    state = functional.QuantState.from_dict(packed, device=torch.device("cpu"))
    return functional.dequantize_4bit(data, state)


def _by_compressed_tensors(folder, projection):
    reason = "compressed-tensors is not installed"
    compressors = pytest.importorskip("compressed_tensors.compressors", reason=reason)
    quantization = pytest.importorskip("compressed_tensors.quantization", reason=reason)
    tensors = _tensors(folder, projection)
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**{**INT4, "dynamic": False})
    )
    module = torch.nn.Module()
    for suffix in ("_packed", "_scale", "_shape"):
        module.register_parameter(f"weight{suffix}", torch.nn.Parameter(tensors[suffix], False))
    module.quantization_scheme = scheme
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    compressor.decompress_module(module)
    return module.weight.data


@pytest.mark.parametrize("format", CHECKPOINTS)
def test_there_is_no_copy_in_full_size(format, tmp_path):
    """Nothing in floats is as large as a projection while the checkpoint is loaded."""
    quantised, _ = write_checkpoint(tmp_path, format)
    config = adopt_config(AutoConfig.from_pretrained(quantised))
    with LargestFloats() as seen:
        model = load(quantised, config)
    # One projection of attention, or the embedding.
    assert seen.largest <= max(p.numel() for p in model.parameters() if p.is_floating_point())
    experts = min(weight.shape.numel() for weight in weights_of(model).values())
    assert seen.largest < experts / 2


@pytest.mark.parametrize("format", ["mxfp4", "nf4", "int4"])
def test_it_saves_what_it_has_loaded(format, tmp_path):
    """It is then a checkpoint of ours, which needs no adopt_config, and may be adopted all the same."""
    quantised, _ = write_checkpoint(tmp_path, format)
    model = adopt(quantised)
    model.save_pretrained(tmp_path / "again")
    for again in (load(tmp_path / "again"), adopt(tmp_path / "again")):
        assert_values(again, _dequantised(model))
        for name, weight in weights_of(model).items():
            assert weights_of(again)[name].packed.layout == weight.packed.layout


def _dequantised(model):
    model = copy.deepcopy(model)
    dequantize_experts_(model)
    return model


@pytest.mark.parametrize("format", ["fp8_block", "nf4", "int4"])
def test_layers_that_are_plain_stay_so(format, tmp_path, input_ids):
    quantised, plain = write_checkpoint(tmp_path, format, leave=["layers.1.", "v_proj"])
    model = adopt(quantised)
    assert {name.split(".")[2] for name in weights_of(model)} == {"0"}
    assert_values(model, load(plain))
    model(input_ids=input_ids)
    model.save_pretrained(tmp_path / "again")
    assert_values(load(tmp_path / "again"), load(plain))


def test_a_file_that_does_not_name_its_method(tmp_path):
    """bitsandbytes' files did not, before there were other methods."""
    quantised, plain = write_checkpoint(tmp_path, "nf4")
    config = AutoConfig.from_pretrained(quantised)
    del config.quantization_config["quant_method"]
    assert_values(load(quantised, adopt_config(config)), load(plain))


def test_another_dtype(tmp_path):
    quantised, plain = write_checkpoint(tmp_path, "fp8_block")
    model = adopt(quantised, dtype=torch.float32)
    assert {weight.dtype for weight in weights_of(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.uint8}
    assert relative_error(
        _dequantised(model).model.layers[0].mlp.experts.down_proj,
        load(plain).model.layers[0].mlp.experts.down_proj,
    ) < 1e-2  # fmt: skip


def test_power_of_two_scales(tmp_path):
    """DeepSeek-V4 stores scales as e8m0, and calls them .scale."""
    from safetensors.torch import load_file, save_file

    quantised, _ = write_checkpoint(tmp_path, "fp8_block", attention=False)
    state, values = {}, {}
    for key, tensor in load_file(quantised / "model.safetensors").items():
        if key.endswith("weight_scale_inv"):
            powers = tensor.log2().round().exp2()
            state[key.replace("weight_scale_inv", "scale")] = powers.to(torch.float8_e8m0fnu)
            values[key] = powers
        else:
            state[key] = tensor
    save_file(state, quantised / "model.safetensors", metadata={"format": "pt"})
    model = adopt(quantised)
    weight = weights_of(model)["model.layers.0.mlp.experts.down_proj"]
    assert weight.scale_encoding == "e8m0"
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    expected = state[name].float() * values[f"{name}_scale_inv"]
    assert torch.equal(weight.dequantize()[1], expected.bfloat16())
    model.save_pretrained(tmp_path / "again")
    assert_values(load(tmp_path / "again"), _dequantised(model))


GOT = {
    torch.float8_e5m2: "torch.float8_e5m2",
    torch.float8_e4m3fnuz: "torch.float8_e4m3fnuz",
    torch.bfloat16: "values of torch.bfloat16 that it does not have",
}


@pytest.mark.parametrize("dtype", GOT)
def test_codes_that_are_not_e4m3fn_are_refused(dtype, tmp_path, caplog):
    """Their bytes, or what is left of their values, would be other weights."""
    from safetensors.torch import load_file, save_file

    quantised, _ = write_checkpoint(tmp_path, "fp8_block", attention=False)
    state = load_file(quantised / "model.safetensors")
    for key, tensor in state.items():
        if "experts" in key and tensor.dtype == torch.float8_e4m3fn:
            # No e4m3 number is that large.
            state[key] = (tensor.float() * 150).clamp(-50000, 50000).to(dtype)
    save_file(state, quantised / "model.safetensors", metadata={"format": "pt"})
    # transformers prints why.
    with pytest.raises(RuntimeError, match="CONVERSION"):
        adopt(quantised)
    assert f"to be stored in float8_e4m3fn, got {GOT[dtype]}" in caplog.text


def test_the_config_is_a_copy(tmp_path):
    quantised, _ = write_checkpoint(tmp_path, "mxfp4")
    config = AutoConfig.from_pretrained(quantised)
    tables = (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    before = [dict(table) for table in tables]
    adopted = adopt_config(config)
    assert config.quantization_config == MXFP4
    assert adopted.quantization_config["quant_method"] == "moe_ops"
    assert adopted.quantization_config["adopt"] == MXFP4
    assert adopt_config(adopted).quantization_config == adopted.quantization_config
    assert [dict(table) for table in tables] == before
    assert MoeOpsConfig.from_dict(adopted.quantization_config).format == "mxfp4"


def _compressed(**weights):
    group = {"targets": ["Linear"], "weights": {**INT4, **weights}, "input_activations": None}
    return {**COMPRESSED, "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("quantization_config", "text"),
    [
        (None, "expected the config of a quantised checkpoint, got GptOssConfig without"),
        ({"quant_method": "gptq"}, "quant_method to be one of mxfp4, fp8, bitsandbytes, .*'gptq'"),
        (
            {**FP8, "weight_block_size": None},
            r"expected weight_block_size .* \[128, 128\], got None",
        ),
        ({**FP8, "weight_block_size": [1, 32]}, r"expected weight_block_size .*, got \[1, 32\]"),
        ({**FP8, "fmt": "e5m2"}, "expected fmt .* to be 'e4m3' or 'e4m3fn', got 'e5m2'"),
        ({**BITSANDBYTES, "load_in_4bit": False}, "expected load_in_4bit .* to be True, got False"),
        ({**BITSANDBYTES, "load_in_8bit": True}, "expected load_in_8bit .* to be False, got True"),
        ({**BITSANDBYTES, "bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type .* 'nf4', got 'fp4'"),
        (_compressed(num_bits=8), "expected num_bits of the quantization_config to be 4, got 8"),
        (_compressed(group_size=64), "expected group_size .* to be 32 or 128, got 64"),
        (_compressed(symmetric=False), "expected symmetric .* to be True, got False"),
        (
            {**COMPRESSED, "format": "marlin-24"},
            "expected format .* 'pack-quantized', got 'marlin-24'",
        ),
        (
            {**COMPRESSED, "config_groups": {"W4A16": ["Linear"]}},
            r"config_groups.W4A16 of the quantization_config to be a mapping, got \['Linear'\]",
        ),
        (
            {**COMPRESSED, "transform_config": {"config_groups": {"u": {}}}},
            "expected transform_config .* to be None or {} or .*, got {'config_groups'",
        ),
        (
            {**COMPRESSED, "sparsity_config": {"format": "sparse-24-bitmask"}},
            "expected sparsity_config .*, got {'format': 'sparse-24-bitmask'}",
        ),
        ({**COMPRESSED, "config_groups": {}}, "expected config_groups .* to have a group, got {}"),
        ({}, "quant_method to be one of mxfp4, .*, got None"),
        ({"quant_method": ["fp8"]}, r"quant_method to be one of mxfp4, .*, got \['fp8'\]"),
        ("fp8", "expected quantization_config to be a mapping, got 'fp8'"),
    ],
)
def test_what_is_not_adopted(quantization_config, text, tmp_path):
    config = AutoConfig.for_model("gpt_oss")
    if quantization_config is not None:
        config.quantization_config = quantization_config
    with pytest.raises(ValueError, match=text):
        adopt_config(config)


WEIGHTS = "config_groups.group_0.weights"


@pytest.mark.parametrize(
    ("config", "path", "name"),
    [
        ({"quant_method": "moe_ops", "format": "nf4"}, "", "format"),
        (FP8, "", "weight_block_size"),
        (BITSANDBYTES, "", "load_in_4bit"),
        (BITSANDBYTES, "", "bnb_4bit_quant_type"),
        (COMPRESSED, "", "config_groups"),
        (COMPRESSED, "", "format"),
        (COMPRESSED, "config_groups.group_0", "weights"),
        (COMPRESSED, WEIGHTS, "num_bits"),
        (COMPRESSED, WEIGHTS, "strategy"),
        (COMPRESSED, WEIGHTS, "group_size"),
    ],
)
def test_a_missing_key_is_named(config, path, name):
    """A config that somebody wrote by hand may lack what a library always writes."""
    lacking = copy.deepcopy(config)
    holder = lacking
    for key in filter(None, path.split(".")):
        holder = holder[key]
    del holder[name]
    where = f"{path} of the quantization_config" if path else "the quantization_config"
    model_config = AutoConfig.for_model("gpt_oss")
    model_config.quantization_config = lacking
    with pytest.raises(ValueError, match=f": expected {where} to have {name}, got [a-z]"):
        adopt_config(model_config)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (BITSANDBYTES, ["bnb_4bit_quant_storage"]),
        (COMPRESSED, ["type", "symmetric", "actorder", "dynamic", "input_activations"]),
    ],
)
def test_keys_that_libraries_leave_out(config, names):
    """Files lack these where they have the value that a library assumes."""
    lacking = copy.deepcopy(config)
    group = lacking.get("config_groups", {}).get("group_0", {})
    for name in names:
        for holder in (lacking, group, group.get("weights", {})):
            holder.pop(name, None)
    model_config = AutoConfig.for_model("gpt_oss")
    model_config.quantization_config = lacking
    assert adopt_config(model_config).quantization_config["adopt"] == lacking


def test_adapters_train_on_adopted_experts(tmp_path, input_ids):
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    quantised, _ = write_checkpoint(tmp_path, "mxfp4")
    model = adopt(quantised)
    lora = peft.LoraConfig(target_parameters=["mlp.experts.gate_up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, lora)
    _, gradients = run_step(model, input_ids)
    trained = [name for name, gradient in gradients.items() if gradient is not None]
    assert len(trained) == 4
    assert all("lora_" in name and gradients[name].norm() > 0 for name in trained)


@pytest.mark.parametrize("config", [None, "a/path", {"model_type": "gpt_oss"}])
def test_what_is_no_config(config):
    with pytest.raises(TypeError, match=r"expected a config of transformers, .* got "):
        adopt_config(config)

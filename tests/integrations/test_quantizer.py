# SPDX-License-Identifier: Apache-2.0
"""transformers' registry has a quantizer of ours, which quantises, saves and loads experts."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.quantizers import auto

from moe_ops import QuantizedWeight
from moe_ops.integrations.transformers import (
    MoeOpsConfig,
    dequantize_experts_,
    quantize_experts_,
    register,
    unregister,
)
from testing.tiny_models import MODELS, TinyModel, make_model, run_step

OPTIONS = {"experts_implementation": "moe_ops", "attn_implementation": "eager"}


def model_of(name="qwen3_moe", layers=None):
    tiny = MODELS[name]
    if layers is not None:
        options = {**tiny.options, "num_hidden_layers": layers}
        tiny = TinyModel(tiny.model_class, tiny.config_class, options)
    model = make_model(tiny)
    model.set_experts_implementation("moe_ops")
    return model


def load(model, folder, **options):
    return type(model).from_pretrained(folder, **OPTIONS, **options)


def assert_same_weights(model, expected):
    state, expected_state = model.state_dict(), expected.state_dict()
    assert state.keys() == expected_state.keys()
    for key, tensor in expected_state.items():
        assert state[key].dtype == tensor.dtype, key
        assert torch.equal(state[key], tensor), key


@pytest.fixture
def input_ids():
    return torch.randint(3, 48, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_quantises_while_it_loads_and_round_trips(name, tmp_path):
    """A checkpoint of plain weights becomes what quantize_experts_ makes, and stays so when saved."""
    expected = model_of(name)
    expected.save_pretrained(tmp_path / "plain")
    quantize_experts_(expected, "nf4")

    model = load(expected, tmp_path / "plain", quantization_config=MoeOpsConfig("nf4"))
    assert_same_weights(model, expected)
    for number, one in enumerate((model, expected)):
        one.save_pretrained(tmp_path / str(number))
        again = load(expected, tmp_path / str(number))
        assert_same_weights(again, expected)
        assert again.config.quantization_config.to_dict() == {
            "quant_method": "moe_ops", "format": "nf4", "group_size": 64, "modules": None,
            "weights": {}, "adopt": None,
        }  # fmt: skip


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("format", ["fp8_block", "mxfp4", "int4"])
def test_other_formats(name, format, tmp_path):
    expected = model_of(name)
    expected.save_pretrained(tmp_path)
    quantize_experts_(expected, format)
    model = load(expected, tmp_path, quantization_config=MoeOpsConfig(format))
    assert_same_weights(model, expected)


def test_some_experts_and_several_formats_round_trip(tmp_path, input_ids):
    """Plain experts are saved one by one, as transformers does it, and quantised ones as they are."""
    model = model_of(layers=3)
    quantize_experts_(model, "nf4", ["layers.0.mlp.experts"])
    quantize_experts_(model, "int4", ["layers.2.mlp.experts"], group_size=128)
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in names
    assert "model.layers.0.mlp.experts.gate_up_proj.nested_offset" in names
    again = load(model, tmp_path)
    assert_same_weights(again, model)
    run_step(again, input_ids)
    assert again.config.quantization_config.modules == [
        "layers.0.mlp.experts",
        "layers.2.mlp.experts",
    ]


def test_a_part_of_the_model_loads_what_the_whole_saved(tmp_path):
    model = model_of()
    quantize_experts_(model, "mxfp4", ["model.layers.0.mlp.experts"])
    model.save_pretrained(tmp_path)
    part = transformers.AutoModel.from_pretrained(tmp_path, **OPTIONS)
    assert_same_weights(part, model.model)


SCRIPT = """
import sys
import torch
from transformers import AutoModelForCausalLM
from moe_ops.integrations.transformers import register

register()
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], experts_implementation="moe_ops", attn_implementation="eager"
)
expected = torch.load(sys.argv[2])
assert torch.equal(model(input_ids=expected["input_ids"]).logits, expected["logits"])
"""


def test_round_trip_in_a_fresh_process(tmp_path, input_ids):
    model = model_of()
    model.save_pretrained(tmp_path)
    model = load(model, tmp_path, quantization_config=MoeOpsConfig("nf4"))
    model.save_pretrained(tmp_path / "quantised")
    with torch.no_grad():
        logits = model(input_ids=input_ids).logits
    torch.save({"input_ids": input_ids, "logits": logits}, tmp_path / "expected")
    arguments = [str(tmp_path / "quantised"), str(tmp_path / "expected")]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_saved_config_is_plain(tmp_path):
    model = model_of()
    quantize_experts_(model, "nf4")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "moe_ops"
    assert config["quantization_config"]["format"] == "nf4"
    assert "experts_implementation" not in config


def test_what_transformers_asks_of_it(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path)
    loaded = load(model, tmp_path, quantization_config=MoeOpsConfig("nf4"))
    quantize_experts_(model, "nf4")
    for one in (model, loaded):
        assert one.is_quantized
        assert one.quantization_method == "moe_ops"
        assert one.hf_quantizer.is_trainable
        assert one.hf_quantizer.is_serializable()
        assert one.hf_quantizer.is_compileable
    expected = copy.deepcopy(model)
    dequantize_experts_(expected)
    loaded.dequantize()
    assert_same_weights(loaded, expected)
    for one in (expected, loaded):
        assert not one.is_quantized
        assert not hasattr(one, "hf_quantizer")
        assert not hasattr(one.config, "quantization_config")
        one.save_pretrained(tmp_path / "dequantised")
        assert_same_weights(load(model, tmp_path / "dequantised"), expected)


def test_register_is_repeatable_and_can_be_undone():
    """Other entries of transformers' tables stay as they are."""
    tables = (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    before = [dict(table) for table in tables]
    register()
    register()
    assert [dict(table) for table in tables] == before
    unregister()
    try:
        assert [dict(table) for table in tables] == [
            {name: entry for name, entry in table.items() if name != "moe_ops"} for table in before
        ]
    finally:
        register()
    assert [dict(table) for table in tables] == before


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"format": "nf5"}, ValueError, "MoeOpsConfig: expected format to be one of .*, got 'nf5'"),
        (
            {"format": "int4", "group_size": 7},
            ValueError,
            "expected group_size of int4 to be 32 or 128",
        ),
        (
            {"format": "nf4", "modules": "layers.0.mlp.experts"},
            TypeError,
            "expected modules to be a sequence of names, got 'layers.0.mlp.experts'",
        ),
        ({"format": "nf4", "modules": [0]}, TypeError, "expected modules to be names, got 0"),
        (
            {"format": "nf4", "modules": 0},
            TypeError,
            "expected modules to be a sequence of names, got 0",
        ),
        ({"format": "nf4", "bits": 4}, TypeError, r"got unknown arguments \['bits'\]"),
    ],
)
def test_bad_configs(arguments, error, text):
    with pytest.raises(error, match=text):
        MoeOpsConfig(**arguments)


def test_a_saved_config_without_a_format(tmp_path):
    model = model_of()
    quantize_experts_(model, "nf4")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["format"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = "MoeOpsConfig: expected the quantization_config to have format, got adopt, "
    with pytest.raises(ValueError, match=text):
        load(model, tmp_path)


def test_bad_loading(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected modules to name experts, got 'no such'"):
        load(model, tmp_path, quantization_config=MoeOpsConfig("nf4", modules=["no such"]))
    device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match="expected a device_map without 'disk'"):
        load(
            model, tmp_path, quantization_config=MoeOpsConfig("nf4"), device_map=device_map,
            offload_folder=tmp_path / "disk",
        )  # fmt: skip


def test_loading_onto_a_device(tmp_path, input_ids):
    """device_map="auto" places it by the size that it will have."""
    model = model_of()
    model.save_pretrained(tmp_path)
    config = MoeOpsConfig("nf4")
    loaded = load(model, tmp_path, quantization_config=config, device_map="auto", dtype="bfloat16")
    weights = [module for module in loaded.modules() if isinstance(module, QuantizedWeight)]
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    assert loaded(input_ids=input_ids).logits.dtype == torch.bfloat16


def test_two_models_in_one_container():
    """Each one's quantizer describes that model."""
    models = {"a": model_of(), "b": model_of()}
    container = torch.nn.ModuleDict(models)
    for name, format in (("a", "nf4"), ("b", "int4")):
        quantize_experts_(container, format, modules=[f"{name}.model.layers.0.mlp.experts"])
    for name, format in (("a", "nf4"), ("b", "int4")):
        config = models[name].hf_quantizer.quantization_config
        assert config is models[name].config.quantization_config
        assert config.format == format


def test_another_library_s_quantizer_stays(caplog):
    """bitsandbytes leaves experts plain. Then we can quantise them, but not save them."""
    model = model_of()
    model.hf_quantizer = theirs = object()
    quantize_experts_(model, "nf4")
    assert model.hf_quantizer is theirs
    assert "save_pretrained cannot keep its quantised experts" in caplog.text


def test_trainer_takes_adapters(tmp_path, input_ids):
    """It refuses quantised models that do not train, and those without adapters."""
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = model_of()
    model.save_pretrained(tmp_path)
    model = load(model, tmp_path, quantization_config=MoeOpsConfig("nf4"))
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=1e-2, report_to=[], use_cpu=True, logging_steps=1,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in input_ids]
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model, arguments, train_dataset=data)
    model = peft.prepare_model_for_kbit_training(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = peft.get_peft_model(model, peft.LoraConfig(target_parameters=targets, r=4))
    trainer = transformers.Trainer(lora, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    after = lora.unload().state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
